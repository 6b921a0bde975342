"""Peak memory of a computation on tensors without values, as it would be on a GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from ldm.utils.precision import DTYPES


class Peak(NamedTuple):
    """Bytes at the peak."""

    copies: int
    """Of weights, as autocast casts them."""
    others: int


class MemoryTracker(TorchDispatchMode):
    """Within it, adds up the memory of new tensors while they live; `existing` ones don't count."""

    def __init__(self, existing: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = [0, 0]  # of weights' copies, of others
        self.peak = Peak(0, 0)
        self._existing = {_memory(tensor) for tensor in existing}
        self._storages: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and _memory(args[0]) in self._existing
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, 0 if cast else 1)
        return result

    def _count(self, tensor: torch.Tensor, kind: int) -> None:
        key = _memory(tensor)
        if key in self._existing or key in self._storages:  # a view, or computed in place
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()

        def freed(_: Any) -> None:
            del self._storages[key]
            self.now[kind] -= size

        self._storages[key] = weakref.ref(storage, freed)
        self.now[kind] += size
        if sum(self.now) > sum(self.peak):
            self.peak = Peak(*self.now)


def _memory(tensor: torch.Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


class AsOnGPU(TorchFunctionMode):
    """Within it, tensors of any device take the memory that they do on a GPU: autocast's types, fused attention."""

    HALF = frozenset({F.linear, F.conv2d, torch.matmul, torch.Tensor.__matmul__, torch.bmm, torch.baddbmm})
    FULL = frozenset({F.group_norm, F.layer_norm, F.softmax, torch.softmax, torch.Tensor.softmax})

    def __init__(self, precision: str):
        super().__init__()
        self.dtype = DTYPES[precision]
        self._copies: dict[int, torch.Tensor] = {}  # of weights, until the mode ends

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        inputs = args, kwargs or {}
        attention = func is F.scaled_dot_product_attention
        if func in self.HALF or attention:
            inputs = tree_map_only(torch.Tensor, self._half, inputs)
        elif func in self.FULL:
            inputs = tree_map_only(torch.Tensor, torch.Tensor.float, inputs)
        return _FusedAttention.apply(*inputs[0][:3]) if attention else func(*inputs[0], **inputs[1])

    def _half(self, tensor: torch.Tensor) -> torch.Tensor:
        if not (tensor.is_leaf and tensor.requires_grad) or tensor.dtype == self.dtype:
            return tensor.to(self.dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self.dtype)
        return self._copies[id(tensor)]

    def __exit__(self, *error: Any) -> None:
        self._copies.clear()
        super().__exit__(*error)


class _FusedAttention(torch.autograd.Function):
    """FlashAttention, arXiv 2205.14135: no matrix of all pairs, but a number for each query; q, k, v `(N, H, T, D)`."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        out, log_sums = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, ...]:  # type: ignore[override]
        q, k, v, _, _ = ctx.saved_tensors
        sums = torch.empty_like(q, dtype=torch.float32)  # in which the gradient of q is added up
        gradients = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        del sums
        return gradients
