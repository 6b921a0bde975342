"""What a configuration would train: checked and counted before anything is trained."""

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
from ldm.data import sources
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed import sharding
from ldm.distributed.launch import accumulated, on_main, precision
from ldm.models import attention, autoencoder, compilation, feature_networks, text_encoder, unet
from ldm.utils.errors import UserError

CLIP = {"openai/clip-vit-large-patch14": 123_060_480}
"""Parameters of a text encoder that is not here: Stable Diffusion 1's."""


def describe(config: Config, processes: int = 1) -> str:
    """The plan of a run: data, both stages with parameter counts and how batches are computed, what is not here yet."""
    one, two, size = config.stage1, config.stage2, config.data.size
    side = size // one.factor
    vae, network = networks(config)
    words = text_facts(config.text) if two.text else NO_TEXT
    for key, given in (("stage1.pretrained", one.pretrained), ("stage1.init_from", one.init_from)):
        if given and Path(given).exists():
            check_autoencoder(config, key, given)
    trained = f"trained for {one.steps} steps of {one.batch}, lr {one.lr}"
    if one.init_from:
        trained = f"{one.train} of {one.init_from} {trained}"
    made = f"loaded from {one.pretrained}" if one.pretrained else "nothing to train" if one.needs_none else trained
    start = f", starting from {two.init_from}" if two.init_from else ""
    return "\n".join(
        [
            f"run      {config.run.dir}, seed {config.run.seed}, precision {config.run.precision}",
            f"data     {config.data.name}, {size} × {size} px{_presence(config)}",
            f"text     {config.text.model}: {words.length} tokens × {words.width}" if two.text else "text     none",
            f"stage 1  {one.model} autoencoder, {_millions(vae)} parameters, factor {one.factor}, "
            f"latents {one.latent_channels} × {side} × {side}; {made}",
            *([] if one.needs_none else _batch("stage1", one, processes)),
            f"stage 2  U-Net, {_millions(network)} parameters, given {', '.join(two.conditions) or 'nothing'}, "
            f"target {two.prediction_type}; {two.steps} steps of {two.batch}, lr {two.lr}{start}",
            *_batch("stage2", two, processes),
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
    one, two, size = config.stage1, config.stage2, config.data.size
    width = text_facts(config.text).width if two.text else 0
    with torch.device("meta"):
        vae = autoencoder.build(one, size)
    here = two.init_from and Path(two.init_from).exists()
    return vae, (unet.load if here else unet.build_empty)(two, one.latent_channels, size // one.factor, width)


def check(config: Config, processes: int) -> text_encoder.TextEncoder | None:
    """Whatever can be known before training to stop a run later is a UserError here; returns the text encoder."""
    one, two = config.stage1, config.stage2
    accumulated("stage2", two, processes)
    sharding.check(config, processes)
    sources.check(config.data.source, config.data.streaming, two.conditions)
    on_gpu = torch.cuda.is_available() and config.run.device != "cpu"
    if config.run.precision == "fp16" and not on_gpu:
        raise UserError("run.precision: fp16 needs a GPU; take bf16, or no")
    if not one.needs_none:
        accumulated("stage1", one, processes)
        if one.init_from:
            check_autoencoder(config, "stage1.init_from", one.init_from)
        if one.lpips:
            feature_networks.lpips(one.lpips_net, config.data.shortest // (4 if one.equivariance else 1))
        if one.gan and one.gan.norm == "batch" and not on_gpu and processes > 1:
            raise UserError("stage1.gan.norm: batch norm over several processes needs GPUs; take group")
    for key, stage in (("stage1", one), ("stage2", two)):
        if stage.optimizer == "adamw8bit" and not importlib.util.find_spec("bitsandbytes"):
            raise UserError(f"{key}.optimizer: adamw8bit needs pip install 'ldm[8bit]'; or use adamw")
    tracker = config.run.tracker
    if tracker != "none" and tracker not in map(str, get_available_trackers()):
        raise UserError(f"run.tracker: {tracker} is not installed; pip install {tracker}, or take tensorboard, or none")
    attention.check_backend(two.attention_backend, on_gpu)
    if two.compile and two.attention_backend == "xformers" and precision(config.run) != "no":  # float32 goes by sdpa
        raise UserError(compilation.NO_XFORMERS)
    if one.pretrained:
        check_autoencoder(config, "stage1.pretrained", one.pretrained)
    encoder = text_encoder.of(config.text) if two.text else None
    shape = one.latent_channels, config.data.size // one.factor, encoder.width if encoder else 0
    if two.init_from:
        unet.load(two, *shape)
        if not (one.needs_none or one.init_from or (config.run.dir / "autoencoder").exists()):
            raise UserError(
                f"stage2.init_from: {two.init_from} was trained in the latents of its own autoencoder, and stage one "
                "would train another; set stage1.pretrained, to the same where it is a whole pipeline or checkpoint"
            )
        on_main(lambda: _check_noise(config))
    else:
        unet.build_empty(two, *shape)
    return encoder


def _check_noise(config: Config) -> None:
    """Warns where noise levels are others than those that the U-Net to start from was trained with."""
    two, process = config.stage2, DiffusionProcess.of(config.stage2)
    theirs = unet.scheduler_of(str(two.init_from))
    if theirs is None or process.prediction_type == "flow":
        return
    ours = process.chain().alpha_bar.float()
    if len(ours) != len(theirs.alphas_cumprod):
        differ = f"{len(ours)} steps, not {len(theirs.alphas_cumprod)}"
    elif (off := float((ours.sqrt() - theirs.alphas_cumprod.sqrt()).abs().max())) > 0.01:
        differ = f"√ᾱ up to {off:.2f} apart"
    else:
        return
    print(
        f"stage2.beta_schedule: noise levels other than those that {two.init_from} was trained with ({differ}); "
        "is that meant? stage2.beta_schedule, .timesteps, .zero_snr and .shift decide them",
        file=sys.stderr, flush=True,
    )  # fmt: skip


def check_autoencoder(config: Config, key: str, name: str) -> None:
    """UserError where the autoencoder to load is not one as `stage1` describes it."""
    one, loaded = config.stage1, autoencoder.load(name, key)
    for described, configured, found in (
        ("stage1.model", autoencoder.FAMILIES[one.family], type(loaded.vae).__name__),
        ("stage1.latent_channels", one.latent_channels, loaded.channels),
        ("stage1.channels (its factor)", one.factor, loaded.factor),
    ):
        if configured != found:
            raise UserError(f"{described}: {configured}, but {name} has {found}; set it to what is loaded")


def check_on_pictures(config: Config, pixels: torch.Tensor, device: torch.device) -> None:
    """UserError where an autoencoder whose latents will be used is for values from 0 to 1, or gives what is not finite.

    `pixels` `(N, 3, H, W)` in [-1, 1]. One that gives them back worse than one colour would is only warned of.
    """

    def error(rebuilt: torch.Tensor) -> float:
        return float((rebuilt.cpu() - pixels).square().mean())

    one = config.stage1
    key, name = ("stage1.pretrained", one.pretrained) if one.pretrained else ("stage1.init_from", one.init_from)
    if not name or (one.init_from and one.train == "all"):
        return
    loaded = autoencoder.load(name, key).to(device)
    found = error(loaded.decode(loaded.encode(pixels)))
    other = error(loaded.decode(loaded.encode(pixels / 2 + 0.5)) * 2 - 1)
    flat = error(pixels.mean((2, 3), keepdim=True).expand_as(pixels))
    said = f"{key}: {name} gives pictures back with a mean squared error of {found:.3g}"
    if not math.isfinite(found):
        raise UserError(f"{said}: its weights are broken; take another")
    if other < min(found, flat) / 2:
        raise UserError(f"{said}, and {other:.3g} if they are given from 0 to 1: it was trained so; take another")
    if found > max(flat, 0.01):
        print(f"{said}, and one colour would have {flat:.3g}; is it the right one?", file=sys.stderr, flush=True)


class TextFacts(NamedTuple):
    """What is known of a text encoder before training; no parameters of one that is not here."""

    width: int
    length: int | str
    frozen: int
    """Its parameters that are not trained."""
    trained: tuple[int, ...]
    """The elements of each that is."""


NO_TEXT = TextFacts(0, 0, 0, ())


@cache
def text_facts(wanted: TextConfig) -> TextFacts:
    """What a configuration asks for; it is loaded where it is here, or where its width is not told."""
    if wanted.width and not Path(wanted.model).is_dir():
        length = wanted.max_tokens * wanted.chunks if wanted.max_tokens else "all its"
        return TextFacts(wanted.width, length, 0 if wanted.train else CLIP.get(wanted.model, 0), ())
    with torch.device("cpu"):
        found = text_encoder.of(wanted)
    trained = tuple(p.numel() for p in found.trainable()) if wanted.train else ()
    every = sum(p.numel() for p in found.model.parameters())
    return TextFacts(found.width, found.length, every - sum(trained), trained)


def _presence(config: Config) -> str:
    try:
        sources.check(config.data.source, conditions=config.stage2.conditions)
    except UserError as error:
        if any(Path(source.path).exists() for source in config.data.source):
            return f" ({error})"
        return " (not here yet: a folder of captioned pictures goes there)"
    return ""


def _millions(model: nn.Module) -> str:
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:,.2f} M"
