"""The metrics of a run: summed over steps, written to `metrics.jsonl` and to the trackers."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ldm.utils.atomic_files import sync
from ldm.utils.errors import UserError, cant_write

SUM, COUNT = "/sum", "/count"  # the parts of a pair


class MetricsLogger:
    """Sums scalars over accumulation steps and steps, and writes lines of metrics at `path`, on the main process."""

    def __init__(self, path: Path, accelerator: Accelerator):
        self.path = path
        self._accelerator = accelerator
        self._sums: dict[str, torch.Tensor] = {}  # of each metric since the last means
        self._counts: dict[str, int] = {}

    def add(self, metrics: Iterable[Mapping[str, torch.Tensor]]) -> None:
        """Adds the scalars of one step, a mapping for each of its accumulation steps.

        A pair `(2,)` is a sum and a count, which may be 0: of those that a batch has a varying number of.
        """
        for name, value in (scalar for scalars in metrics for scalar in _scalars(scalars)):
            self._sums[name] = self._sums.get(name, 0) + value.double()  # float64: exact, in whatever order
            self._counts[name] = self._counts.get(name, 0) + 1

    def pop_means(self) -> dict[str, float]:
        """The means, over processes too, of what was added since the last call."""
        means = {name: total / self._counts[name] for name, total in self._totals().items()}
        self._sums, self._counts = {}, {}
        for name in [name.removesuffix(COUNT) for name in means if name.endswith(COUNT)]:
            total, count = means.pop(name + SUM), means.pop(name + COUNT)
            if count:
                means[name] = total / count
        return means

    def _totals(self) -> dict[str, float]:
        """The sums, mean over processes."""
        names = sorted(self._sums)
        if not names:
            return {}
        totals = torch.stack([self._sums[name].to(self._accelerator.device) for name in names])
        return dict(zip(names, self._accelerator.reduce(totals, "mean").tolist(), strict=True))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """A line of metrics, to the trackers too; NaN and infinity, which JSON lacks, are `null` in the line.

        UserError where the disk is full, or the folder not writable.
        """
        self._accelerator.log(dict(values), step=step)
        if self._accelerator.is_main_process:
            finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
            line = json.dumps({"step": step, **finite, "time": round(time.time(), 3)})
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a") as file:
                    file.write(line + "\n")
            except OSError as error:
                if not (reason := cant_write(error)):
                    raise
                raise UserError(f"can't write {self.path}: {reason}") from None

    def state(self) -> dict[str, Any]:
        """For a checkpoint: what was added since the last means. All processes call it."""
        return {"totals": self._totals(), "counts": self._counts}

    def load(self, state: Mapping[str, Any]) -> None:
        self._sums = {
            name: torch.tensor(total, dtype=torch.float64, device=self._accelerator.device)
            for name, total in state["totals"].items()
        }
        self._counts = state["counts"]

    def size(self) -> int:
        """Bytes of the file."""
        return self.path.stat().st_size if self.path.exists() else 0

    def sync(self) -> None:
        """Waits until the file is on the disk."""
        if self.path.exists():
            sync(self.path)

    def truncate(self, size: int) -> None:
        """Removes the lines beyond so many bytes."""
        if self.path.exists() and self.path.stat().st_size > size:
            os.truncate(self.path, size)

    def close(self) -> None:
        """Ends the trackers' runs."""
        for tracker in self._accelerator.trackers:
            tracker.finish()
        self._accelerator.trackers = []


def _scalars(metrics: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
    """The metrics with the two parts of a pair one by one."""
    for name, value in metrics.items():
        if value.dim():
            yield from zip((name + SUM, name + COUNT), value, strict=True)
        else:
            yield name, value
