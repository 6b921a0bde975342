"""A configuration checked, and its plan described, before anything is trained."""

from __future__ import annotations

import importlib.util
import math
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate.tracking import get_available_trackers
from torch import nn

from ldm.config.schema import Config, TextConfig, Training
from ldm.data import source_kinds
from ldm.distributed import sharding
from ldm.distributed.launch import accumulated, on_main, precision
from ldm.models import attention, autoencoder, compilation, feature_networks, text_encoder, unet
from ldm.training.diffusion_process import diffusion_process
from ldm.utils.errors import UserError

CLIP = {"openai/clip-vit-large-patch14": 123_060_480}
"""Parameters of text encoders that need not be on this machine: Stable Diffusion 1's."""


def describe(config: Config, processes: int = 1) -> str:
    """The plan of a run: data, both stages with parameter counts, how batches are computed, what is still missing."""
    stage1, stage2, size = config.stage1, config.stage2, config.data.size
    side = size // stage1.factor
    vae, network = networks(config)
    text = text_encoder_sizes(config.text) if stage2.text else NO_TEXT
    for key, name in (("stage1.pretrained", stage1.pretrained), ("stage1.init_from", stage1.init_from)):
        if name and Path(name).exists():
            check_autoencoder(config, key, name)
    trained = f"trained for {stage1.steps} steps of {stage1.batch}, lr {stage1.lr}"
    if stage1.init_from:
        trained = f"{stage1.train} of {stage1.init_from} {trained}"
    source = (
        f"loaded from {stage1.pretrained}"
        if stage1.pretrained
        else "nothing to train"
        if stage1.needs_none
        else trained
    )
    start = f", starting from {stage2.init_from}" if stage2.init_from else ""
    conditions = ", ".join(stage2.conditions) or "none"
    return "\n".join(
        [
            f"run      {config.run.dir}, seed {config.run.seed}, precision {config.run.precision}",
            f"data     {config.data.name}, {size} × {size} px{_presence(config)}",
            f"text     {config.text.model}: {text.length} tokens × {text.width}" if stage2.text else "text     none",
            f"stage 1  {stage1.model} autoencoder, {_millions(vae)} parameters, factor {stage1.factor}, "
            f"latents {stage1.latent_channels} × {side} × {side}; {source}",
            *([] if stage1.needs_none else _batch("stage1", stage1, processes)),
            f"stage 2  U-Net, {_millions(network)} parameters, conditions: {conditions}, "
            f"prediction_type {stage2.prediction_type}; {stage2.steps} steps of {stage2.batch}, lr {stage2.lr}{start}",
            *_batch("stage2", stage2, processes),
            f"samples  {config.sample.solver}, {config.sample.steps} steps, guidance {config.sample.guidance}",
        ]
    )


def _batch(stage: str, training: Training, processes: int) -> list[str]:
    """How a step's batch is computed, in a line; a batch that would be in larger parts, in another."""
    passes, most = accumulated(stage, training, processes), training.device_batch
    workers = f"{processes} process{'es' if processes > 1 else ''}"
    parts = f"{passes.steps} pass{'es' if passes.steps > 1 else ''} of {passes.images}"
    lines = [f"batch    {training.batch} images a step: {workers} × {parts}"]
    share = training.batch // processes
    if most and passes.steps > (fewest := math.ceil(share / most)) and 2 * passes.images < most:
        images = min(most, round(share / fewest))
        lines.append(
            f"         {stage}.batch: {processes * fewest * images} would be {fewest} passes of {images}, "
            f"nearer to {stage}.device_batch, {most}"
        )
    return lines


def networks(config: Config) -> tuple[nn.Module, nn.Module]:
    """Autoencoder and U-Net, on the meta device, which needs no memory, but for a U-Net that is loaded."""
    stage1, stage2, size = config.stage1, config.stage2, config.data.size
    text = text_encoder_sizes(config.text) if stage2.text else NO_TEXT
    with torch.device("meta"):
        vae = autoencoder.build(stage1, size)
    local = stage2.init_from and Path(stage2.init_from).exists()
    return vae, (unet.load if local else unet.build_empty)(
        stage2, stage1.latent_channels, size // stage1.factor, text.width, pooled_width=text.pooled_width
    )


