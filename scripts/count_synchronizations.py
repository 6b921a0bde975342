"""Counts how often a step of stage two makes the host wait for the GPU: once, to learn whether it is finite.

    python scripts/count_synchronizations.py --config configs/tiny.yaml

torch's sync debug mode finds them, all but those within NCCL. The autoencoder has random weights where none is set.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import ldm.utils.openmp  # noqa: F401  # before torch

import benchmark_results as results
import torch
from benchmark_autoencoder import load_autoencoder
from benchmark_rows import collect_metrics

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import index
from ldm.data.index import Index
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import AnyTextEncoder
from ldm.training.trainer import Trainer
from stage2_diffusion.train import train

WARNING = "called a synchronizing CUDA operation"
STEPS = 12
FIRST = 3  # steps that are left out: they fill tables, and the optimizer's state
MOST = 1


def synchronizations(settings: Config, data: Index, vae: Autoencoder, encoder: AnyTextEncoder) -> list[int]:
    """How often the host waits in each step of a training but the last; a step ends when the next one has its batch."""
    starts, batches = dict[int, int](), Trainer.batches  # by step: waits before its first batch
    with warnings.catch_warnings(record=True) as caught:

        def counted(trainer: Trainer, *args: Any) -> Iterator[Any]:
            for batch in batches(trainer, *args):
                starts.setdefault(trainer.step, sum(WARNING in str(warning.message) for warning in caught))
                yield batch

        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with patch.object(Trainer, "batches", counted):
                collect_metrics(train, settings, data, vae, encoder)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [after - before for before, after in itertools.pairwise(starts.values())]


def main() -> int:
    parser = argparse.ArgumentParser(prog="count_synchronizations.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, for example configs/tiny.yaml")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends the result to it, as a line of JSON")
    parser.add_argument("--label", default="", help="the step in this line")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example run.precision=bf16")
    args = parser.parse_intermixed_args()
    if not torch.cuda.is_available():
        print("error: torch finds no GPU, and a CPU has nothing to wait for", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        keys = [f"run.dir={folder}/run", "run.tracker=none", "run.log_every=1000", f"stage2.steps={STEPS}"]
        settings = loader.load(args.config, [*args.overrides, *keys])
        data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train")
        counts = synchronizations(settings, data, load_autoencoder(settings), text_encoder.of(settings.text))[FIRST:]
    print(f"waits    {max(counts)} a step at most, {sum(counts) / len(counts):.2f} on average")
    if args.json:
        line = {
            "step": results.parse_value(args.label),
            "what": "synchronizations",
            "row": "stage two",
            "value": max(counts),
            "unit": "a step, at most",
            "baseline_row": "aim",
            "baseline": MOST,
            "ratio": max(counts) / MOST,
            "allocated": None,
            "reserved": None,
            **results.machine(),
        }
        results.append(args.json, line)
    if max(counts) <= MOST:
        return 0
    print(f"error: the host waits {max(counts)} times in a step; {MOST} would do", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
