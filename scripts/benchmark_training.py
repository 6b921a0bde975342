"""Speed of stage two's training against the common example trainer: `scripts/benchmark.py train`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import reference_loop
import torch
from benchmark_autoencoder import load_autoencoder
from benchmark_rows import (
    Metrics,
    Report,
    Row,
    collect_metrics,
    data_sheet_flops,
    each_in_subprocess,
    parse_rows,
    seconds_per_step,
)

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import index
from ldm.data.index import Index
from ldm.distributed.launch import accelerator, join, precision
from ldm.models import text_encoder, unet
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import AnyTextEncoder
from ldm.training.throughput import TRAINING, forward_flops, matmul_peak
from ldm.utils.precision import DTYPES
from stage2_diffusion.train import train


def images_per_second(settings: Config, data: Index, vae: Autoencoder, encoder: AnyTextEncoder) -> float:
    """Speed of stage two's own loop."""
    return settings.stage2.batch / seconds_per_step(our_loop(settings, data, vae, encoder))


def our_loop(settings: Config, data: Index, vae: Autoencoder, encoder: AnyTextEncoder) -> Metrics:
    return collect_metrics(train, settings, data, vae, encoder)


LOOPS: dict[str, Callable[..., Metrics]] = {"reference": reference_loop.train, "ours": our_loop}


def compare_training(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a line per row: by default the reference with its defaults, with our precision, and our own loop."""
    settings = loader.load(args.config, overrides)
    stage, default, device = settings.stage2, precision(settings.run), join(settings.run).device
    reference_loop.check(settings, "train")
    rows = parse_rows(args.rows or "reference-no,reference,ours", tuple(LOOPS), default)
    if not settings.data.cache_dir:
        overrides = [*overrides, f"data.cache_dir={settings.run.dir}/cache"]
    flops = TRAINING * unet_flops(settings)
    print(
        f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {settings.data.size} px, "
        f"batch {stage.batch}, {flops / 1e9:,.2f} GFLOP to train the U-Net on an image",
        flush=True,
    )
    report = Report.of("training", "img/s", args)
    for row, measured, memory in each_in_subprocess(partial(_measure, args.config, overrides), rows):
        rate = measured.pop("rate")
        utilisation = _utilisation(rate * flops, measured["peak"], row.precision)
        text = _describe(rate * flops, utilisation, memory.allocated or 0.0, measured, row.precision)
        shares = {key: share for key, _, share in utilisation}
        report.row(row.name, rate, text, memory, flops=rate * flops, **measured, **shares)
    reference, ours = (report.values.get(f"{name}, {default}") for name in ("reference", "ours"))
    if reference and ours:
        print(f"training in the same precision, ours is {ours / reference:.2f} × the reference")


def _utilisation(flops: float, matmul_flops: float, precision: str) -> list[tuple[str, float, float]]:
    """Name, peak in FLOP/s, and the share of it that `flops`, in FLOP/s, is; of each peak that is known."""
    peaks = (("mfu", matmul_flops), ("mfu_of_data_sheet", data_sheet_flops(precision)))
    return [(key, peak, flops / peak) for key, peak in peaks if peak]


def _describe(
    flops: float,
    utilisation: list[tuple[str, float, float]],
    allocated: float,
    measured: dict[str, float],
    precision: str,
) -> str:
    """The end of a row's line."""
    text = f"{flops / 1e9:10,.1f} GFLOP/s"
    for key, peak, share in utilisation:
        text += f", {share:4.0%} of {'' if key == 'mfu' else 'the data sheet’s '}{peak / 1e9:,.1f}"
    text += f" {allocated:9,.0f} MB"
    if precision == "fp16":
        text += f", {measured['skipped']:.0f} steps skipped, loss scale {measured['loss_scale']:,.0f}"
    if "waiting" in measured:
        text += f", {measured['waiting']:.1%} waiting"
    return text


def _measure(config: Path, overrides: list[str], row: Row) -> dict[str, float]:
    """Images per second, the device's peak in FLOP/s, the share of waiting, fp16's skipped steps and loss scale."""
    settings = loader.load(config, [*overrides, *row.overrides, f"run.precision={row.precision}"])
    peak = matmul_peak(accelerator(settings.run).device, DTYPES[row.precision])
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train")
    metrics = LOOPS[row.subject](settings, data, load_autoencoder(settings), text_encoder.of(settings.text))
    measured = {"rate": settings.stage2.batch / seconds_per_step(metrics), "peak": peak}
    if waiting := [line["waiting"] for line in metrics[2:] if "waiting" in line]:
        measured["waiting"] = median(waiting)
    return measured | {key: metrics[-1][key] for key in ("skipped", "loss_scale")}


def unet_flops(settings: Config) -> float:
    """FLOPs of one image's forward."""
    encoder = text_encoder.of(settings.text)
    channels, side = settings.stage1.latent_channels, settings.data.size // settings.stage1.factor
    with torch.device("meta"):
        x, t = torch.empty(1, channels, side, side), torch.empty(1)
        states = torch.empty(1, encoder.length, encoder.width)
    network: Any = unet.build_empty(settings.stage2, channels, side, encoder.width)
    return forward_flops(network, x, t, states)
