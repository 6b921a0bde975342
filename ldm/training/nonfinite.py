"""Steps from which nothing is learned, as a loss or gradient was not finite: whose samples they were, and how many."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from accelerate.utils import gather_object

NAMED = 8  # samples of a step, at most


class Skips:
    """`total` skipped steps, the last `in_a_row` one after the other; `name` tells people what a position is."""

    def __init__(self, name: Callable[[int], str]):
        self.total = self.in_a_row = 0
        self._name = name
        self._keys: dict[int, str] = {}  # of this step's samples, where they come with their names
        self._watched: list[tuple[torch.Tensor, torch.Tensor]] = []  # of this step: positions, and whose output is bad

    def bring(self, positions: torch.Tensor, keys: Iterable[str]) -> None:
        """Takes in the names of samples that bring them along."""
        self._keys.update(zip(positions.tolist(), keys, strict=False))

    def track_nonfinite(self, positions: torch.Tensor, outputs: torch.Tensor) -> None:
        """Keeps in mind whose output `(N, …)` is not finite."""
        self._watched.append((positions, ~outputs.detach().flatten(1).isfinite().all(1)))

    def end_step(self, finite: bool) -> str:
        """Counts a step; the names of the samples of one that was not finite, in all processes, which all call it.

        They are those whose output was not finite, or where there is none the whole step's.
        """
        names = ""
        if finite:
            self.in_a_row = 0
        else:
            self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
            names = self._names()
        self._keys, self._watched = {}, []
        return names

    def _names(self) -> str:
        mine: list[tuple[int, bool, str]] = []
        for positions, outputs in self._watched:
            for n, is_bad in zip(positions.tolist(), outputs.tolist(), strict=True):
                mine.append((n, is_bad, f"sample {n}, {self._keys[n]}" if n in self._keys else self._name(n)))
        seen = sorted(gather_object(mine))
        bad = [name for _, is_bad, name in seen if is_bad] or [name for *_, name in seen]
        return (", ".join(bad[:NAMED]) or "no known sample") + (f" and {len(bad) - NAMED} more" if bad[NAMED:] else "")
