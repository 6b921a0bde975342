"""Training of which each process holds a part: FSDP or DeepSpeed, as accelerate's configuration asks for them.

Under FSDP parameters, gradients and the optimiser's tensors are parts of tensors (`DTensor`s). Here they become whole
ones, which is what checkpoints hold, and whole ones become parts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, is_deepspeed_available
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.config.schema import Config, Stage2Config, Training
from ldm.distributed.accumulation import Accumulation, accumulation
from ldm.utils.atomic_files import Tensors
from ldm.utils.errors import UserError

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
KINDS = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}  # what `accelerate launch` sets


def asked() -> str:
    """`fsdp`, `deepspeed` or nothing: what accelerate's configuration asks for."""
    return next((kind for key, kind in KINDS.items() if os.environ.get(key, "false").lower() == "true"), "")


def check(config: Config, processes: int = 1) -> None:
    """UserError where accelerate's configuration asks for what does not work here."""
    if asked() == "fsdp":
        _check_fsdp(config.stage2)
    elif asked() == "deepspeed":
        _check_deepspeed(config, processes)


def _check_fsdp(stage: Stage2Config) -> None:
    for key, needed, why in (
        ("version", "2", "version 1 is not supported"),
        ("offload_params", "false", "parameters stay where they are computed with"),
        ("activation_checkpointing", "false", "stage2.gradient_checkpointing=true does the same"),
    ):
        found = os.environ.get(f"FSDP_{key.upper()}", "1" if key == "version" else "false").lower()
        if found != needed:
            raise UserError(f"fsdp_{key}: {found} in accelerate's configuration; {why}, set it to {needed}")
    if stage.channels_last:
        raise UserError("stage2.channels_last: FSDP cuts weights along their first side alone; set it to false")


def _check_deepspeed(config: Config, processes: int) -> None:
    if not is_deepspeed_available():
        raise UserError("accelerate's configuration asks for DeepSpeed, which is not here; pip install deepspeed")
    ours, theirs = config.stage2, DeepSpeedPlugin().deepspeed_config
    passes = accumulation(ours.batch, processes, ours.device_batch).steps
    zero = theirs["zero_optimization"]
    for key, found, needed in (
        ("zero_stage", zero["stage"], 2),
        ("offload_optimizer_device", zero.get("offload_optimizer", {}).get("device", "none"), "none"),
        ("fp16.enabled", theirs.get("fp16", {}).get("enabled", False), False),
        ("bf16.enabled", theirs.get("bf16", {}).get("enabled", False), False),
    ):
        if found != needed:
            raise UserError(f"{key}: {found} in DeepSpeed's configuration; only {needed} is supported")
    for key, configured, found in (
        ("gradient_clipping", "stage2.max_grad_norm", ours.max_grad_norm),
        ("gradient_accumulation_steps", "the passes of stage2.device_batch", passes),
    ):
        if theirs.get(key, "auto") not in ("auto", found):
            raise UserError(f"{key}: {theirs[key]} in DeepSpeed's configuration, {found} in {configured}; make it auto")
    if config.run.precision == "fp16":
        raise UserError("run.precision: fp16 needs DDP or FSDP here, not DeepSpeed; take bf16")
    for key, given in (
        ("beta_schedule", ours.beta_schedule),
        ("loss_weighting", ours.loss_weighting),
        ("uncond_embedding", ours.uncond_embedding),
    ):
        if given == "learned":
            raise UserError(f"stage2.{key}: learned is clipped by itself, which DeepSpeed can't do; take FSDP or DDP")


def shard(accelerator: Accelerator, training: Training, passes: Accumulation) -> None:
    """Has an accelerator spread what it prepares over the processes, where accelerate's configuration says so.

    accelerate itself does that on accelerators only; its own preparation works on CPUs as well. Parameters stay in full
    precision, and the forward pass is under autocast, as it is with DDP: accelerate's defaults would round the noise
    levels, which are among the inputs, to bf16.
    """
    if not accelerator.use_distributed or not asked():
        return
    state = accelerator.state
    if asked() == "fsdp":
        kind = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            cpu_ram_efficient_loading=False, mixed_precision_policy=MixedPrecisionPolicy()
        )
    else:
        kind = DistributedType.DEEPSPEED
        state.deepspeed_plugins = DeepSpeedPlugin()
        state.deepspeed_plugins.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": passes.images, "gradient_accumulation_steps": passes.steps,
            "gradient_clipping": training.max_grad_norm,
        }  # fmt: skip
        state.deepspeed_plugins.select(_from_accelerator_state=True)
        accelerator.deepspeed_engine_wrapped = None
    state.distributed_type = PartialState().distributed_type = kind  # as accelerate leaves it


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
    """Whole tensors by name. Every process has to call it; what was sharded, only the main one gets."""
    found: Tensors = {}
    for name, tensor in tensors.items():
        found |= on_main_cpu(name, whole(tensor)) if isinstance(tensor, DTensor) else {name: tensor}
    return found


def on_main_cpu(name: str, tensor: torch.Tensor) -> Tensors:
    """A named tensor, in the main process's memory, and in no other's."""
    return {name: tensor.cpu()} if PartialState().is_main_process else {}
