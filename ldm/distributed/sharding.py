"""Sharded training, by FSDP or DeepSpeed, as accelerate's configuration says.

Under FSDP, parameters, gradients and the optimizer's tensors are `DTensor`s. The functions here convert them to full
tensors or shards, which checkpoints hold, and back.
"""

from __future__ import annotations

import copy
import os

import torch
from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin, PartialState
from accelerate.utils import DistributedType, is_deepspeed_available
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from ldm.config.schema import Stage2Config, Training
from ldm.distributed.accumulation import Accumulation, accumulation
from ldm.utils.atomic_files import Tensors
from ldm.utils.errors import UserError
from ldm.utils.safetensors_file import SavedTensor

SHARDED = (DistributedType.FSDP, DistributedType.DEEPSPEED)
KINDS = {"ACCELERATE_USE_FSDP": "fsdp", "ACCELERATE_USE_DEEPSPEED": "deepspeed"}  # what `accelerate launch` sets

SHARDABLE = {"fsdp": ("adamw", "lion", "schedulefree"), "deepspeed": ("adamw",)}  # optimizers that treat elements alike


def sharding_kind() -> str:
    """`fsdp`, `deepspeed` or "": what accelerate's configuration says."""
    return next((kind for key, kind in KINDS.items() if os.environ.get(key, "false").lower() == "true"), "")


def state_dict_type() -> str:
    """`full` or `sharded` checkpoints: what accelerate's `fsdp_state_dict_type` says; "" where it is not set."""
    return os.environ.get("FSDP_STATE_DICT_TYPE", "").lower().removesuffix("_state_dict")


def check(training: Stage2Config, precision: str, processes: int = 1) -> None:
    """UserError where accelerate's configuration has an unsupported setting; `precision` is `run.precision`."""
    if sharding_kind() and processes > 1:
        check_shardable(training, "stage2.optimizer", sharding_kind())
    if sharding_kind() == "fsdp":
        _check_fsdp(training)
    elif sharding_kind() == "deepspeed":
        _check_deepspeed(training, precision, processes)


def check_shardable(training: Training, key: str, kind: str) -> None:
    """UserError, naming the key of the optimizer, where it can't be sharded by `fsdp` or `deepspeed`."""
    if training.optimizer not in SHARDABLE[kind]:
        raise UserError(f"{key}: {training.optimizer} can't be sharded, which divides its memory too; use adamw")


def _check_fsdp(training: Stage2Config) -> None:
    for key, supported, reason in (
        ("version", "2", "version 1 is not supported"),
        ("offload_params", "false", "parameters stay where they are computed with"),
        ("activation_checkpointing", "false", "stage2.gradient_checkpointing=true does the same"),
    ):
        value = os.environ.get(f"FSDP_{key.upper()}", "1" if key == "version" else "false").lower()
        if value != supported:
            raise UserError(f"fsdp_{key}: {value} in accelerate's configuration; {reason}, set it to {supported}")
    if state_dict_type() not in ("full", "sharded", ""):
        raise UserError(
            f"fsdp_state_dict_type: {os.environ['FSDP_STATE_DICT_TYPE']} in accelerate's configuration; "
            "give FULL_STATE_DICT or SHARDED_STATE_DICT"
        )
    if training.channels_last:
        raise UserError("stage2.channels_last: FSDP splits weights along their first dimension alone; set it to false")


