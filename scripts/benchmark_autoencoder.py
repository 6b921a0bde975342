"""Speed and memory of the autoencoder: `scripts/benchmark.py stage1` and `scripts/benchmark.py tiles`."""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import torch
from benchmark_rows import (
    Report,
    Row,
    collect_metrics,
    each_in_subprocess,
    in_subprocess,
    parse_rows,
    reset_peak,
    seconds_per_step,
)

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import images, index
from ldm.data.crops import crop_resize
from ldm.distributed.launch import accelerator, precision
from ldm.models import autoencoder
from stage1_vae.train import train

VARIANTS = {
    "plain": [],
    "recomputing": ["stage1.gradient_checkpointing=true"],
    "discriminator": ["stage1.gan.start=0", "stage1.gan.warmup=0"],
}


def load_autoencoder(settings: Config) -> autoencoder.Autoencoder:
    """The configuration's pretrained autoencoder, else one with random weights."""
    torch.manual_seed(0)
    stage = settings.stage1
    if stage.pretrained:
        return autoencoder.load(stage.pretrained)
    return autoencoder.Autoencoder(autoencoder.build(stage, settings.data.size))


def compare_stage1(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a line per variant of training, with its ratio to the first."""
    default = precision(loader.load(args.config, overrides).run)
    report = Report.of("stage 1", "img/s", args)
    rows = parse_rows(args.rows or ",".join(VARIANTS), tuple(VARIANTS), default)
    for row, rate, memory in each_in_subprocess(partial(_images_per_second, args.config, overrides), rows):
        report.row(row.name, rate, f"{memory.allocated:9,.0f} MB", memory)


def _images_per_second(config: Path, overrides: list[str], row: Row) -> float:
    own = [*VARIANTS[row.subject], *row.overrides, f"run.precision={row.precision}"]
    settings = loader.load(config, [*overrides, *own])
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    return settings.stage1.batch / seconds_per_step(collect_metrics(train, settings, data))


def compare_tiling(args: argparse.Namespace, overrides: list[str], side: int = 2048) -> None:
    """Prints memory and seconds of decoding at once and in tiles, and the difference of the results."""
    decoded, report = [], Report.of("decode", "images/s", args)
    for name, max_untiled in (("whole", 10**9), ("in tiles", autoencoder.MAX_UNTILED_SIDE)):
        (seconds, pixels), memory = in_subprocess(_decode, args.config, overrides, side, max_untiled)
        decoded.append(pixels)
        report.row(f"{side} px, {name}", 1 / seconds, f"{seconds:8.1f} s {memory.allocated:9,.0f} MB", memory)
    difference = (decoded[1] - decoded[0]).abs() * 127.5  # of 255
    print(f"decode   difference: mean {difference.mean():.2g}, largest {difference.max():.2g} of 255")


def _decode(config: Path, overrides: list[str], side: int, max_untiled: int) -> tuple[float, torch.Tensor]:
    """Seconds, and pixels `(1, 3, side, side)`; up to `max_untiled`² pixels are decoded at once."""
    settings = loader.load(config, overrides)
    device = accelerator(settings.run).device
    vae = load_autoencoder(settings)
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    image = images.to_tensor(crop_resize(data.load_image(0), (side, side))[0])[None]
    latents = vae.to(device).encode(image)
    autoencoder.MAX_UNTILED_SIDE = max_untiled
    reset_peak()
    start = time.perf_counter()
    pixels = vae.decode(latents).cpu()
    return time.perf_counter() - start, pixels
