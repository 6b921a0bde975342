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

    Where some indices are `prior`, `(N,)` bool, an epoch has as many samples of these, the images of the class, as of
    the others, the subject's, and the two take turns: without buckets, every second sample is one of the class. Each
    kind has rounds of its own, so all images of a kind come up equally often. An epoch has the subject's as many times
    as it takes to show every image of the class.
    """

    def __init__(
        self,
        weights: Sequence[float] | np.ndarray,
        seed: int,
        batch: int = 1,
        buckets: Sequence[Hashable] | None = None,
        repeats: Sequence[int] | np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ):
        if not len(weights):
            raise ValueError("an order needs at least one sample")
        self.seed, self.batch = seed, batch
        indices, weights = np.arange(len(weights)), np.asarray(weights, dtype=np.float64)
        if repeats is not None:
            indices, weights = np.repeat(indices, repeats), np.repeat(weights, repeats)
        names = sorted(set(buckets), key=repr) if buckets is not None else []
        bucket_of = np.zeros(len(indices), int)
        if buckets is not None and len(names) > 1:
            numbers = dict(zip(names, range(len(names)), strict=True))
            bucket_of = np.array([numbers[name] for name in buckets])[indices]
        several = len(names) > 1
        of_class = np.zeros(len(indices), bool) if prior is None else prior[indices]
        self.rounds: list[_Round | _Turns]
        if of_class.all() or not of_class.any():
            self.rounds = [*_rounds(indices, weights, bucket_of, seed, several).values()]
        else:
            subject, others = (
                _rounds(indices[chosen], weights[chosen], bucket_of[chosen], seed, several, name)
                for chosen, name in ((~of_class, ""), (of_class, "prior"))
            )
            self.rounds = _turns(subject, others)
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

    def _batches(self, bucket: _Round | _Turns, epochs: int) -> int:
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


def _rounds(
    indices: np.ndarray, weights: np.ndarray, bucket_of: np.ndarray, seed: int, several: bool, name: str = ""
) -> dict[int, _Round]:
    """The round of each bucket, by its number; together they have as many draws as there are indices."""
    rounds, per_weight = {}, len(indices) / weights.sum()
    for bucket in map(int, np.unique(bucket_of)):
        members = bucket_of == bucket
        size = max(1, round(weights[members].sum() * per_weight)) if several else len(indices)
        key = (*((bucket,) if several else ()), *name.encode())
        rounds[bucket] = _Round(indices[members], weights[members], size, seed, key)
    return rounds


def _turns(subject: dict[int, _Round], others: dict[int, _Round]) -> list[_Round | _Turns]:
    """The subject's rounds and those of the class, bucket by bucket, with as many draws of either in an epoch."""
    once, available = (sum(r.size for r in rounds.values()) for rounds in (subject, others))
    epochs = -(-available // once)  # of the subject, so that every image of the class is shown
    turns, before = list[_Round | _Turns](), 0
    for bucket in sorted({*subject, *others}):
        draws = epochs * subject[bucket].size if bucket in subject else 0
        after = before + (others[bucket].size if bucket in others else 0)
        prior = (epochs * once * after + available // 2) // available  # rounded, of the class up to this bucket
        prior -= (epochs * once * before + available // 2) // available
        turns.append(_Turns(subject.get(bucket), others.get(bucket), draws, prior))
        before = after
    return turns


class _Turns:
    """Draws of the subject and of the class in turns, spread evenly: of any `draws + prior`, `prior` of the class."""

    def __init__(self, subject: _Round | None, others: _Round | None, draws: int, prior: int):
        self.subject, self.others, self.prior, self.size = subject, others, prior, draws + prior

    def __getitem__(self, n: int) -> int:
        before, after = n * self.prior // self.size, (n + 1) * self.prior // self.size
        chosen, number = (self.subject, n - before) if before == after else (self.others, before)
        assert chosen, "a kind without images in this bucket has no draws"
        return chosen[number]


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