def _check_deepspeed(training: Stage2Config, precision: str, processes: int) -> None:
    if not is_deepspeed_available():
        raise UserError("accelerate's configuration asks for DeepSpeed, which is not here; pip install deepspeed")
    deepspeed = DeepSpeedPlugin().deepspeed_config
    accumulation_steps = accumulation(training.batch, processes, training.device_batch).steps
    zero = deepspeed["zero_optimization"]
    for key, value, supported in (
        ("zero_stage", zero["stage"], 2),
        ("offload_optimizer_device", zero.get("offload_optimizer", {}).get("device", "none"), "none"),
        ("fp16.enabled", deepspeed.get("fp16", {}).get("enabled", False), False),
        ("bf16.enabled", deepspeed.get("bf16", {}).get("enabled", False), False),
    ):
        if value != supported:
            raise UserError(f"{key}: {value} in DeepSpeed's configuration; only {supported} is supported")
    for key, source, value in (
        ("gradient_clipping", "stage2.max_grad_norm", training.max_grad_norm),
        ("gradient_accumulation_steps", "the accumulation steps of stage2.device_batch", accumulation_steps),
    ):
        if deepspeed.get(key, "auto") not in ("auto", value):
            raise UserError(f"{key}: {deepspeed[key]} in DeepSpeed's configuration, {value} in {source}; make it auto")
    if precision == "fp16":
        raise UserError("run.precision: fp16 needs DDP or FSDP here, not DeepSpeed; take bf16")
    for key in ("beta_schedule", "loss_weighting", "uncond_embedding"):
        if getattr(training, key) == "learned":
            raise UserError(f"stage2.{key}: learned is clipped by itself, which DeepSpeed can't do; take FSDP or DDP")


def shard(accelerator: Accelerator, training: Training, accumulated: Accumulation) -> None:
    """Has an accelerator shard the modules that it prepares, where accelerate's configuration says so.

    accelerate alone does so on GPUs only, although its preparation works on CPUs. Parameters stay in full precision and
    the forward pass runs under autocast, as with DDP: accelerate's defaults would round the noise levels, which are
    inputs, to bf16.
    """
    if not accelerator.use_distributed or not sharding_kind():
        return
    state = accelerator.state
    if sharding_kind() == "fsdp":
        kind = DistributedType.FSDP
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            cpu_ram_efficient_loading=False, mixed_precision_policy=MixedPrecisionPolicy()
        )
    else:
        kind = DistributedType.DEEPSPEED
        state.deepspeed_plugins = DeepSpeedPlugin()
        state.deepspeed_plugins.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": accumulated.images,
            "gradient_accumulation_steps": accumulated.steps,
            "gradient_clipping": training.max_grad_norm,
        }
        state.deepspeed_plugins.select(_from_accelerator_state=True)
        accelerator.deepspeed_engine_wrapped = None
    state.distributed_type = PartialState().distributed_type = kind  # as accelerate leaves it


def without_weights(module: nn.Module) -> nn.Module:
    """A copy whose parameters take no memory, to be filled by `load_state_dict(…, assign=True)`."""
    memo = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in module.parameters()}
    return copy.deepcopy(module, memo)  # type: ignore[arg-type]


def to_local(tensor: torch.Tensor) -> torch.Tensor:
    """This process's shard of a tensor, in the same memory; the tensor itself where it is not sharded."""
    if not isinstance(tensor, DTensor):
        return tensor
    local: torch.Tensor = tensor.to_local()
    return local.detach().requires_grad_(tensor.requires_grad)


def from_local(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """The inverse: the tensor, sharded like `like`, of which each process passes its shard."""
    if not isinstance(like, DTensor):
        return tensor
    mesh, placements = like.device_mesh, like.placements
    return DTensor.from_local(tensor, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def shard_like(tensor: torch.Tensor | SavedTensor, like: torch.Tensor | SavedTensor) -> torch.Tensor:
    """A full tensor, which every process passes, sharded like `like`; of a saved one each reads its shard alone."""
    if isinstance(tensor, SavedTensor):
        if not isinstance(like, DTensor):
            return tensor.read()
        (block,) = like.__create_chunk_list__()
        return from_local(tensor.read(block.offsets, block.sizes).to(like.device), like)
    if not isinstance(like, DTensor):
        return tensor
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, on its device; every process has to call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def on_main_cpu(name: str, tensor: torch.Tensor) -> Tensors:
    """The tensor by its name, in CPU memory, on the main process; nothing on the others."""
    return {name: tensor.cpu()} if PartialState().is_main_process else {}
