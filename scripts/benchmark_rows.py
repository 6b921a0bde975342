"""Shared by the benchmarks: the rows to compare, runs that write nothing, peaks of memory, the report."""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import benchmark_results as results
import torch

from ldm.training.dry_run import DryRun
from ldm.utils.errors import UserError
from ldm.utils.peak_memory import peak_memory, reset_peak_memory
from ldm.utils.precision import DTYPES

Metrics = list[dict[str, float]]  # the lines that a training loop logs

DATA_SHEET_TFLOPS = {  # dense matrix products per second in bf16 or fp16, summed in float32; and in TF32
    "NVIDIA H100 80GB HBM3": (989.4, 494.7),
    "NVIDIA H100 PCIe": (756.0, 378.0),
    "NVIDIA H100 NVL": (835.5, 417.5),
    "NVIDIA H200": (989.4, 494.7),
    "NVIDIA H200 NVL": (835.5, 417.5),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0),
    "NVIDIA A100-SXM4-80GB": (312.0, 156.0),
    "NVIDIA A100-PCIE-40GB": (312.0, 156.0),
    "NVIDIA A100 80GB PCIe": (312.0, 156.0),
    "NVIDIA L40S": (362.0, 183.0),
    "NVIDIA GeForce RTX 4090": (165.2, 82.6),
    "NVIDIA GeForce RTX 3090": (71.0, 35.6),
}


def data_sheet_flops(precision: str) -> float | None:
    """FLOP/s of this GPU by its data sheet; None for a GPU that is not listed, and for a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    half, tf32 = DATA_SHEET_TFLOPS.get(name, (None, None))
    peak = tf32 if precision == "no" else half
    return peak * 1e12 if peak else None


# --------------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """One of the things to compare: what runs, in which precision, with which configuration keys of its own."""

    subject: str  # `ours`, `reference`, `sdpa`, …
    precision: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join([self.subject, self.precision, *(override.partition(".")[2] for override in self.overrides)])


def parse_rows(text: str, subjects: Sequence[str], precision: str) -> list[Row]:
    """The rows of `--rows`, with `precision` where they name none; UserError for text that is no row."""
    rows = []
    for name in text.split(","):
        first, *overrides = name.split("+")
        subject, _, own = first.partition("-")
        if subject not in subjects or own not in ("", *DTYPES) or not all("=" in override for override in overrides):
            raise UserError(
                f"--rows: {name!r} is none; a row is {' or '.join(subjects)}, then -{', -'.join(DTYPES)} or nothing, "
                "then any number of +section.key=value"
            )
        rows.append(Row(subject, own or precision, tuple(overrides)))
    return list(dict.fromkeys(rows))


# --------------------------------------------------------------------------------------------------- time and memory


class Memory(NamedTuple):
    """Peaks in MB: on a GPU of tensors and of what the allocator reserved, on a CPU of the process."""

    allocated: float | None
    reserved: float | None


def peak() -> Memory:
    """Of this process, since its start or the last `reset_peak`."""
    on_gpu = torch.cuda.is_available()
    allocated, reserved = (count / 2**20 for count in peak_memory(on_gpu))
    return Memory(allocated, reserved if on_gpu else None)


def reset_peak() -> None:
    reset_peak_memory(torch.cuda.is_available())


def timed(action: Callable[[], Any]) -> float:
    """Seconds of `action`, from an idle device to an idle device."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def in_subprocess(action: Callable[..., Any], *arguments: Any) -> tuple[Any, Memory]:
    """The result of `action` in a process of its own, and its peak memory; an error if the process is killed."""
    method = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"  # Windows has no fork
    with ProcessPoolExecutor(1, multiprocessing.get_context(method)) as process:
        return process.submit(action, *arguments).result(), process.submit(peak).result()


def each_in_subprocess(action: Callable[[Row], Any], rows: Sequence[Row]) -> Iterator[tuple[Row, Any, Memory]]:
    """The result of `action` for each row in a process of its own; the last runs here, which saves starting one."""
    *others, last = rows
    for row in others:
        yield row, *in_subprocess(action, row)
    reset_peak()
    yield last, action(last), peak()


# ---------------------------------------------------------------------------------------------------------- training


def collect_metrics(train: Callable[..., None], *arguments: Any) -> Metrics:
    """The lines that a stage's `train(*arguments)` logs; it writes and evaluates nothing."""
    with DryRun(evaluate=False, progress=True) as dry_run:
        train(*arguments)
    return dry_run.lines


def seconds_per_step(metrics: Metrics) -> float:
    """The median between two lines, from the second line on."""
    pairs = itertools.pairwise(metrics[1:])
    return median((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in pairs)


# ------------------------------------------------------------------------------------------------------------ report


@dataclass
class Report:
    """Prints a line per measured row, and appends it to a file as JSON.

    Larger values are better. Ratios are to the row `baseline` of an earlier call, from the file, measured on the same
    kind of machine; without a name, to this report's first row.
    """

    what: str
    unit: str
    file: Path | None = None
    step: str = ""
    baseline: str = ""
    values: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, what: str, unit: str, args: argparse.Namespace) -> Report:
        """With the options of the command line."""
        return cls(what, unit, args.json, args.label, args.baseline)

    def row(self, name: str, value: float, text: str = "", memory: Memory | None = None, **more: Any) -> None:
        """Prints and appends a row; `text` ends its printed line, `more` goes to the file."""
        self.values[name] = value
        baseline_name = self.baseline or next(iter(self.values))
        baseline = self.values.get(baseline_name)
        if baseline is None and self.file:
            baseline = results.newest(self.file, self.what, baseline_name)
        ratio = value / baseline if baseline else None
        shown_ratio = f"{ratio:6.2f} ×" if ratio else f"{'':8}"
        print(f"{self.what:8} {name:24} {value:10,.2f} {self.unit} {shown_ratio} {text}".rstrip(), flush=True)
        if not self.file:
            return
        line = {
            "step": results.parse_value(self.step),
            "what": self.what,
            "row": name,
            "value": value,
            "unit": self.unit,
            "baseline_row": baseline_name,
            "baseline": baseline,
            "ratio": ratio,
            **(memory or Memory(None, None))._asdict(),
            **more,
            **results.machine(),
        }
        results.append(self.file, line)
