"""The GPU memory that stage two needs, row by row: counted from shapes, without a GPU.

Weights, gradients, moments and averages follow from the parameters. What a pass, a sheet and an encoding take besides
is counted by running them on tensors without values. Under FSDP, what it gathers follows from the parameters too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.utils.checkpoint import checkpoint

from ldm.config.schema import Config, FinetuneConfig, Training
from ldm.data.cache import BATCH as ENCODING_BATCH
from ldm.distributed import sharding
from ldm.distributed.launch import accumulated
from ldm.models import autoencoder
from ldm.models.adapters.base_precision import QUANTISED, base_bytes
from ldm.models.adapters.inject import AdapterSpec, add_adapter, target_layers
from ldm.models.attention import use_attention
from ldm.models.conditioning import Condition, predict
from ldm.models.unet import UNet, input_channels
from ldm.training import plan
from ldm.training.evaluation_sizes import SHEET_BATCH, VALIDATION_BATCH, sheet_images
from ldm.training.memory_tracker import AsOnGPU, MemoryTracker, Peak
from ldm.training.optimizer import hidden_matrices
from ldm.utils.precision import DTYPES

SMALL, BLOCK = 4096, 256  # of bitsandbytes: tensors with fewer elements stay in 32 bits, others have a scale a block
COPIES = {"lion": 1, "schedulefree": 2, "prodigy": 4}  # tensors as large as the weights that an optimizer keeps
FSDP_BLOCKS = (BasicTransformerBlock, ResnetBlock2D)  # which FSDP gathers one at a time


class Row(NamedTuple):
    """Bytes of memory: in a training step, and between two steps (encoding, sampling, validation)."""

    name: str
    step: int
    between: int


class MemoryEstimate(NamedTuple):
    """What was counted, and in words what was not."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    @property
    def step(self) -> int:
        return sum(row.step for row in self.rows)

    @property
    def between(self) -> int:
        return sum(row.between for row in self.rows)

    def __str__(self) -> str:
        rows = [(name, _gb(step), _gb(between)) for name, step, between in self.rows]
        rows.append(("together", _gb(self.step), _gb(self.between)))
        width = max(len(name) for name, *_ in rows)
        lines = [f"memory   {'of stage 2 on a GPU; counted, not measured':{width}}  {'in a step':>10}  between steps"]
        lines += [f"         {name:{width}}  {step:>10}  {between:>13}" for name, step, between in rows]
        return "\n".join([*lines, *(f"         not counted: {note}" for note in self.notes)])


