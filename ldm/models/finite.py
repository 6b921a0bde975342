"""Values that are not finite (NaN, infinity): they are found in weights and outputs, and go no further."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ldm.utils.errors import UserError

Tensors = Mapping[str, torch.Tensor]


def nonfinite_names(tensors: Tensors) -> list[str]:
    """The names of the tensors that hold a NaN or infinite value."""
    floating = {name: t for name, t in tensors.items() if t.is_floating_point() and not t.is_meta}
    if not floating:
        return []
    are_finite = torch.stack([t.isfinite().all().cpu() for t in floating.values()])
    return [name for name, is_finite in zip(floating, are_finite.tolist(), strict=True) if not is_finite]


def describe_weights(tensors: Tensors) -> str:
    """How many tensors are not finite, and the first of them; empty where all are finite."""
    if not (names := nonfinite_names(tensors)):
        return ""
    return f"{len(names)} of {len(tensors)} tensors hold NaN or infinite values (the first: {names[0]})"


def check_weights(models: Mapping[str, Any], target: object) -> None:
    """UserError where weights to be written to `target` are not finite; `models` are modules or tensors by name."""
    for name, model in models.items():
        tensors = {name: model} if isinstance(model, torch.Tensor) else model.state_dict()
        if weights := describe_weights(tensors):
            raise UserError(
                f"{target}: not written: {name}: {weights}; go back to a checkpoint from before, and lower the "
                "learning rate"
            )


def check_output(output: torch.Tensor, name: str, model: Any, remedy: str) -> None:
    """UserError, naming the network `name`, where its output `(N, …)` is not finite; its weights tell the reason."""
    if bool(output.isfinite().all()):
        return
    count = int((~output.flatten(1).isfinite().all(dim=1)).sum())
    weights = describe_weights(model.state_dict()) if isinstance(model, torch.nn.Module) else ""
    reason = f"{weights}; take an earlier checkpoint, or fetch the model anew" if weights else remedy
    raise UserError(f"the {name}'s output is NaN or infinite for {count} of {len(output)} images: {reason}")
