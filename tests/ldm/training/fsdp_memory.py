"""`fsdp_memory.py FOLDER [KEY=VALUE …]` takes a step of a sharded U-Net, of the tiny configuration.

Each process writes to `FOLDER/RANK.json` what it holds, in bytes. Then comes a dry run without data.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.distributed.fsdp import FSDPModule

from ldm.config import loader
from ldm.distributed.launch import join
from ldm.distributed.sharding import to_local
from ldm.models import unet
from ldm.models.conditioning import Condition, TextEmbedding
from ldm.training.trainer import Trainer
from stage2_diffusion.denoiser import Denoiser
from train_ldm import dry_run


def num_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Of each storage once: gradients that were reduced together share one."""
    storages = [to_local(tensor).untyped_storage() for tensor in tensors if tensor is not None]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def fsdp_params(module: Any) -> list[Any]:
    """What FSDP gathers at a time."""
    return [param for group in module._get_fsdp_state()._fsdp_param_groups for param in group.fsdp_params]


def train_step() -> list[tuple[int, int]]:
    """Returns the bytes of gradients after each pass: not yet reduced, and the shards of reduced ones."""
    gradients = []
    for _ in range(trainer.accumulation.steps):
        with trainer.accumulate():
            count = trainer.accumulation.images
            condition = Condition(text=torch.zeros(count, 16, 384))
            output = trainer.model(torch.zeros(count, channels, side, side), torch.zeros(count).long(), condition)
            trainer.backward(output.square().mean())
            unsharded = [param.unsharded_param.grad for module in blocks for param in fsdp_params(module)]
            gradients.append((num_bytes(unsharded), num_bytes(p.grad for p in trainer.parameters)))
            trainer.optimizer_step()
    return gradients


folder, *overrides = sys.argv[1:]
config = loader.load("configs/tiny.yaml", overrides)
join(config.run)
channels, side = config.stage1.latent_channels, config.data.size // config.stage1.factor
denoiser = Denoiser(
    unet.build(config.stage2, channels, side, 384), config.stage2, TextEmbedding(torch.zeros(1, 16, 384))
)
trainer = Trainer(config.run, config.stage2, "stage2", denoiser, sharded=True)
trainer.model.train()
blocks = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
gradients = train_step()
states = trainer._engine.optimizer.optimizer.state.values()
memory = {
    "weights": num_bytes(trainer.parameters),
    "moments": num_bytes(tensor for state in states for tensor in state.values()),
    "averages": num_bytes(average for model in trainer.ema.models for average in model.shadow_params),
    "gradients": gradients,
    "gradients between steps": num_bytes(p.grad for p in trainer.parameters),
    "gathered": [
        sum(4 * 2 * param.padded_sharded_param_size.numel() for param in fsdp_params(module)) for module in blocks
    ],
}
(Path(folder) / f"{PartialState().process_index}.json").write_text(json.dumps(memory))
without_data = loader.load("configs/tiny.yaml", [*overrides, "run.device=auto", f"data.source={folder}/none"])
dry_run(without_data, "2", True)
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
