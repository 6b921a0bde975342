"""What the server of `forked` imports before it forks: all that its scripts will need."""

import emoji  # noqa: F401
import pandas  # noqa: F401
import resvg_py  # noqa: F401
import torch.utils.tensorboard  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import train_ldm  # noqa: F401
from ldm.data import check, stream  # noqa: F401
from ldm.training import memory_estimate, preflight  # noqa: F401
from scripts import evaluate, txt2img  # noqa: F401
from stage1_vae import train as stage1_train  # noqa: F401
from stage2_diffusion import train as stage2_train  # noqa: F401
from stage2_diffusion.distillation import train as distillation_train  # noqa: F401
