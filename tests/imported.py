"""What the server of `forked` imports before it forks: all that its scripts will need."""

import torch.utils.tensorboard  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import train_ldm  # noqa: F401
from scripts import evaluate, txt2img  # noqa: F401
from stage2_diffusion.distillation import train  # noqa: F401
