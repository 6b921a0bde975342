"""The memory of a GPU that training stage two takes, item by item: counted from shapes, where there is no GPU yet.

Weights, gradients, moments and averages follow from the parameters. What a pass, a sheet and an encoding take besides
is found by running them on tensors without values, and adding up those that live at the same time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.checkpoint import checkpoint

from ldm.config.schema import Config, Training
from ldm.data.cache import BATCH as ENCODING_BATCH
from ldm.distributed import sharding
from ldm.distributed.launch import accumulated
from ldm.models import autoencoder
from ldm.models.conditioning import Condition, predict
from ldm.models.unet import UNet, inputs, use_attention
from ldm.training import checks
from ldm.training.engine import DTYPES
from ldm.training.evaluation_sizes import SHEET_BATCH, VALIDATION_BATCH, sheet_pictures

SMALL, BLOCK = 4096, 256  # of bitsandbytes: tensors with fewer elements stay in 32 bits, others have a scale a block


class Item(NamedTuple):
    """Bytes of memory: in a training step, and between two, when data is encoded, pictures are drawn or measured."""

    name: str
    step: int
    between: int


class Bill(NamedTuple):
    """All that was counted, and in words what was not."""

    items: tuple[Item, ...]
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        return sum(item.step for item in self.items)

    @property
    def between(self) -> int:
        return sum(item.between for item in self.items)

    def __str__(self) -> str:
        rows = [(name, _gb(step), _gb(between)) for name, step, between in self.items]
        rows.append(("together", _gb(self.step), _gb(self.between)))
        width = max(len(name) for name, *_ in rows)
        lines = [f"memory   {'of stage 2 on a GPU; counted, not measured':{width}}  {'in a step':>10}  between steps"]
        lines += [f"         {name:{width}}  {step:>10}  {between:>13}" for name, step, between in rows]
        return "\n".join([*lines, *(f"         not counted: {note}" for note in self.notes)])


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count else "–"


def bill(config: Config, processes: int = 1) -> Bill:
    """What stage two takes on the GPU of each of so many processes that share no tensors out: one process, or DDP.

    What is learned beside the networks (a null embedding, a schedule) is left out: it is small.
    """
    stage, data = config.stage2, config.data
    passes = accumulated("stage2", stage, processes)
    vae, unet = (network.to("meta") for network in checks.networks(config))
    text = checks.text_facts(config.text) if stage.text else checks.NO_TEXT
    sizes = [*(p.numel() for p in unet.parameters()), *text.trained]
    weights, moments, averages = 4 * sum(sizes), of_moments(sizes, stage), max(1, len(stage.ema_widths))

    told, precision = partial(_told, config, text), "bf16" if config.run.precision == "auto" else config.run.precision
    at_once, drawn, decoded, beside = _together(config, processes, passes.images)
    encoding, decoding = of_autoencoder(vae, config, at_once, decoded)
    training = of_unet(unet, partial(told, passes.images), precision, stage.gradient_checkpointing)
    drawing = sum(of_unet(unet, partial(told, drawn), "no", training=False))  # not under autocast
    if (data.cache == "none" or data.streaming) and encoding > sum(training):  # just before a pass
        training = Peak(0, encoding)
    between = [(drawing, "drawing pictures"), (decoding, "decoding pictures"), (encoding, "encoding pictures")]
    if beside:
        between.append((drawing + decoding, "decoding pictures and drawing others"))
    most, what = max(between)

    again = ", computed again in the backward pass" if stage.gradient_checkpointing else ""
    frozen, vaes = 4 * text.frozen, 4 * sum(p.numel() for p in vae.parameters())
    items = (
        Item("weights, float32", weights, weights),
        Item("gradients, float32", weights, weights if processes > 1 else 0),  # DDP keeps what it sums them in
        Item(f"moments of {stage.optimizer}", moments, moments),
        Item("average of the weights" if averages == 1 else f"{averages} averages of the weights",
             averages * weights, averages * weights),
        Item("text encoder", frozen, frozen),
        Item("autoencoder", vaes, vaes),
        Item(f"weights in {precision}, during a pass", training.copies, 0),
        Item(f"activations of {passes.images} images{again}", training.others, 0),
        Item(what, 0, most),
    )  # fmt: skip
    return Bill(tuple(item for item in items if item.step or item.between), tuple(_not_counted(config, text)))


def _not_counted(config: Config, text: checks.TextFacts) -> Iterator[str]:
    yield "CUDA itself, workspaces of its libraries, fragmentation; leave 2 GB"
    if config.stage2.text and not (text.frozen or text.trained):
        yield f"the text encoder, {config.text.model}, which is not here"
    elif text.trained:
        yield "activations of the text encoder, which is trained too"
    if config.stage2.attention_backend == "eager":
        yield "matrices of all pairs, which stage2.attention_backend=eager keeps"
    if config.stage2.compile:
        yield "what stage2.compile saves"
    if kind := sharding.asked():
        yield f"what {kind} shares out over the processes, or takes for it"


def _together(config: Config, processes: int, images: int) -> tuple[int, int, int, bool]:
    """Pictures that are encoded together; that a U-Net computes between steps, guided ones twice; that are decoded; and
    whether that is done while the next ones are drawn."""
    stage, sample = config.stage2, config.sample
    share = -(-sheet_pictures(config) // processes)
    batch = min(SHEET_BATCH, images, share)
    guided = sample.guidance != 1 and (stage.text or stage.classes)
    measured = min(VALIDATION_BATCH, images)
    drawn = max(2 * batch if guided else batch, measured)
    return max(ENCODING_BATCH, images), drawn, max(1, batch), share > batch


def of_moments(sizes: Iterable[int], training: Training) -> int:
    """Bytes of the optimiser's tensors for parameters of so many elements each."""
    if training.optimizer == "adamw":
        return sum(2 * 4 * n + 4 for n in sizes)  # and the number of its steps
    return sum(2 * (4 * n if n < SMALL else n + 4 * math.ceil(n / BLOCK)) for n in sizes)


