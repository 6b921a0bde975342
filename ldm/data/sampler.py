"""Which sample is the n-th of the run, and which random numbers belong to it: pure functions of (seed, n).

Nothing here remembers anything, so one process or eight, killed and resumed or not, train on the same numbers.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch

from ldm.config.schema import DataConfig
from ldm.data.crops import Augmentation


@dataclass(frozen=True)
class SampleSpec:
    """What, beside the data and the position in the run, decides what a sample is.

    `batch` positions in a row share a bucket; everything that is drawn follows from `seed`. `cond_dropout` is the share
    of samples without conditions where their source says none. A latent is a `sample` of its posterior, or the `mean`.
    """

    batch: int
    seed: int = 0
    augmentation: Augmentation = field(default_factory=Augmentation)
    cond_dropout: float = 0.0
    latents: Literal["sample", "mean"] = "sample"

    @classmethod
    def of(cls, data: DataConfig, batch: int, seed: int, cond_dropout: float = 0.0) -> SampleSpec:
        return cls(batch, seed, Augmentation.of(data), cond_dropout, data.latents)


class Order:
    """The endless sequence of sample indices of a run, in batches of one bucket.

    An epoch shows each index `repeats` times; with unequal weights it is as long, and an index comes
    `weight / mean(weights)` times as often, rounded up or down (systematic resampling). `buckets` gives each index a
    name; all samples of a step (`batch` consecutive positions) have the same. A bucket whose samples don't fill its
    last batch of an epoch begins its next round early: after k epochs, every picture has been shown k times at least.
    """

    def __init__(
        self,
        weights: Sequence[float] | np.ndarray,
        seed: int,
        batch: int = 1,
        buckets: Sequence[Hashable] | None = None,
        repeats: Sequence[int] | np.ndarray | None = None,
    ):
        if not len(weights):
            raise ValueError("an order needs at least one sample")
        self.seed, self.batch = seed, batch
        indices, weights = np.arange(len(weights)), np.asarray(weights, dtype=np.float64)
        if repeats is not None:
            indices, weights = np.repeat(indices, repeats), np.repeat(weights, repeats)
        self.size = len(indices)
        self.rounds = [_Round(indices, weights, self.size, seed, ())]
        if buckets is not None and len(names := sorted(set(buckets), key=repr)) > 1:
            numbers = dict(zip(names, range(len(names)), strict=True))
            of = np.array([numbers[name] for name in buckets])[indices]
            per_weight = self.size / weights.sum()
            self.rounds = [
                _Round(
                    indices[of == b], weights[of == b], max(1, round(weights[of == b].sum() * per_weight)), seed, (b,)
                )
                for b in range(len(names))
            ]
        self._plan: tuple[int, np.ndarray] | None = None  # an epoch, and the bucket of each of its batches

    def __getitem__(self, n: int) -> int:
        """The index, in [0, len(weights)), of the run's n-th sample."""
        if len(self.rounds) == 1:
            return self.rounds[0][n]
        step, place = divmod(n, self.batch)
        epoch = self.epoch(step)
        if self._plan is None or self._plan[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, *b"batches"])
            counts = [self._batches(r, epoch + 1) - self._batches(r, epoch) for r in self.rounds]
            self._plan = epoch, rng.permutation(np.repeat(np.arange(len(counts)), counts))
        at = step - self.first_step(epoch)
        bucket = int(self._plan[1][at])
        done = self._batches(self.rounds[bucket], epoch) + int((self._plan[1][:at] == bucket).sum())
        return self.rounds[bucket][done * self.batch + place]

    def first_step(self, epoch: int) -> int:
        """The step that an epoch begins with."""
        return sum(self._batches(r, epoch) for r in self.rounds)

    def epoch(self, step: int) -> int:
        """The epoch of a step: the last one that begins no later."""
        low, high = 0, step * self.batch // sum(r.size for r in self.rounds) + 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.first_step(middle) <= step else (low, middle - 1)
        return low

    def _batches(self, bucket: _Round, epochs: int) -> int:
        """Batches of a bucket in the first epochs."""
        return -(-epochs * bucket.size // self.batch)


class _Round:
    """The endless sequence of some indices: `size` draws show each of them once, or as its weight says."""

    def __init__(self, indices: np.ndarray, weights: np.ndarray, size: int, seed: int, name: tuple[int, ...]):
        self.indices, self.size, self.seed, self.name = indices, size, seed, name
        self._cumulated = np.cumsum(weights) / np.sum(weights) * size
        self._drawn: tuple[int, np.ndarray] | None = None

    def __getitem__(self, n: int) -> int:
        number, place = divmod(n, self.size)
        if self._drawn is None or self._drawn[0] != number:
            rng = np.random.default_rng([self.seed, number, *self.name])
            points = np.arange(self.size) + rng.uniform(1e-6, 1 - 1e-6)
            drawn = np.minimum(np.searchsorted(self._cumulated, points), len(self.indices) - 1)
            self._drawn = number, rng.permutation(self.indices[drawn])
        return int(self._drawn[1][place])


class Positions(torch.utils.data.Sampler[list[int]]):
    """A batch sampler: the positions of one process's share of each pass, from `first_step` to `steps`.

    Step s, pass a, process r takes samples `s·batch + (a·processes + r)·share …`, `share` of them: the global batch is
    the same set for any number of processes and passes.
    """

    def __init__(self, first_step: int, steps: int, batch: int, passes: int, rank: int, processes: int):
        share = batch // (passes * processes)
        self._starts = [
            step * batch + (micro * processes + rank) * share
            for step in range(first_step, steps)
            for micro in range(passes)
        ]
        self._share = share

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self._share)) for start in self._starts)
