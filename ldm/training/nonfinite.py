"""Optimizer steps that are skipped because a loss or gradient is NaN or infinite: how many, and of which samples."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from accelerate.utils import gather_object

NAMED = 8  # samples of a step, at most


class NonfiniteTracker:
    """`total` skipped steps, the last `in_a_row` one after the other; `name` says which sample a position is."""

    def __init__(self, name: Callable[[int], str]):
        self.total = self.in_a_row = 0
        self._name = name
        self._keys: dict[int, str] = {}  # of this step's samples, where batches bring them
        self._outputs: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this step: positions, and whose output is bad

    def add_keys(self, positions: torch.Tensor, keys: Iterable[str]) -> None:
        """Names the samples of a batch that brings their names."""
        self._keys.update(zip(positions.tolist(), keys, strict=False))

    def track_nonfinite(self, positions: torch.Tensor, outputs: torch.Tensor) -> None:
        """Remembers whose output `(N, …)` is not finite, to name these samples should the step be skipped."""
        self._outputs.append((positions, ~outputs.detach().flatten(1).isfinite().all(1)))

    def end_step(self, finite: bool) -> str:
        """Counts a step; the sample names of one that was not finite. All processes call it.

        Named are the samples of all processes whose output was not finite, or, where there is none, the whole step's.
        """
        names = ""
        if finite:
            self.in_a_row = 0
        else:
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            names = self._names()
        self._keys, self._outputs = {}, []
        return names

    def _names(self) -> str:
        local: list[tuple[int, bool, str]] = []
        for positions, outputs in self._outputs:
            for n, is_bad in zip(positions.tolist(), outputs.tolist(), strict=True):
                local.append((n, is_bad, f"sample {n}, {self._keys[n]}" if n in self._keys else self._name(n)))
        samples = sorted(gather_object(local))
        bad = [name for _, is_bad, name in samples if is_bad] or [name for *_, name in samples]
        return (", ".join(bad[:NAMED]) or "no known sample") + (f" and {len(bad) - NAMED} more" if bad[NAMED:] else "")

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"skipped": self.total, "in_a_row": self.in_a_row}

    def load(self, state: dict[str, Any]) -> None:
        self.total, self.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
