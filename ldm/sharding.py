"""Training that is spread over processes by more than its batch: FSDP, as accelerate's configuration asks for it.

Parameters, gradients and the optimiser's tensors are then parts of tensors (`DTensor`s). Here they become whole ones,
which is what checkpoints hold, and whole ones become parts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.errors import UserError
from ldm.files import Tensors

FSDP = "ACCELERATE_USE_FSDP"  # what `accelerate launch` sets


def asked(variable: str) -> bool:
    return os.environ.get(variable, "false").lower() == "true"


def check() -> None:
    """UserError where accelerate's configuration asks for what does not work here."""
    if not asked(FSDP):
        return
    for key, needed, why in (
        ("version", "2", "version 1 is not supported"),
        ("offload_params", "false", "parameters stay where they are computed with"),
        ("activation_checkpointing", "false", "stage2.gradient_checkpointing=true does the same"),
    ):
        found = os.environ.get(f"FSDP_{key.upper()}", "1" if key == "version" else "false").lower()
        if found != needed:
            raise UserError(f"fsdp_{key}: {found} in accelerate's configuration; {why}, set it to {needed}")


def shard(accelerator: Accelerator, wanted: bool) -> None:
    """Has an accelerator shard what it prepares, where that is `wanted` and configured; else DDP does its work.

    accelerate itself shards on accelerators only; its own preparation works on CPUs as well. Parameters are gathered in
    full precision, and the forward pass is under autocast, as without sharding: accelerate's default would round the
    noise levels, which are among the inputs, to bf16.
    """
    state = accelerator.state
    state.distributed_type = PartialState().distributed_type
    if wanted and asked(FSDP) and accelerator.use_distributed:
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            cpu_ram_efficient_loading=False, mixed_precision_policy=MixedPrecisionPolicy()
        )
        state.distributed_type = DistributedType.FSDP


def without_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory, to be filled by `load_state_dict(…, assign=True)`."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, memo)  # type: ignore[arg-type]


def local(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a tensor, in the same memory; all of it where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    mine: torch.Tensor = tensor.to_local()
    return mine.detach().requires_grad_(tensor.requires_grad)


def joined(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: what each process has, as one tensor that is sharded like `like`."""
    if not isinstance(like, DTensor):
        return tensor
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def sharded(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A tensor that every process has whole, sharded like `like`."""
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor, on its device; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Whole tensors by name. Every process has to call it; sharded ones go to the main process's CPU, and no other."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        full = whole(tensor)
        if full is tensor:
            found[name] = tensor
        elif PartialState().is_main_process:
            found[name] = full.cpu()
    return found
