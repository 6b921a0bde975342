"""`exactly.py WORLD_SIZE FOLDER kl|vq [KEY=VALUE …]` trains an autoencoder in float64: sums have hardly an order."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[2]))
from ldm.config import loader
from ldm.data import index
from ldm.distributed.launch import join
from ldm.training import throughput
from stage1_vae.train import train

SHARED = [
    "run.precision=no",
    "run.tracker=none",
    "run.log_every=1",
    "data.size=16",
    "stage1.steps=6",
    "stage1.batch=8",
    "stage1.lr_warmup_steps=2",
    "stage1.checkpoint_every=6",
    "stage1.gan.start=1",
    "stage1.gan.warmup=1",
    "stage1.gan.ramp=2",
    "stage1.gan.channels=8",
    "stage1.gan.layers=1",
    "stage1.gan.r1=0.5",
    "stage1.gan.lr=1e-3",
    "stage1.gan.augment=[color,translation,cutout]",
    "stage1.learn_variance=true",
    "stage1.kl_free=0.01",
]
MODELS = {
    "kl": ["data.size=32", "stage1.equivariance=0.3"],
    "vq": [
        "stage1.model=vq-f4-small",
        "stage1.channels=[16, 32]",
        "stage1.norm_num_groups=8",
        "stage1.codes=64",
        "stage1.revive=3",
    ],
}

world, folder, model, *more = sys.argv[1:]
torch.set_default_dtype(torch.float64)
throughput.forward_flops = lambda *args, **kwargs: 0  # counting takes as long as a few steps
settings = loader.load("configs/tiny.yaml", [f"run.dir={folder}", *SHARED, *MODELS[model], *more])
join(settings.run)
train(settings, index.build(settings.data, settings.cache_dir, settings.stage2.conditions))
assert PartialState().num_processes == int(world)