# --------------------------------------------------------------------------------------------- tensors without values


class Peak(NamedTuple):
    """Bytes at the moment when most were taken."""

    copies: int
    """Of weights, as autocast casts them."""
    others: int


class Living(TorchDispatchMode):
    """Within it, adds up the memory of new tensors for as long as they live; those that were `given` don't count."""

    def __init__(self, given: Iterable[torch.Tensor] = ()):
        super().__init__()
        self.now = [0, 0]  # of weights' copies, of others
        self.peak = Peak(0, 0)
        self._given = {_memory(tensor) for tensor in given}
        self._known: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        cast = func is torch.ops.aten._to_copy.default and _memory(args[0]) in self._given
        for tensor in tree_leaves(found):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor, 0 if cast else 1)
        return found

    def _count(self, tensor: torch.Tensor, kind: int) -> None:
        key = _memory(tensor)
        if key in self._given or key in self._known:  # a view, or computed in place
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()

        def ended(_: Any) -> None:
            del self._known[key]
            self.now[kind] -= size

        self._known[key] = weakref.ref(storage, ended)
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
        given = args, kwargs or {}
        attention = func is F.scaled_dot_product_attention
        if func in self.HALF or attention:
            given = tree_map_only(torch.Tensor, self._half, given)
        elif func in self.FULL:
            given = tree_map_only(torch.Tensor, torch.Tensor.float, given)
        return _FusedAttention.apply(*given[0][:3]) if attention else func(*given[0], **given[1])

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


# ------------------------------------------------------------------------------------------------- what takes memory


def _told(config: Config, text: checks.TextFacts, count: int) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """x, t and condition of so many images: what the U-Net is given."""
    stage, channels, side = config.stage2, config.stage1.latent_channels, config.data.size // config.stage1.factor
    length = text.length if isinstance(text.length, int) else 77
    beside = inputs(stage, channels) - channels
    empty = partial(torch.empty, device="meta")
    numbers = empty(count, dtype=torch.int64)
    condition = Condition(
        text=empty(count, length, text.width) if stage.text else None,
        label=numbers if stage.classes or "upscale" in stage.conditions else None,
        sizes=empty(count, 6) if stage.sizes else None,
        image=empty(count, beside, side, side) if beside else None,
    )
    return empty(count, channels, side, side), numbers, condition


Told = Callable[[], tuple[torch.Tensor, torch.Tensor, Condition]]


def of_unet(unet: UNet, told: Told, precision: str, checkpointing: bool = False, training: bool = True) -> Peak:
    """What a forward pass takes, and, in training, the backward pass, where gradients are already."""

    def again(block: nn.Module, *arguments: Any) -> Any:
        return checkpoint(
            block, *arguments, use_reentrant=False, preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), AsOnGPU(precision)),
        )  # fmt: skip

    unet.train(training)
    use_attention(unet, "sdpa", torch.device("cpu"))
    if checkpointing:
        unet.enable_gradient_checkpointing(again)
    given = list(unet.parameters())
    for parameter in given:
        parameter.grad = torch.empty_like(parameter) if training else None
    given += [p.grad for p in given if p.grad is not None]
    with torch.set_grad_enabled(training), Living(given) as living:
        with AsOnGPU(precision):
            output = predict(unet, *told())
        if training:
            output.float().square().mean().backward()
    return living.peak


def of_autoencoder(vae: autoencoder.Model, config: Config, encoded: int, decoded: int) -> tuple[int, int]:
    """What encoding so many pictures takes, and decoding so many, each besides the weights; 0 in pixel space."""
    size, one = config.data.size, config.stage1
    if isinstance(vae, autoencoder.Identity):
        return 0, 0
    model = autoencoder.Autoencoder(vae)
    given = [*vae.parameters(), *vae.buffers()]
    with Living(given) as encoding, AsOnGPU("no"):
        model.moments(torch.empty(encoded, 3, size, size, device="meta"))
    with Living(given) as decoding, AsOnGPU("no"):
        model.decode(torch.empty(decoded, one.latent_channels, size // one.factor, size // one.factor, device="meta"))
    return sum(encoding.peak), sum(decoding.peak)
