"""What the benchmarks share: the rows that are compared, a run that leaves nothing, peaks of memory, the report."""

from __future__ import annotations

import argparse
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import benchmark_results as results
import torch

from ldm.training.dry_run import DryRun
from ldm.training.engine import DTYPES
from ldm.utils.errors import UserError
from ldm.utils.peak_memory import peak_memory, reset_peak_memory

Lines = list[dict[str, float]]  # of metrics

DATA_SHEET = {  # TFLOP/s of dense matrix products in bf16 or fp16, summed in float32; and in TF32
    "NVIDIA H100 80GB HBM3": (989.4, 494.7), "NVIDIA H100 PCIe": (756.0, 378.0), "NVIDIA H100 NVL": (835.5, 417.5),
    "NVIDIA H200": (989.4, 494.7), "NVIDIA H200 NVL": (835.5, 417.5),
    "NVIDIA A100-SXM4-40GB": (312.0, 156.0), "NVIDIA A100-SXM4-80GB": (312.0, 156.0),
    "NVIDIA A100-PCIE-40GB": (312.0, 156.0), "NVIDIA A100 80GB PCIe": (312.0, 156.0),
    "NVIDIA L40S": (362.0, 183.0), "NVIDIA GeForce RTX 4090": (165.2, 82.6), "NVIDIA GeForce RTX 3090": (71.0, 35.6),
}  # fmt: skip


def data_sheet(precision: str) -> float | None:
    """FLOP/s that the maker of this GPU states; None for one that is not listed, and for a CPU."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    half, tf32 = DATA_SHEET.get(name, (None, None))
    peak = tf32 if precision == "no" else half
    return peak * 1e12 if peak else None


# --------------------------------------------------------------------------------------------------------------- rows


class Row(NamedTuple):
    """One of what is compared: whose code, its precision, and keys of the configuration that it has besides."""

    who: str
    precision: str
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join([self.who, self.precision, *(each.partition(".")[2] for each in self.overrides)])


def rows(text: str, known: Sequence[str], precision: str) -> list[Row]:
    """Those that `--rows` asks for, `precision` where they name none; UserError where there is no such row."""
    found = []
    for each in text.split(","):
        first, *overrides = each.split("+")
        who, _, own = first.partition("-")
        if who not in known or own not in ("", *DTYPES) or not all("=" in override for override in overrides):
            raise UserError(
                f"--rows: {each!r} is none; a row is {' or '.join(known)}, then -{', -'.join(DTYPES)} or nothing, then "
                "any number of +section.key=value"
            )
        found.append(Row(who, own or precision, tuple(overrides)))
    return list(dict.fromkeys(found))


class Memory(NamedTuple):
    """Peaks in MB: of what tensors took and what the allocator held, on a GPU; else of the process."""

    allocated: float | None
    reserved: float | None


def peak() -> Memory:
    """Of this process, since it began or `forget_peak`."""
    on_gpu = torch.cuda.is_available()
    allocated, reserved = (count / 2**20 for count in peak_memory(on_gpu))
    return Memory(allocated, reserved if on_gpu else None)


def forget_peak() -> None:
    reset_peak_memory(torch.cuda.is_available())


def timed(action: Callable[[], Any]) -> float:
    """Seconds of it, from an idle device to an idle one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def apart(action: Callable[..., Any], *arguments: Any) -> tuple[Any, Memory]:
    """What `action` gives in a process of its own, and the peak of its memory; an error where the process is killed."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(action, *arguments).result(), process.submit(peak).result()


def each_apart(action: Callable[[Row], Any], chosen: Sequence[Row]) -> Iterator[tuple[Row, Any, Memory]]:
    """What `action` gives of each row in a process of its own; of the last in this one, which saves starting one."""
    *others, last = chosen
    for row in others:
        yield row, *apart(action, row)
    forget_peak()
    yield last, action(last), peak()


# ---------------------------------------------------------------------------------------------------------- training


def lines_of(train: Callable[..., None], *arguments: Any) -> Lines:
    """What a stage's `train`, given these, logs in its steps; it writes and looks at nothing."""
    with DryRun(evaluate=False, progress=True) as dry_run:
        train(*arguments)
    return dry_run.lines


# ------------------------------------------------------------------------------------------------------------ report


@dataclass
class Report:
    """Prints what was measured, a line a row, and appends it to a file as JSON.

    Of values more is better. Ratios are to the row `beside` of an earlier call that stands in the file, measured on the
    same kind of machine; without a name, to this report's first row.
    """

    what: str
    unit: str
    file: Path | None = None
    step: str = ""
    beside: str = ""
    values: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, what: str, unit: str, args: argparse.Namespace) -> Report:
        """As the command line asks for it."""
        return cls(what, unit, args.json, args.label, args.beside)

    def row(self, name: str, value: float, said: str = "", memory: Memory | None = None, **more: Any) -> None:
        self.values[name] = value
        beside = self.beside or next(iter(self.values))
        baseline = self.values.get(beside)
        if baseline is None and self.file:
            baseline = results.newest(self.file, self.what, beside)
        ratio = value / baseline if baseline else None
        shown = f"{ratio:6.2f} ×" if ratio else f"{'':8}"
        print(f"{self.what:8} {name:24} {value:10,.2f} {self.unit} {shown} {said}".rstrip(), flush=True)
        if not self.file:
            return
        line = {
            "step": results.parsed(self.step), "what": self.what, "row": name, "value": value, "unit": self.unit,
            "beside": beside, "baseline": baseline, "ratio": ratio, **(memory or Memory(None, None))._asdict(),
            **more, **results.machine(),
        }  # fmt: skip
        results.append(self.file, line)