def check(config: Config, processes: int) -> text_encoder.AnyTextEncoder | None:
    """UserError for whatever would stop the run later and can be known now; returns the text encoder."""
    stage1, stage2 = config.stage1, config.stage2
    accumulated("stage2", stage2, processes)
    sharding.check(stage2, config.run.precision, processes)
    source_kinds.check(config.data.source, config.data.streaming, stage2.conditions)
    on_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    if config.run.precision == "fp16" and not on_gpu:
        raise UserError("run.precision: fp16 needs a GPU; take bf16, or no")
    if not stage1.needs_none:
        accumulated("stage1", stage1, processes)
        if stage1.init_from:
            check_autoencoder(config, "stage1.init_from", stage1.init_from)
        if stage1.lpips:
            feature_networks.lpips(stage1.lpips_net, config.data.shortest // (4 if stage1.equivariance else 1))
        if stage1.gan and stage1.gan.norm == "batch" and not on_gpu and processes > 1:
            raise UserError("stage1.gan.norm: batch norm over several processes needs GPUs; take group")
    for key, stage in (("stage1", stage1), ("stage2", stage2)):
        if stage.optimizer == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
            raise UserError(f"{key}.optimizer: adamw8bit needs pip install 'ldm[8bit]'; or use adamw")
    tracker = config.run.tracker
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise UserError(f"run.tracker: {tracker} is not installed; pip install {tracker}, or take tensorboard, or none")
    attention.check_backend(stage2.attention_backend, on_gpu)
    if stage2.compile and stage2.attention_backend == "xformers" and precision(config.run) != "no":
        raise UserError(compilation.NO_XFORMERS)
    if stage1.pretrained:
        check_autoencoder(config, "stage1.pretrained", stage1.pretrained)
    encoder = text_encoder.of(config.text) if stage2.text else None
    widths = (encoder.width, 0, encoder.pooled_width) if encoder else ()
    shape = (stage1.latent_channels, config.data.size // stage1.factor, *widths)
    if stage2.init_from:
        unet.load(stage2, *shape)
        if not (stage1.needs_none or stage1.init_from or (config.run.dir / "autoencoder").exists()):
            raise UserError(
                f"stage2.init_from: {stage2.init_from} was trained in the latents of its own autoencoder, and stage "
                "one would train another; set stage1.pretrained, to the same where it is a whole pipeline or checkpoint"
            )
        on_main(lambda: _check_noise(config))
    else:
        unet.build_empty(stage2, *shape)
    return encoder


def _check_noise(config: Config) -> None:
    """Warns where the noise schedule differs from the one that the U-Net to start from was trained with."""
    stage2, process = config.stage2, diffusion_process(config.stage2)
    pretrained = unet.scheduler_of(str(stage2.init_from))
    if pretrained is None or process.prediction_type == "flow":
        return
    alpha_bar = process.chain().alpha_bar.float()
    if len(alpha_bar) != len(pretrained.alphas_cumprod):
        differ = f"{len(alpha_bar)} steps, not {len(pretrained.alphas_cumprod)}"
    elif (off := float((alpha_bar.sqrt() - pretrained.alphas_cumprod.sqrt()).abs().max())) > 0.01:
        differ = f"√ᾱ up to {off:.2f} apart"
    else:
        return
    print(
        f"stage2.beta_schedule: {stage2.init_from} was trained with other noise levels ({differ}); "
        "is that intended? stage2.beta_schedule, .timesteps, .zero_snr and .shift decide them",
        file=sys.stderr,
        flush=True,
    )


def check_autoencoder(config: Config, key: str, name: str) -> None:
    """UserError where the autoencoder to load is not one as `stage1` describes it."""
    stage1, loaded = config.stage1, autoencoder.load(name, key)
    for key_name, configured, actual in (
        ("stage1.model", autoencoder.FAMILIES[stage1.family], type(loaded.vae).__name__),
        ("stage1.latent_channels", stage1.latent_channels, loaded.channels),
        ("stage1.channels (its factor)", stage1.factor, loaded.factor),
    ):
        if configured != actual:
            raise UserError(f"{key_name}: {configured}, but {name} has {actual}; set it to that")


def check_on_images(config: Config, pixels: torch.Tensor, device: torch.device) -> None:
    """UserError where a pretrained autoencoder expects pixels in [0, 1], or its output is not finite.

    `pixels` `(N, 3, H, W)` in [-1, 1]. Warns where it reconstructs them worse than a single colour would.
    """

    def error(rebuilt: torch.Tensor) -> float:
        return float((rebuilt.cpu() - pixels).square().mean())

    stage1 = config.stage1
    key, name = (
        ("stage1.pretrained", stage1.pretrained) if stage1.pretrained else ("stage1.init_from", stage1.init_from)
    )
    if not name or (stage1.init_from and stage1.train == "all"):
        return
    loaded = autoencoder.load(name, key).to(device)
    reconstructed = error(loaded.decode(loaded.encode(pixels)))
    from_0_to_1 = error(loaded.decode(loaded.encode(pixels / 2 + 0.5)) * 2 - 1)
    flat = error(pixels.mean((2, 3), keepdim=True).expand_as(pixels))
    message = f"{key}: {name} reconstructs images with a mean squared error of {reconstructed:.3g}"
    if not math.isfinite(reconstructed):
        raise UserError(f"{message}: its weights are broken; take another")
    if from_0_to_1 < min(reconstructed, flat) / 2:
        raise UserError(f"{message}, and {from_0_to_1:.3g} with pixels in [0, 1]: it was trained so; take another")
    if reconstructed > max(flat, 0.01):
        print(
            f"{message}, and a single colour would have {flat:.3g}; is it the right one?", file=sys.stderr, flush=True
        )


class TextEncoderSizes(NamedTuple):
    """Of a text encoder before training; no parameters of one that is not on this machine."""

    width: int
    length: int | str
    frozen: int
    """Its parameters that are not trained."""
    trained: tuple[int, ...]
    """The elements of each trained one."""
    pooled_width: int = 0
    """Channels of the pooled embedding; 0 where there is none."""


NO_TEXT = TextEncoderSizes(0, 0, 0, ())


@cache
def text_encoder_sizes(config: TextConfig) -> TextEncoderSizes:
    """Loads the text encoder where it is on this machine, or where `text.width` is not set."""
    if config.width and not Path(config.model).is_dir():
        length = config.max_tokens * config.chunks if config.max_tokens else "all its"
        return TextEncoderSizes(config.width, length, 0 if config.train else CLIP.get(config.model, 0), ())
    with torch.device("cpu"):
        encoder = text_encoder.of(config)
    trained: tuple[int, ...] = ()
    if config.train and isinstance(encoder, text_encoder.TextEncoder):
        trained = tuple(p.numel() for p in encoder.trainable())
    total = sum(p.numel() for model in encoder.models for p in model.parameters())
    return TextEncoderSizes(encoder.width, encoder.length, total - sum(trained), trained, encoder.pooled_width)


def _presence(config: Config) -> str:
    try:
        source_kinds.check(config.data.source, conditions=config.stage2.conditions)
    except UserError as error:
        if any(Path(source.path).exists() for source in config.data.source):
            return f" ({error})"
        return " (not here yet: a folder of captioned images goes there)"
    return ""


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M"
