"""Speed of reading and encoding data: `scripts/benchmark.py data`."""

from __future__ import annotations

import argparse
import itertools
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from benchmark_autoencoder import load_autoencoder
from benchmark_rows import Report
from benchmark_training import images_per_second

from ldm.config import loader
from ldm.data import index, read_ahead
from ldm.data.cache import CacheOptions
from ldm.data.dataset import Stage2Dataset, stage2_dataset
from ldm.data.sampler import Positions, SampleSpec
from ldm.distributed.launch import accelerator
from ldm.models import text_encoder

WORKERS = (0, 1, 2, 4)


def compare_data_loading(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a line per measurement, with its ratio to the first."""
    settings = loader.load(args.config, [*overrides, "data.latents=sample"])
    device, seconds = accelerator(settings.run).device, args.seconds
    vae = load_autoencoder(settings).to(device)
    encoder = text_encoder.of(settings.text).to(device)
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train")
    print(f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {settings.data.size} px")

    stage, reading = settings.stage2, Report.of("samples", "/s", args)
    spec = SampleSpec.of(settings.data, stage.batch, settings.run.seed, stage.cond_dropout)

    def dataset(cache: CacheOptions | None) -> Stage2Dataset:
        return stage2_dataset(data, spec, cache, vae, encoder, device, stage.image)

    reading.row("decoded and encoded on the fly", samples_per_second(dataset(None), stage.batch, 0, seconds))
    cache = CacheOptions.of(settings.data, settings.cache_dir)
    cached = dataset(cache)
    for workers, state in itertools.product(WORKERS, ("cold", "warm")):
        if state == "cold":
            drop_from_page_cache(settings.cache_dir)
            cached = dataset(cache)
            drop_from_page_cache(settings.cache_dir)  # opening the cache read its checksums
        rate = samples_per_second(cached, stage.batch, workers, seconds)
        reading.row(f"from the cache, {state}, {workers} workers", rate)

    training = Report.of("training", "img/s", args)
    live_keys = ["data.latents=sample", "data.cache=none", f"run.dir={settings.run.dir / 'live'}"]
    live = loader.load(args.config, [*overrides, *live_keys])
    training.row("encoding on the fly", images_per_second(live, data, vae, encoder))
    training.row("from the cache", images_per_second(settings, data, vae, encoder))


def samples_per_second(dataset: Stage2Dataset, batch: int, workers: int, seconds: float) -> float:
    """Speed of encoded samples, in stage two's batches, after the first batch."""

    def batch_sizes() -> Iterator[int]:
        positions = Positions(0, 1_000_000, batch, 1, 0, 1)
        for samples in read_ahead.data_loader(dataset.dataset, positions, workers, prefetch_factor=2):  # type: ignore[arg-type]
            x0, _ = dataset.encode(samples)
            yield len(x0)

    sizes = batch_sizes()
    next(sizes)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        count += next(sizes)
    return count / (time.perf_counter() - start)


def drop_from_page_cache(folder: Path) -> None:
    """Asks the system to drop the folder's safetensors files from its page cache, as after a restart."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
