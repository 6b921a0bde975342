"""Which sample is the n-th of the run: a pure function of (seed, n).

It depends on no history, so one process or eight, interrupted and resumed or not, train on the same samples.
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
    """What a sample depends on besides the data and its position in the run.

    `batch` consecutive positions share a bucket; all random numbers follow from `seed`. `cond_dropout` is the share of
    samples without conditions, unless a source sets its own. A latent is a `sample` of its posterior, or its `mean`.
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

    An epoch has each index `repeats` times. With unequal weights it is as long, and has an index
    `weight / mean(weights)` times as often, rounded up or down (systematic resampling). `buckets` gives each index a
    name; all samples of a step (`batch` consecutive positions) have the same one. A bucket whose samples don't fill its
    last batch of an epoch begins its next round early: after k epochs, every image has been used k times at least.
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
            bucket_of = np.array([numbers[name] for name in buckets])[indices]
            per_weight = self.size / weights.sum()
            self.rounds = []
            for bucket in range(len(names)):
                members = bucket_of == bucket
                size = max(1, round(weights[members].sum() * per_weight))
                self.rounds.append(_Round(indices[members], weights[members], size, seed, (bucket,)))
        self._epoch_plan: tuple[int, np.ndarray] | None = None  # an epoch, and the bucket of each of its batches

    def __getitem__(self, n: int) -> int:
        """The index, in [0, len(weights)), of the run's n-th sample."""
        if len(self.rounds) == 1:
            return self.rounds[0][n]
        step, offset = divmod(n, self.batch)
        epoch = self.epoch(step)
        if self._epoch_plan is None or self._epoch_plan[0] != epoch:
            rng = np.random.default_rng([self.seed, epoch, *b"batches"])
            counts = [self._batches(r, epoch + 1) - self._batches(r, epoch) for r in self.rounds]
            self._epoch_plan = epoch, rng.permutation(np.repeat(np.arange(len(counts)), counts))
        plan, step_in_epoch = self._epoch_plan[1], step - self.first_step(epoch)
        bucket = int(plan[step_in_epoch])
        done = self._batches(self.rounds[bucket], epoch) + int((plan[:step_in_epoch] == bucket).sum())
        return self.rounds[bucket][done * self.batch + offset]

    def first_step(self, epoch: int) -> int:
        """The first step of an epoch."""
        return sum(self._batches(r, epoch) for r in self.rounds)

    def epoch(self, step: int) -> int:
        """The epoch of a step."""
        low, high = 0, step * self.batch // sum(r.size for r in self.rounds) + 1
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.first_step(middle) <= step else (low, middle - 1)
        return low

    def _batches(self, bucket: _Round, epochs: int) -> int:
        """The number of batches of a bucket in the first `epochs` epochs."""
        return -(-epochs * bucket.size // self.batch)


class _Round:
    """The endless sequence of the indices of a bucket: a round of `size` draws has each once, or as its weight says."""

    def __init__(self, indices: np.ndarray, weights: np.ndarray, size: int, seed: int, name: tuple[int, ...]):
        self.indices, self.size, self.seed, self.name = indices, size, seed, name
        self._cumulative = np.cumsum(weights) / np.sum(weights) * size
        self._drawn: tuple[int, np.ndarray] | None = None  # the number of a round, and its draws

    def __getitem__(self, n: int) -> int:
        number, offset = divmod(n, self.size)
        if self._drawn is None or self._drawn[0] != number:
            rng = np.random.default_rng([self.seed, number, *self.name])
            points = np.arange(self.size) + rng.uniform(1e-6, 1 - 1e-6)
            drawn = np.minimum(np.searchsorted(self._cumulative, points), len(self.indices) - 1)
            self._drawn = number, rng.permutation(self.indices[drawn])
        return int(self._drawn[1][offset])


class Positions(torch.utils.data.Sampler[list[int]]):
    """A batch sampler: the positions that one process computes in each pass, from `first_step` to `steps`.

    Step s, pass a, process r takes samples `s·batch + (a·processes + r)·share …`, `share` of them: the global batch is
    the same set for any number of processes and passes.
    """

    def __init__(self, first_step: int, steps: int, batch: int, passes: int, rank: int, processes: int):
        share = batch // (passes * processes)
        self._starts = [
            step * batch + (i * processes + rank) * share for step in range(first_step, steps) for i in range(passes)
        ]
        self._share = share

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self._share)) for start in self._starts)
