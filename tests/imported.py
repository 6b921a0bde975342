"""What the server of `forked` imports and measures before it forks: all that its scripts will need."""

import gc

import emoji  # noqa: F401
import matplotlib.backends.backend_agg  # noqa: F401
import pandas  # noqa: F401
import resvg_py  # noqa: F401
import torch
import torch.utils.tensorboard
import torchmetrics.image  # noqa: F401
import transformers.models.bert.modeling_bert  # noqa: F401

import train_ldm  # noqa: F401
from ldm.data import check, openmoji, stream  # noqa: F401
from ldm.models import latent_plots, text_encoder, text_encoder_files  # noqa: F401
from ldm.training import memory_estimate, preflight  # noqa: F401
from ldm.training.throughput import matmul_peak
from scripts import evaluate, txt2img  # noqa: F401
from stage1_vae import train as stage1_train  # noqa: F401
from stage2_diffusion import train as stage2_train  # noqa: F401
from stage2_diffusion.distillation import train as distillation_train  # noqa: F401

for dtype in (torch.float32, torch.bfloat16):
    matmul_peak(torch.device("cpu"), dtype)  # half a second, which each run would take
# what transformers and the captions of the drawings make once a process takes half a second
text_encoder.load(text_encoder_files.MINILM, 8)
openmoji.drawings("openmoji-demo")
gc.collect()
gc.freeze()  # in a fork, garbage collection neither visits nor copies what was imported
