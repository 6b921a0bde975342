"""The optimizer, its learning rate's schedule, and its state as named tensors."""

from __future__ import annotations

import importlib.util
import math
from typing import Any

import torch
from accelerate import Accelerator

from ldm.config.schema import Training
from ldm.distributed.sharding import SHARDED
from ldm.utils.atomic_files import Tensors
from ldm.utils.errors import UserError


def make_optimizer(
    training: Training, groups: list[dict[str, Any]], lr: float, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """AdamW; UserError where the 8-bit one is not installed, or would have to be sharded."""
    options: dict[str, Any] = {"lr": lr, "betas": training.betas, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if accelerator.distributed_type in SHARDED:
        raise UserError("optimizer: adamw8bit can't be sharded, which divides its memory too; use adamw")
    check_installed(training, "optimizer")
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(groups, **options)  # type: ignore[no-any-return]


def check_installed(training: Training, key: str) -> None:
    """UserError, naming the key of the optimizer, where its library is missing."""
    if training.optimizer == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
        raise UserError(f"{key}: adamw8bit needs pip install 'ldm[8bit]'; or use adamw")


def lr_factor(step: int, training: Training) -> float:
    """Share of the full learning rate, in [0, 1], at optimizer step `step`, from 0.

    It rises linearly over `lr_warmup_steps`, then follows `lr_scheduler` down to 0 at `steps`.
    """
    rise = min(1.0, (step + 1) / max(1, training.lr_warmup_steps))
    if training.lr_scheduler == "constant":
        return rise
    progress = max(0, step - training.lr_warmup_steps) / max(1, training.steps - training.lr_warmup_steps)
    return rise * (1 - progress if training.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


def flatten_optimizer(state: dict[str, Any]) -> tuple[Tensors, list[dict[str, Any]]]:
    """An optimizer's `state_dict()` as named tensors (`3.exp_avg`) and plain groups; integers become int64."""
    tensors: Tensors = {}

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                flatten(f"{name}.{key}", child)
        else:
            tensors[name] = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)

    for i, entry in state["state"].items():
        flatten(str(i), entry)
    return tensors, state["param_groups"]


def unflatten_optimizer(tensors: Tensors, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, *path, key = name.split(".")
        entry = state.setdefault(int(index), {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[key] = int(value) if value.dtype == torch.int64 and not value.ndim else value
    return {"state": state, "param_groups": groups}
