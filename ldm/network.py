"""A module in training: how it computes, its optimiser, and what a checkpoint keeps of both."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from ldm.files import Tensors, flatten_optimizer, unflatten_optimizer
from ldm.schema import Training


class Network:
    """`bare` is the module itself; `wrapped` computes in the run's precision and adds gradients up over processes.

    What a module names in `apart`, parameters of another kind than its network's, is not decayed, and its gradients are
    clipped by themselves, so that large ones don't shorten the network's.
    """

    def __init__(self, module: nn.Module, training: Training, lr: float, accelerator: Accelerator):
        self.bare, self.lr, self.clip = module.to(accelerator.device), lr, training.clip
        self.parameters = [p for p in module.parameters() if p.requires_grad]
        apart = {id(p) for p in getattr(module, "apart", ())}
        self._apart = [p for p in self.parameters if id(p) in apart]
        self._together = [p for p in self.parameters if id(p) not in apart]
        # Scalars, a learned variance for one, have no natural value to decay to either.
        decayed = [p for p in self._together if p.ndim]
        free = [p for p in self._together if not p.ndim] + self._apart
        groups: list[dict[str, Any]] = [{"params": decayed}, *([{"params": free, "weight_decay": 0.0}] if free else [])]
        adamw = torch.optim.AdamW(groups, lr, betas=training.betas, weight_decay=training.weight_decay, fused=True)
        self.wrapped, self.optimizer = accelerator.prepare(module, adamw)

    @property
    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def clip_gradients(self) -> torch.Tensor:
        """Norm of the gradients, which are shortened where it is larger than `clip`."""
        if self._apart:
            nn.utils.clip_grad_norm_(self._apart, self.clip)
        return nn.utils.clip_grad_norm_(self._together, self.clip)

    def set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def state(self) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
        """Weights and buffers, the optimiser's tensors, its groups."""
        return self.bare.state_dict(), *flatten_optimizer(self.optimizer.state_dict())

    def load(self, weights: Tensors, tensors: Tensors, groups: list[dict[str, Any]]) -> None:
        self.bare.load_state_dict(weights)
        self.optimizer.load_state_dict(unflatten_optimizer(tensors, groups))
        for (
            parameter,
            state,
        ) in self.optimizer.optimizer.state.items():  # fused steps want its layout, channels last say
            for name, value in state.items():
                if value.shape == parameter.shape:
                    state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)
