"""The plan of a run, in text: what would be trained, with the sizes of its networks, before anything is."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from ldm.config.schema import Config, TextConfig, Training
from ldm.data import source_kinds
from ldm.distributed.launch import accumulated
from ldm.models import autoencoder, text_encoder, unet
from ldm.models.adapters.inject import AdapterSpec, add_adapter
from ldm.training import checks
from ldm.utils.errors import UserError

CLIP = {
    "openai/clip-vit-large-patch14": 123_060_480,
    "stable-diffusion-v1-5/stable-diffusion-v1-5": 123_060_480,
    "stabilityai/stable-diffusion-xl-base-1.0": 123_060_480 + 694_659_840,
}
"""Parameters of text encoders that need not be on this machine: those of Stable Diffusion 1 and XL."""


def describe(config: Config, processes: int = 1) -> str:
    """The plan of a run: data, both stages with parameter counts, how batches are computed, what is still missing."""
    stage1, stage2, size = config.stage1, config.stage2, config.data.size
    side = size // stage1.factor
    vae, network = networks(config)
    text = text_encoder_sizes(config.text) if stage2.text else NO_TEXT
    for key, name in (("stage1.pretrained", stage1.pretrained), ("stage1.init_from", stage1.init_from)):
        if name and Path(name).exists():
            checks.check_autoencoder(config, key, name)
    trained = f"trained for {stage1.steps} steps of {stage1.batch}, {_rate(stage1)}"
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
    parameters, tuned = f"{_millions(network)} parameters", _tuned(config, network)
    conditions = ", ".join(stage2.conditions) or "none"
    return "\n".join(
        [
            f"run      {config.run.dir}, seed {config.run.seed}, precision {config.run.precision}",
            f"data     {config.data.name}, {size} × {size} px{_presence(config)}",
            f"text     {config.text.model}: {text.length} tokens × {text.width}" if stage2.text else "text     none",
            f"stage 1  {stage1.model} autoencoder, {_millions(vae)} parameters, factor {stage1.factor}, "
            f"latents {stage1.latent_channels} × {side} × {side}; {source}",
            *([] if stage1.needs_none else _batch("stage1", stage1, processes)),
            f"stage 2  U-Net, {parameters}, conditions: {conditions}, "
            f"prediction_type {stage2.prediction_type}; {stage2.steps} steps of {stage2.batch}, {_rate(stage2)}{start}",
            *([f"         {tuned}"] if tuned else []),
            *_batch("stage2", stage2, processes),
            f"samples  {config.sample.solver}, {config.sample.steps} steps, guidance {config.sample.guidance}",
            *_figures(config),
        ]
    )


def _tuned(config: Config, network: nn.Module) -> str:
    """What of the U-Net's model is trained, where that isn't all; the network gets the adapter."""
    finetune = config.finetune
    if finetune.kind == "full":
        return ""
    if finetune.kind == "inversion":
        return f"frozen; trained is the embedding of {finetune.token}, {finetune.vectors} × the text encoder's width"
    layers = add_adapter(network.to("meta"), AdapterSpec.of(finetune))
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    also = " and the text encoder" if finetune.text_encoder else ""
    return (
        f"frozen, with a {finetune.kind} of rank {finetune.rank} on {len(layers)} layers, "
        f"{trained / 1e6:,.2f} M parameters{also}"
    )


def _figures(config: Config) -> list[str]:
    """Which figures of generated images are measured while it trains."""
    if not (evaluate := config.stage2.evaluate):
        return []
    metrics = ", ".join(evaluate.metrics)
    return [f"figures  {metrics} of {evaluate.images} images by {evaluate.network}, every {evaluate.every} steps"]


def _rate(training: Training) -> str:
    """The learning rate, and whose, where it is not AdamW's."""
    if training.optimizer == "adamw":
        return f"lr {training.lr}"
    of_matrices = f"{training.muon_lr} and " if training.optimizer == "muon" and training.muon_lr else ""
    return f"{training.optimizer}, lr {of_matrices}{training.lr}"


def _batch(stage: str, training: Training, processes: int) -> list[str]:
    """How a step's batch is computed, in a line; a batch that would be in larger parts, in another."""
    (steps, images), most = accumulated(stage, training, processes), training.device_batch
    workers = f"{processes} process{'es' if processes > 1 else ''}"
    parts = f"{steps} accumulation step{'s' if steps > 1 else ''} of {images} image{'s' if images > 1 else ''}"
    lines = [f"batch    {training.batch} images a step: {workers} × {parts}"]
    share = training.batch // processes
    if most and steps > (fewest := math.ceil(share / most)) and 2 * images < most:
        better = min(most, round(share / fewest))
        lines.append(
            f"         {stage}.batch: {processes * fewest * better} would be {fewest} accumulation steps of {better}, "
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


class TextEncoderSizes(NamedTuple):
    """Of a text encoder before training; no parameters of one that is not on this machine."""

    width: int
    length: int | str
    frozen: int
    """Its parameters that are not trained."""
    trained: tuple[torch.Size, ...]
    """The shapes of the trained ones."""
    pooled_width: int = 0
    """Channels of the pooled embedding; 0 where there is none."""


NO_TEXT = TextEncoderSizes(0, 0, 0, ())


@cache
def text_encoder_sizes(config: TextConfig) -> TextEncoderSizes:
    """Loads the text encoder where it is on this machine, or where `text.width` is not set."""
    if config.width and not (Path(config.base or config.model).is_dir() and Path(config.model).exists()):
        length = config.max_tokens * config.chunks if config.max_tokens else "all its"
        frozen = 0 if config.train else CLIP.get(config.model, 0)
        return TextEncoderSizes(config.width, length, frozen, (), config.pooled_width or 0)
    with torch.device("cpu"):
        encoder = text_encoder.of(config)
    trained: tuple[torch.Size, ...] = ()
    if config.train:
        trained = tuple(p.shape for p in encoder.trainable())
    total = sum(p.numel() for model in encoder.models for p in model.parameters())
    frozen = total - sum(shape.numel() for shape in trained)
    return TextEncoderSizes(encoder.width, encoder.length, frozen, trained, encoder.pooled_width)


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