def _gb(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count else "–"


def estimate_memory(config: Config, processes: int = 1, sharded: bool = False) -> MemoryEstimate:
    """What stage two takes on the GPU of each process: of one, of several under DDP, or, if `sharded`, under FSDP.

    FSDP, as `configs/accelerate/fsdp.yaml` sets it up, divides weights, moments and averages among the processes;
    counted is the first process, whose shards are the largest. Gradients are divided after a step's last pass, so where
    there are several (accumulation) they are whole. Whole in every process are also autocast's copies of the weights
    during a pass, activations, frozen networks and, next to the shards, the weights that are exported at the end. Of
    what is gathered during a pass an upper bound is counted: see `fsdp_memory`.

    Small trained tensors outside the networks (a null embedding, a schedule) are left out.
    """
    stage, data = config.stage2, config.data
    sharded = sharded and processes > 1  # a single process trains unsharded
    shards, part = (processes, f", 1/{processes}") if sharded else (1, "")
    accumulation = accumulated("stage2", stage, processes)
    vae, unet = (network.to("meta") for network in plan.networks(config))
    text = plan.text_encoder_sizes(config.text) if stage.text else plan.NO_TEXT
    base, dequantised = freeze(unet, config.finetune)
    shapes = [*(p.shape for p in unet.parameters() if p.requires_grad), *text.trained]
    if config.finetune.kind == "inversion":
        shapes = [torch.Size([config.finetune.vectors, text.width])]
    sizes = [shard_size(shape, shards) for shape in shapes]
    all_weights, weights = 4 * sum(shape.numel() for shape in shapes), 4 * sum(sizes)
    moments, averages = _moments(unet, text, sizes, stage), max(1, len(stage.ema_widths))
    gradients = all_weights if accumulation.steps > 1 else weights
    gathered = fsdp_memory(unet, processes, accumulation.steps) if sharded else 0
    exported = all_weights + base if sharded else 0
    base = -(-base // shards)
    kept = gradients if processes > 1 and not sharded else 0  # DDP keeps what it sums gradients in
    unet_inputs = partial(_unet_inputs, config, text)
    precision = "bf16" if config.run.precision == "auto" else config.run.precision
    encoded, sampled, decoded, overlap = _batch_sizes(config, processes, accumulation.images)
    encoding, decoding = autoencoder_memory(vae, config, encoded, decoded)
    training = unet_memory(unet, partial(unet_inputs, accumulation.images), precision, stage.gradient_checkpointing)
    sampling = sum(unet_memory(unet, partial(unet_inputs, sampled), "no", training=False))  # not under autocast
    if (data.cache == "none" or data.streaming) and encoding > sum(training):  # just before a pass
        training = Peak(0, encoding)
    exported, largest, activity = _largest_between_steps(exported, sampling, decoding, encoding, overlap)

    recomputed = ", computed again in the backward pass" if stage.gradient_checkpointing else ""
    frozen, vaes = 4 * text.frozen, 4 * sum(p.numel() for p in vae.parameters())
    averages_of = "average of the weights" if averages == 1 else f"{averages} averages of the weights"
    precision_of_base = {"no": "float32"}.get(config.finetune.base_precision, config.finetune.base_precision)
    rows = (
        Row(f"frozen weights, {precision_of_base}{part}", base, base),
        Row("one layer's weights, dequantised", dequantised, dequantised),
        Row(f"{'trained ' if base else ''}weights, float32{part}", weights, weights),
        Row(f"gradients, float32{part if gradients == weights else ''}", gradients, kept),
        Row(f"moments of {stage.optimizer}{part}", moments, moments),
        Row(f"{averages_of}{part}", averages * weights, averages * weights),
        Row("weights gathered, gradients reduced, at most", gathered, 0),
        Row("all weights, for the export", 0, exported),  # sampling before that gathers less
        Row("text encoder", frozen, frozen),
        Row("autoencoder", vaes, vaes),
        Row(f"weights in {precision}, during a pass", training.copies, 0),
        Row(f"activations of {accumulation.images} images{recomputed}", training.others, 0),
        Row(activity, 0, largest),
    )
    counted = tuple(row for row in rows if row.step or row.between)
    return MemoryEstimate(counted, tuple(_not_counted(config, text, sharded)))


def freeze(unet: UNet, finetune: FinetuneConfig) -> tuple[int, int]:
    """Freezes a U-Net on the meta device and gives it the adapter that it is trained with.

    Returns the bytes of its frozen weights, and of the largest layer's, which are dequantised for its computation.
    """
    if finetune.kind == "full":
        return 0, 0
    frozen, dequantised = base_bytes(unet, finetune.base_precision), 0
    if finetune.base_precision in QUANTISED:  # computed in bf16
        layers = (unet.get_submodule(name) for name in target_layers(unet, "linear"))
        dequantised = 2 * max(layer.weight.numel() for layer in layers if isinstance(layer, nn.Linear))
    dtype = DTYPES.get(finetune.base_precision, torch.bfloat16)
    nn.Module.to(unet, dtype).requires_grad_(False)  # diffusers' own `to` warns
    if finetune.adapter:
        add_adapter(unet, AdapterSpec.of(finetune))
    return frozen, dequantised


def _largest_between_steps(
    exported: int, sampling: int, decoding: int, encoding: int, overlap: bool
) -> tuple[int, int, str]:
    """What takes most memory between steps: the weights that are exported for it, its own memory, and its name."""
    activities = [(exported, sampling, "sampling"), (exported, decoding, "decoding images")]
    if overlap:
        activities.append((exported, sampling + decoding, "decoding images while sampling others"))
    activities.append((0, encoding, "encoding images"))
    return max(activities, key=lambda memory: memory[0] + memory[1])


def _not_counted(config: Config, text: plan.TextEncoderSizes, sharded: bool) -> Iterator[str]:
    yield "CUDA itself, workspaces of its libraries, fragmentation; leave 2 GB"
    if config.stage2.text and not (text.frozen or text.trained):
        yield f"the text encoder, {config.text.model}, whose size is not known here"
    elif text.trained:
        yield f"activations{' and gathered blocks' if sharded else ''} of the text encoder, which is trained too"
    if config.finetune.text_encoder:
        yield "the text encoder's adapter, and activations of the text encoder"
    elif config.finetune.kind == "inversion":
        yield "activations of the text encoder"
    if config.stage2.attention_backend == "eager":
        yield "matrices of all pairs, which stage2.attention_backend=eager keeps"
    if config.stage2.compile:
        yield "what stage2.compile saves"
    if config.stage2.optimizer not in ("adamw", "adamw8bit"):
        yield f"copies of gradients that {config.stage2.optimizer} takes during its step, after activations are freed"
    if config.stage2.evaluate and config.stage2.evaluate.network != "latents":
        yield f"the feature network of stage2.evaluate, {config.stage2.evaluate.network}"
    if sharded:
        yield "other settings of FSDP than those of configs/accelerate/fsdp.yaml"
    elif sharding.sharding_kind() == "deepspeed":
        yield "what deepspeed shards over the processes, or takes for it"


def _batch_sizes(config: Config, processes: int, images: int) -> tuple[int, int, int, bool]:
    """Images encoded at once; those that the U-Net computes between steps, guided ones twice; those decoded at once;
    and whether that happens while the next ones are sampled."""
    stage, sample = config.stage2, config.sample
    share = -(-sheet_images(config) // processes)
    batch = min(SHEET_BATCH, images, share)
    conditional = stage.text or stage.classes
    guided = sample.guidance != 1 and conditional
    sampled, overlap = max(2 * batch if guided else batch, min(VALIDATION_BATCH, images)), share > batch
    if evaluate := stage.evaluate:  # which draws so many at once, whatever the device_batch
        guided = (evaluate.guidance or sample.guidance) != 1 and conditional
        sampled, batch = max(sampled, 2 * evaluate.batch if guided else evaluate.batch), max(batch, evaluate.batch)
    return max(ENCODING_BATCH, images), sampled, max(1, batch), overlap


def moments_memory(sizes: Iterable[int], training: Training) -> int:
    """Bytes of the tensors of AdamW and others that treat elements alike, for parameters of such `sizes`."""
    if training.optimizer == "adamw":
        return sum(2 * 4 * n + 4 for n in sizes)  # and the number of its steps
    if training.optimizer == "adamw8bit":
        return sum(2 * (4 * n if n < SMALL else n + 4 * math.ceil(n / BLOCK)) for n in sizes)
    return sum(4 * COPIES[training.optimizer] * n for n in sizes)


def shapes_moments_memory(shapes: Iterable[torch.Size], hidden: Iterable[bool], training: Training) -> int:
    """The same for unsharded parameters of such `shapes`, of any optimizer; `hidden` are those that Muon itself trains.

    A few scalars of the whole are left out.
    """
    if training.optimizer == "muon":
        return sum(4 * (1 if muon else 2) * shape.numel() for shape, muon in zip(shapes, hidden, strict=True))
    if training.optimizer == "adafactor":  # a mean over the last dimension and one over that before
        factors = (
            sum(shape.numel() // side for side in shape[-2:]) if len(shape) > 1 else shape.numel() for shape in shapes
        )
        return sum(4 * n for n in factors)
    return moments_memory((shape.numel() for shape in shapes), training)


def _moments(unet: UNet, text: plan.TextEncoderSizes, sizes: Iterable[int], training: Training) -> int:
    """Bytes of the optimizer's tensors, of shards of such `sizes`; a trained text encoder is counted as AdamW's."""
    if training.optimizer not in ("muon", "adafactor"):
        return moments_memory(sizes, training)
    hidden, parameters = hidden_matrices(unet), [p for p in unet.parameters() if p.requires_grad]  # never sharded
    shapes = [*(p.shape for p in parameters), *text.trained]
    return shapes_moments_memory(
        shapes, [*(id(p) in hidden for p in parameters), *(False for _ in text.trained)], training
    )


def shard_size(shape: torch.Size, processes: int) -> int:
    """Elements of the first process's shard of a tensor of this shape, which FSDP cuts along the first dimension.

    Where the rows can't be divided evenly, other shards have fewer; those of the weights are padded to this size.
    """
    return math.ceil(shape[0] / processes) * math.prod(shape[1:]) if shape else 1


def fsdp_memory(unet: UNet, processes: int, accumulation_steps: int) -> int:
    """Bytes that FSDP takes in a forward and backward pass besides the shards, at most.

    Weights are gathered, and gradients reduced, in float32: a block at a time, and from a pass's beginning to its end
    what is outside the blocks. The backward pass holds a block and the next one, which is being gathered, the gradients
    of the block and those of the previous one, which are being reduced. The forward pass holds less: a block, twice
    while it is copied from what was gathered. Not all of it is held at the peak of the activations, so this is an upper
    bound. Gradients that accumulate are whole anyway; of them only a block's copy, which is being reduced, is added.
    """

    def sizes(trained: bool) -> tuple[int, int]:
        """Bytes outside the blocks, and of the largest block, of all or of the trained parameters."""

        def size(module: nn.Module) -> int:
            parameters = [p for p in module.parameters() if p.requires_grad or not trained]
            return processes * sum(p.element_size() * shard_size(p.shape, processes) for p in parameters)

        blocks = [size(module) for module in unet.modules() if isinstance(module, FSDP_BLOCKS)]
        return size(unet) - sum(blocks), max(blocks, default=0)

    outside, largest = sizes(trained=False)
    trained_outside, trained_largest = sizes(trained=True)
    reduced = trained_largest if accumulation_steps > 1 else trained_outside + 2 * trained_largest
    return outside + 2 * largest + reduced


# ------------------------------------------------------------------------------------------------- what takes memory


def _unet_inputs(
    config: Config, text: plan.TextEncoderSizes, count: int
) -> tuple[torch.Tensor, torch.Tensor, Condition]:
    """x, t and condition of `count` images."""
    stage, channels, side = config.stage2, config.stage1.latent_channels, config.data.size // config.stage1.factor
    length = text.length if isinstance(text.length, int) else 77
    image_channels = input_channels(stage, channels) - channels
    empty = partial(torch.empty, device="meta")
    numbers = empty(count, dtype=torch.int64)
    condition = Condition(
        text=empty(count, length, text.width) if stage.text else None,
        label=numbers if stage.classes or "upscale" in stage.conditions else None,
        sizes=empty(count, 6) if stage.sizes else None,
        image=empty(count, image_channels, side, side) if image_channels else None,
        pooled=empty(count, text.pooled_width) if stage.text and text.pooled_width else None,
    )
    return empty(count, channels, side, side), numbers, condition


MakeInputs = Callable[[], tuple[torch.Tensor, torch.Tensor, Condition]]


def unet_memory(
    unet: UNet, make_inputs: MakeInputs, precision: str, checkpointing: bool = False, training: bool = True
) -> Peak:
    """Bytes of a forward pass, and, in training, of a backward pass that adds to gradients."""

    def recompute(block: nn.Module, *args: Any) -> Any:
        return checkpoint(
            block,
            *args,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), AsOnGPU(precision)),
        )

    unet.train(training)
    use_attention(unet, "sdpa", torch.device("cpu"))
    if checkpointing:
        unet.enable_gradient_checkpointing(recompute)
    existing = list(unet.parameters())
    for parameter in existing:
        parameter.grad = torch.empty_like(parameter) if training and parameter.requires_grad else None
    existing += [p.grad for p in existing if p.grad is not None]
    with torch.set_grad_enabled(training), MemoryTracker(existing) as tracker:
        x, t, condition = make_inputs()
        if condition.text is not None and not any(parameter.requires_grad for parameter in unet.parameters()):
            condition.text.requires_grad_(training)  # textual inversion learns it
        with AsOnGPU(precision):
            output = predict(unet, x, t, condition)
        if training:
            output.float().square().mean().backward()
    return tracker.peak


def autoencoder_memory(vae: autoencoder.Model, config: Config, encoded: int, decoded: int) -> tuple[int, int]:
    """Bytes of encoding so many images, and of decoding so many, besides the weights; 0 in pixel space."""
    size, stage = config.data.size, config.stage1
    if isinstance(vae, autoencoder.Identity):
        return 0, 0
    model = autoencoder.Autoencoder(vae)
    existing = [*vae.parameters(), *vae.buffers()]
    with MemoryTracker(existing) as encoding, AsOnGPU("no"):
        model.moments(torch.empty(encoded, 3, size, size, device="meta"))
    with MemoryTracker(existing) as decoding, AsOnGPU("no"):
        model.decode(
            torch.empty(decoded, stage.latent_channels, size // stage.factor, size // stage.factor, device="meta")
        )
    return sum(encoding.peak), sum(decoding.peak)
