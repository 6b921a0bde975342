"""How long a training step waits for its batch where some reads are slow: `scripts/benchmark.py latency`."""

from __future__ import annotations

import argparse
import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from benchmark_autoencoder import load_autoencoder
from benchmark_rows import Report, Row, parse_rows

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import archives, index
from ldm.data.cache import CacheOptions
from ldm.data.dataset import stage2_dataset
from ldm.data.encoding_store import EncodingStore
from ldm.data.read_ahead import start_reading
from ldm.data.sampler import Positions, SampleSpec
from ldm.distributed.launch import accelerator
from ldm.models import text_encoder
from ldm.training.loading import load_batches
from ldm.utils.rng import generator

DELAYS = ((0.001, 2.0), (0.01, 0.1))  # of a busy network folder: share of the reads and their seconds, longest first
MEDIAN = 0.001  # seconds of the others
PERCENTILES = (50, 99, 99.9, 100)
WORKERS = (2, 4, 8)
ROWS = [
    *("plain+data.workers=0", *(f"plain+data.workers={n}" for n in WORKERS)),
    *(f"ours+data.workers={n}" for n in WORKERS),
    *(f"ours+data.workers={n}+data.prefetch_factor={2 + 96 // n}" for n in WORKERS),
]
Item = dict[str, Any]


class Waits(NamedTuple):
    """Seconds that each step waited for its batch, `(N,)`, and those of a step."""

    seconds: np.ndarray
    step: float

    @property
    def steps_per_second(self) -> float:
        return 1 / (self.step + float(self.seconds.mean()))

    def percentiles(self) -> dict[str, float]:
        """Milliseconds."""
        names = [f"p{percentile:g}" if percentile < 100 else "max" for percentile in PERCENTILES]
        return dict(zip(names, (np.percentile(self.seconds, PERCENTILES) * 1000).tolist(), strict=True))


def compare_latency(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a line per row: steps per second, and percentiles of the waiting times."""
    settings = loader.load(args.config, overrides)
    rows = parse_rows(args.rows or ",".join(ROWS), ("plain", "ours"), "no")
    dataset = cached_dataset(settings)
    slow = ", ".join(f"{share:.1%} of {seconds:g} s" for share, seconds in reversed(DELAYS))
    print(
        f"machine  {os.cpu_count()} cores; steps of {args.step_seconds * 1000:g} ms, {settings.stage2.batch} samples; "
        f"reads of {MEDIAN * 1000:g} ms, {slow}; {args.steps} steps"
    )
    report = Report.of("latency", "steps/s", args)
    for row in rows:
        config = loader.load(args.config, [*overrides, *row.overrides])
        with slow_reads():
            waits = measure(row, config, _Seeded(dataset, settings.run.seed), args.step_seconds)
        figures = waits.percentiles()
        text = "waits " + ", ".join(f"{name} {value:,.0f}" for name, value in figures.items()) + " ms"
        report.row(row.name.replace(", no", ""), waits.steps_per_second, text, None, **figures)


def cached_dataset(settings: Config) -> torch.utils.data.Dataset[Item]:
    """The samples of stage two from the cache, which is written first."""
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train")
    spec = SampleSpec.of(settings.data, settings.stage2.batch, settings.run.seed, settings.stage2.cond_dropout)
    cache, encoder = CacheOptions.of(settings.data, settings.cache_dir), text_encoder.of(settings.text)
    samples = stage2_dataset(data, spec, cache, load_autoencoder(settings), encoder, torch.device("cpu"))
    assert isinstance(samples.dataset, torch.utils.data.Dataset), "a cache is no stream"
    return samples.dataset


def measure(row: Row, config: Config, dataset: torch.utils.data.Dataset[Item], step: float) -> Waits:
    """The waiting times of all steps but the first; `plain` is torch's DataLoader, which reads one item at a time."""
    training, workers, prefetch_factor = config.stage2, config.data.workers, config.data.prefetch_factor
    if row.subject == "ours":
        batches = load_batches(dataset, training, 0, 1, accelerator(config.run), workers, prefetch_factor, {})
    else:
        positions = Positions(0, training.steps, training.batch, 1, 0, 1)
        factor = prefetch_factor if workers else None
        batches = torch.utils.data.DataLoader(
            dataset, batch_sampler=positions, num_workers=workers, prefetch_factor=factor
        )
    seconds, items, size = [], iter(batches), training.batch
    for number in range(training.steps):
        start = time.perf_counter()
        positions = next(items)["position"].tolist()
        seconds.append(time.perf_counter() - start)
        assert positions == [*range(number * size, (number + 1) * size)], "every loader keeps the order"
        time.sleep(step)
    return Waits(np.array(seconds[1:]), step)


# --------------------------------------------------------------------------------------------------------- slow reads

_draws = threading.local()  # the random numbers of the item that a thread reads


class _Seeded(torch.utils.data.Dataset[Item]):
    """The same items; how long their reads take follows from their positions, whichever thread of whichever process."""

    def __init__(self, dataset: torch.utils.data.Dataset[Item], seed: int):
        self.dataset, self.seed = dataset, seed

    def __getitem__(self, n: int) -> Item:
        _draws.generator = generator(self.seed, "delays of reads", n)
        return self.dataset[n]

    def read_ahead(self, positions: Sequence[int]) -> None:
        start_reading(self.dataset, positions)


@contextmanager
def slow_reads() -> Iterator[None]:
    """Entries of the cache and images take as long as a busy network folder would take; forked processes too."""
    with (
        mock.patch.object(EncodingStore, "_read", _delayed(EncodingStore._read)),
        mock.patch.object(archives, "read_bytes", _delayed(archives.read_bytes)),
    ):
        yield


def _delayed(read: Any) -> Any:
    def slow(*arguments: Any) -> Any:
        time.sleep(delay(float(_draws.generator.random())))
        return read(*arguments)

    return slow


def delay(u: float) -> float:
    """Seconds of a read, of a uniform number in [0, 1)."""
    for share, seconds in DELAYS:
        if u < share:
            return seconds
        u -= share
    return MEDIAN
