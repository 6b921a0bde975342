"""How fast a run is: images a second, the share of time without data, and model FLOP utilisation.

A model's FLOPs are those of its matrix products and convolutions, a multiplication and an addition each, without what
is computed again in the backward pass (MFU, PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import copy
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import Any, TypeVar

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from ldm.models.attention import use_attention

Item = TypeVar("Item")
Power = Callable[[], float | None]

TRAINING = 3
"""FLOPs of a training step over those of a forward: the backward has two products for each, as both the inputs' and the
weights' gradients are needed (arXiv 2001.08361, section 2.1)."""
FROZEN = 2
"""The same where nearly all weights are frozen, which need no gradients."""


def gpu_power(device: torch.device) -> float | None:
    """The watts that a GPU draws at this moment; None of a CPU, or without NVIDIA's package nvidia-ml-py."""
    if device.type != "cuda":
        return None
    try:
        return torch.cuda.power_draw(device) / 1000
    except (ImportError, RuntimeError):  # no package; no right to read it
        return None


@torch.no_grad()
def forward_flops(module: nn.Module, *args: Any, **kwargs: Any) -> int:
    """FLOPs of `module(*args, **kwargs)`, from shapes alone; 0 where the forward depends on values.

    0 too where weights are quantised, whose types have no such shapes. Nothing is computed, no memory is taken for
    weights, and the module stays as it is. The same for every precision, attention backend and memory format, compiled
    or not; activations that are recomputed count once. Arguments are tensors, also within tuples, lists and
    dictionaries, and whatever else the module takes.
    """
    # Tensors with a shape, a type and a device, and no values. Entered as a mode, it would take tokens' values as well.
    if any(type(parameter).__name__ in ("Int8Params", "Params4bit") for parameter in module.parameters()):
        return 0
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    device = next(leaf.device for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor))

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if not tensor.is_meta:
            return mode.from_tensor(tensor)
        with mode:
            return torch.empty_like(tensor, device=device)

    tensors = itertools.chain(module.parameters(), module.buffers())
    hollow = copy.deepcopy(module, {id(tensor): fake(tensor) for tensor in tensors}).eval()
    use_attention(hollow, "eager", torch.device("cpu"))  # the same products; xformers' own operators can't be counted
    args, kwargs = tree_map_only(torch.Tensor, lambda tensor: fake(tensor.detach()), (args, kwargs))
    with FlopCounterMode(display=False) as counter:
        try:
            hollow(*args, **kwargs)
        except RuntimeError:  # it depends on a value
            return 0
    return int(counter.get_total_flops())


@cache
@torch.no_grad()
def matmul_peak(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest of some square matrix products: the device's peak as this process can reach it.

    Measured once, with the threads and the TF32 setting that are on, for about so many `seconds`.
    """
    on_gpu = device.type == "cuda"
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay as they are
    best, end = 0.0, time.perf_counter() + seconds
    for side in (4096, 8192) if on_gpu else (512, 1024, 2048):
        a, b = (torch.randn(side, side, device=device, generator=generator).to(dtype) for _ in range(2))
        out = a @ b  # the first one loads the kernel
        for _ in range(10):
            if on_gpu:
                torch.cuda.synchronize(device)
            began = time.perf_counter()
            torch.mm(a, b, out=out)
            if on_gpu:
                torch.cuda.synchronize(device)
            best = max(best, 2 * side**3 / (time.perf_counter() - began))
            if time.perf_counter() > end:
                return best
    return best


class Clock:
    """Measures throughput between two lines of metrics.

        for batch in clock.waiting(loader):
            …
            clock.count(len(batch))
            values = clock.read()

    `flops` are those of training on one image and `peak` is the FLOP/s of all devices together; 0 where not known.
    `power` gives the watts that are drawn, or None. On a GPU, whose work is queued, waiting for data is not always the
    GPU's waiting: the share is an upper bound of it.
    """

    def __init__(
        self,
        flops: float = 0.0,
        peak: float = 0.0,
        now: Callable[[], float] = time.perf_counter,
        power: Power = lambda: None,
    ):
        self.now, self.power = now, power
        self.restart(flops, peak)

    def count_flops(
        self, model: nn.Module, unsharded: nn.Module, images: int, peak: float, ready: Callable[[], bool]
    ) -> None:
        """Counts FLOPs on `model`'s first forward of so many `images` once `ready()`, and restarts with them.

        Only in training: a validation's batches are of other sizes.
        """

        def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module.training and ready():
                hook.remove()
                passes = FROZEN if getattr(unsharded, "frozen_prefixes", ()) else TRAINING
                self.restart(passes * forward_flops(unsharded, *args, **kwargs) / images, peak)

        hook = model.register_forward_pre_hook(count, with_kwargs=True)

    def restart(self, flops: float = 0.0, peak: float = 0.0) -> None:
        """Starts measuring anew."""
        self.flops, self.peak = flops, peak
        self._began, self._waited, self._images = self.now(), 0.0, 0

    def waiting(self, loader: Iterable[Item]) -> Iterator[Item]:
        """The items of a loader; the time that it takes for each is time spent waiting."""
        items = iter(loader)
        while True:
            began = self.now()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                self._waited += self.now() - began
            yield item

    def count(self, images: int) -> None:
        self._images += images

    def read(self) -> dict[str, float]:
        """`images_per_second`, `waiting` in [0, 1] and, where known, `mfu` in [0, 1], since the last reading.

        And, where `power()` is known, its `watts` at this moment.
        """
        elapsed = self.now() - self._began
        rate = self._images / elapsed
        values = {"images_per_second": rate, "waiting": self._waited / elapsed}
        if self.flops and self.peak:
            values["mfu"] = rate * self.flops / self.peak
        if (watts := self.power()) is not None:
            values["watts"] = watts
        self.restart(self.flops, self.peak)
        return values
