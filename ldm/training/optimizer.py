"""The optimizers, their learning rate's schedule, and their state as named tensors."""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ldm.config.schema import Training
from ldm.distributed.sharding import SHARDED, check_shardable
from ldm.utils.atomic_files import Tensors
from ldm.utils.errors import UserError

FLOAT = "=float"  # at the end of the name of a number among the optimizer's tensors
GRAM_RATIO = 1.5
"""Of a matrix's sides, from which its Gram matrix needs fewer operations: five steps take 17 + 2 r against 5 + 10 r."""
MATRIX_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
NO_EFFECT = {
    "ema_decay": ("schedulefree", "has no effect: schedulefree averages the weights itself"),
    "betas": ("adafactor", "the first has no effect: adafactor is without momentum here"),
}  # keys that an optimizer ignores
PACKAGES = {
    "adamw8bit": ("bitsandbytes", "8bit"),
    **dict.fromkeys(("prodigy", "schedulefree", "muon", "adafactor", "lion"), ("pytorch_optimizer", "optimizers")),
}  # what an optimizer is from, and the extra that installs it


def make_optimizer(
    training: Training, module: nn.Module, groups: list[dict[str, Any]], lr: float, accelerator: Accelerator
) -> torch.optim.Optimizer:
    """The configured optimizer of `groups` of a module's parameters.

    UserError where it is not installed, or would have to be sharded.
    """
    name = training.optimizer
    options: dict[str, Any] = {"lr": lr, "betas": training.betas, "weight_decay": training.weight_decay}
    if name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=True)
    if accelerator.distributed_type in SHARDED:
        check_shardable(training, "optimizer", accelerator.distributed_type.value.lower())
    check_installed(training, "optimizer")
    if name == "adamw8bit":
        import bitsandbytes

        return bitsandbytes.optim.AdamW8bit(groups, **options)  # type: ignore[no-any-return]
    if name == "muon":
        half = accelerator.mixed_precision != "no" and torch.cpu._is_amx_tile_supported()
        like_adamw = training.muon_lr is None
        divided = _muon_groups(module, groups, options, lr * (training.muon_lr or training.lr) / training.lr)
        return _muon(half)(divided, use_adjusted_lr=like_adamw)  # type: ignore[no-any-return]
    return _of_pytorch_optimizer(name, groups, options)


def _of_pytorch_optimizer(name: str, groups: list[dict[str, Any]], options: dict[str, Any]) -> torch.optim.Optimizer:
    """With settings that let `lr` mean what it does for AdamW, except Prodigy's, a factor."""
    import pytorch_optimizer

    if name == "lion":
        return pytorch_optimizer.Lion(groups, **options)
    if name == "schedulefree":
        return pytorch_optimizer.ScheduleFreeAdamW(groups, **options)
    if name == "prodigy":  # as its authors advise for a warm-up; no limit of growth, as a number that JSON knows
        unlimited = sys.float_info.max
        return pytorch_optimizer.Prodigy(
            groups, **options, bias_correction=True, safeguard_warmup=True, growth_rate=unlimited
        )
    assert name == "adafactor", name
    options["betas"] = (None, options["betas"][1])  # without momentum, which would take the memory that it saves
    return pytorch_optimizer.AdaFactor(groups, **options, scale_parameter=False, relative_step=False)


@cache
def _muon(half: bool) -> Any:
    """pytorch_optimizer's Muon, whose bf16 a CPU has `half`, in a run of half precision with AMX, alone.

    That takes two thirds of the time there, and thirty times it with AVX2. Otherwise a CPU orthogonalises in float32,
    wide matrices by their Gram matrix.
    """
    import pytorch_optimizer
    from pytorch_optimizer.optimizer.utils.matrix import (
        zero_power_via_gram_newton_schulz,
        zero_power_via_newton_schulz_5,
    )

    def orthogonalize(matrix: torch.Tensor, group: dict[str, Any]) -> torch.Tensor:
        options = {"num_steps": group["ns_steps"], "weights": group["ns_coeffs"], "dtype": torch.float32}
        if max(matrix.shape) < GRAM_RATIO * min(matrix.shape):
            return zero_power_via_newton_schulz_5(matrix, **options)
        return zero_power_via_gram_newton_schulz(matrix, **options, reset_steps=())  # no resets: they are for float16

    class Muon(pytorch_optimizer.Muon):  # type: ignore[misc]
        @staticmethod
        def _orthogonalize(group: dict[str, Any], updates: list[torch.Tensor]) -> list[torch.Tensor]:
            if updates[0].device.type != "cpu" or half:
                return pytorch_optimizer.Muon._orthogonalize(group, updates)  # type: ignore[no-any-return]
            return [orthogonalize(update.flatten(1), group) for update in updates]

    return Muon


