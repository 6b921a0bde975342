"""Counts, on a CPU, where a GPU's host would wait: `with HostWaits() as waits:` takes `cpu:0` for the GPU."""

from __future__ import annotations

import traceback
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 0)
"""What stands for the GPU: copies to it are dispatched as others are, and computed as on the CPU."""
ROOT = str(Path(__file__).parents[1])
READS = {"_local_scalar_dense", "equal", "is_nonzero"}  # of values, which the host waits for
SIZES_BY_VALUE = {"nonzero", "masked_select", "bincount", "unique_dim", "unique_consecutive", "_unique2"}
ON_CPU = ("cpu", torch.device("cpu"))
GET_DEVICE = torch.Tensor.device.__get__  # type: ignore[attr-defined]


class _OnDevice:
    """The storages of tensors on the device."""

    def __init__(self) -> None:
        self._storages: dict[int, StorageWeakRef] = {}  # weak references keep their numbers from being used again

    def add(self, value: Any) -> None:
        for tensor in tensors(value):
            reference = StorageWeakRef(tensor.untyped_storage())
            self._storages[reference.cdata] = reference

    def discard(self, tensor: torch.Tensor) -> None:
        self._storages.pop(tensor.untyped_storage()._cdata, None)

    def __contains__(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata in self._storages


def tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]


class HostWaits:
    """`lines`: what the host waited for since they were cleared, an operator and the line of this project each.

    Waits are values that the host reads, copies to the host, and copies from it without `non_blocking`, among them the
    hidden ones of tensors that are on the CPU where the others of an operator are on the device.
    """

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.on_device = _OnDevice()
        self._modes = (_Functions(self), _Operators(self))

    def __enter__(self) -> HostWaits:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(*error)

    def wait(self, what: str) -> None:
        """Counts one, unless torch itself asks on a GPU for the device where a CPU's tensors are in its answer."""
        frames = [frame for frame in traceback.extract_stack() if frame.filename != __file__]
        own = [f for f in frames if f.filename.startswith(ROOT) and "site-packages" not in f.filename]
        if frames[-1].name != "_clip_grads_with_norm_":  # `.to` of a device that C++ names, which has no cpu:0
            self.lines.append(f"{what} at {Path(own[-1].filename).name}:{own[-1].lineno}")


class _Functions(TorchFunctionMode):
    """What no operator shows: devices, copies to the CPU that copy nothing, tensors of the host's numbers."""

    def __init__(self, waits: HostWaits):
        self.waits = waits

    def __torch_function__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, on_device = getattr(function, "__name__", ""), self.waits.on_device
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        to_device = name in ("tensor", "as_tensor") and first is None and kwargs.get("device") == DEVICE
        if to_device or name == "new_tensor":
            self.waits.wait(name)
        if first is not None and first in on_device:
            if function == GET_DEVICE:
                return DEVICE
            if name in ("tolist", "numpy", "__array__"):
                self.waits.wait(name)
            elif name == "cpu" or (name == "to" and _names_cpu(args[1:], kwargs)):
                self.waits.wait(name)
                with torch._C.DisableTorchFunction():
                    copied = first.clone()
                on_device.discard(copied)
                return copied
        result = function(*args, **kwargs)
        if to_device:
            on_device.add(result)
        return result


def _names_cpu(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    return any(value in ON_CPU for value in (*args, kwargs.get("device")) if isinstance(value, str | torch.device))


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name, on_device = function.overloadpacket.__name__, self.waits.on_device
        inputs = tensors((args, kwargs))
        own = [tensor for tensor in inputs if tensor in on_device]
        self._count(name, args, kwargs, own, [tensor for tensor in inputs if tensor not in on_device])
        result = function(*args, **kwargs)
        if own or kwargs.get("device") == DEVICE:
            on_device.add(result)
        return result

    def _count(
        self, name: str, args: Sequence[Any], kwargs: dict[str, Any], own: list[torch.Tensor], host: list[torch.Tensor]
    ) -> None:
        if not own:
            if name == "_to_copy" and kwargs.get("device") == DEVICE and not kwargs.get("non_blocking"):
                self.waits.wait("blocking copy")
            return
        if name in READS | SIZES_BY_VALUE or (name in ("index", "index_put", "index_put_") and _masks(args[1])):
            self.waits.wait(name)
        elif name == "copy_":
            if host and not (args[2:] and args[2]) and not kwargs.get("non_blocking"):
                self.waits.wait("blocking copy")
        elif any(tensor.dim() for tensor in host):  # a number on the CPU is an argument of a kernel
            self.waits.wait(f"{name} of the host's tensor")


def _masks(indices: Iterable[torch.Tensor | None]) -> bool:
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices)