def _muon_groups(
    module: nn.Module, groups: list[dict[str, Any]], options: dict[str, Any], muon_lr: float
) -> list[dict[str, Any]]:
    """Each group divided into hidden matrices and what AdamW trains; UserError where there are no such matrices."""
    hidden, divided = hidden_matrices(module), []
    for group in groups:
        matrices = [p for p in group["params"] if id(p) in hidden]
        others = [p for p in group["params"] if id(p) not in hidden]
        common = {"lr": options["lr"], "weight_decay": options["weight_decay"], **group}
        if matrices:
            muon = {"lr": muon_lr, "use_muon": True, "momentum": options["betas"][0]}
            divided.append({**common, "params": matrices, **muon})
        if others:
            adamw = {"betas": options["betas"], "eps": 1e-8}  # AdamW's eps
            divided.append({**common, "params": others, "use_muon": False, **adamw})
    if not any(group["use_muon"] for group in divided):
        raise UserError("optimizer: muon trains hidden matrices, and none are among the trained weights; use adamw")
    return divided


def hidden_matrices(module: nn.Module) -> set[int]:
    """The ids of trained weights that Muon is made for: those of linear and convolutional layers inside a network.

    Not of its first and last layer, nor of layers named conv_in and conv_out, as in diffusers: what is before or after
    them are pixels, latents or noise levels, not features.
    """
    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, MATRIX_LAYERS)]
    return {
        id(layer.weight)
        for name, layer in layers[1:-1]
        if layer.weight.requires_grad and not {"conv_in", "conv_out"} & set(name.split("."))
    }


def check_optimizer(training: Training, key: str) -> None:
    """UserError where the optimizer's package is missing; a line for each key that is set and has no effect.

    `key` is that of the training: `stage2`, or "" for a command of its own.
    """
    prefix = f"{key}." if key else ""
    check_installed(training, f"{prefix}optimizer")
    for name, (optimizer, reason) in NO_EFFECT.items():
        default = type(training).model_fields[name].default
        if training.optimizer == optimizer and getattr(training, name) != default:
            print(f"{prefix}{name}: {reason}", file=sys.stderr, flush=True)
    if training.muon_lr and training.optimizer != "muon":
        print(f"{prefix}muon_lr: has no effect: it is for muon", file=sys.stderr, flush=True)


def check_installed(training: Training, key: str) -> None:
    """UserError, naming the key of the optimizer, where its library is missing."""
    package, extra = PACKAGES.get(training.optimizer, ("torch", ""))
    if not importlib.util.find_spec(package):
        raise UserError(f"{key}: {training.optimizer} needs pip install 'ldm[{extra}]'; or use adamw")


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
    """An optimizer's `state_dict()` as named tensors (`3.exp_avg`) and plain groups.

    Integers become int64, floats `3.lr_max=float`, in float64; a group's tensors are `groups.0.d_numerator`.
    """
    tensors: Tensors = {}

    def flatten(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, child in value.items():
                flatten(f"{name}.{key}", child)
        elif isinstance(value, torch.Tensor):
            tensors[name] = value
        elif isinstance(value, float):
            tensors[name + FLOAT] = torch.tensor(value, dtype=torch.float64)
        else:
            tensors[name] = torch.tensor(value, dtype=torch.int64)

    for i, entry in state["state"].items():
        flatten(str(i), entry)
    groups = []
    for i, group in enumerate(state["param_groups"]):
        ours = {key: value for key, value in group.items() if isinstance(value, torch.Tensor)}
        tensors |= {f"groups.{i}.{key}": value.clone() for key, value in ours.items()}  # groups may share one
        groups.append({key: value for key, value in group.items() if key not in ours})
    return tensors, groups


def unflatten_optimizer(tensors: Tensors, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`, also of groups that were JSON, which has lists for tuples."""
    groups = [{key: value if key == "params" else _tuples(value) for key, value in group.items()} for group in groups]
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, *path, key = name.split(".")
        if index == "groups":
            groups[int(path[0])][key] = value
            continue
        entry = state.setdefault(int(index), {})
        for part in path:
            entry = entry.setdefault(part, {})
        is_number = key.endswith(FLOAT) or (value.dtype == torch.int64 and not value.ndim)
        entry[key.removesuffix(FLOAT)] = value.item() if is_number else value
    return {"state": state, "param_groups": groups}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
