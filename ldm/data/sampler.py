"""Which sample is the n-th of the run: a pure function of (seed, n).

It depends on no history, so one process or eight, interrupted and resumed or not, train on the same samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from ldm.config.schema import DataConfig
from ldm.data.crops import Augmentation
from ldm.data.draw_table import Draws, DrawTable, draw_table
from ldm.data.page_cache import Lookup, address
from ldm.data.permutation import Permutation

ORDER = 2  # the version of the order, which checkpoints keep; 1 shuffled arrays


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

    Nothing of the size of an epoch is drawn or kept: shuffles are functions, and a table of draws may be a file.
    """

    def __init__(
        self,
        weights: Sequence[float] | np.ndarray,
        seed: int,
        batch: int = 1,
        buckets: Sequence[Any] | np.ndarray | None = None,
        repeats: Sequence[int] | np.ndarray | None = None,
        prior: np.ndarray | None = None,
    ):
        numbers = None if buckets is None else np.unique(np.asarray(buckets), axis=0, return_inverse=True)[1].ravel()
        repeats = None if repeats is None else np.asarray(repeats)
        self._set(draw_table(np.asarray(weights, np.float64), numbers, repeats, prior), seed, batch)

    @classmethod
    def of(cls, table: DrawTable, seed: int, batch: int) -> Order:
        """The order of indices whose table of draws is known."""
        order = cls.__new__(cls)
        order._set(table, seed, batch)
        return order

    def _set(self, table: DrawTable, seed: int, batch: int) -> None:
        if not table.draws:
            raise ValueError("an order needs at least one sample")
        self.seed, self.batch = seed, batch
        subject, others = ({d.bucket: _Round(table, d, seed) for d in table.draws if d.prior == p} for p in (0, 1))
        self.rounds: list[_Round | _Turns]
        self.rounds = _turns(subject, others) if subject and others else [*(subject or others).values()]
        self._step: tuple[int, _Round | _Turns, int] | None = None  # the last one, its bucket, and that one's batch

    def __getitem__(self, n: int) -> int:
        """The index, in [0, len(weights)), of the run's n-th sample."""
        bucket, draw = self._draw(n)
        return bucket[draw]

    def lookup(self, n: int) -> Lookup[int]:
        """The index of the run's n-th sample; before each read it yields the addresses."""
        bucket, draw = self._draw(n)
        return (yield from bucket.lookup(draw))

    def _draw(self, n: int) -> tuple[_Round | _Turns, int]:
        """The bucket of the run's n-th sample, and which of its draws that is."""
        if len(self.rounds) == 1:
            return self.rounds[0], n
        step, offset = divmod(n, self.batch)
        known = self._step  # read once: threads may ask for samples of other steps
        if known is None or known[0] != step:
            known = self._step = step, *self._batch_of(step)
        _, bucket, number = known
        return bucket, number * self.batch + offset

    def _batch_of(self, step: int) -> tuple[_Round | _Turns, int]:
        """The bucket of a step, and which of its batches: an epoch has all batches of all buckets, shuffled."""
        epoch = self.epoch(step)
        first, following = ([self._batches(r, e) for r in self.rounds] for e in (epoch, epoch + 1))
        shuffled = Permutation(sum(following) - sum(first), (self.seed, epoch, *b"batches"))[step - sum(first)]
        for bucket, before, after in zip(self.rounds, first, following, strict=True):
            if shuffled < after - before:
                return bucket, before + shuffled
            shuffled -= after - before
        raise AssertionError("an epoch has the batches of its buckets")

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

    def __init__(self, table: DrawTable, draws: Draws, seed: int):
        members = slice(draws.start, draws.start + draws.length)
        self.size, self._draws, self._seed = draws.size, draws, seed
        self._members = None if table.members is None else table.members[members]
        self._cumulative = None if table.cumulative is None else table.cumulative[members]
        self._shuffle: tuple[int, Permutation, float] | None = None  # of the last round, and its shift

    def __getitem__(self, n: int) -> int:
        member = self._member(n)
        return member if self._members is None else int(self._members[member])

    def lookup(self, n: int) -> Lookup[int]:
        """The index of the n-th draw, with the addresses; the search among weights reads page by page."""
        member = self._member(n)
        if self._members is None:
            return member
        yield [address(self._members, member)]
        return int(self._members[member])

    def _member(self, n: int) -> int:
        """The member of the n-th draw: members have draws in proportion to their weights, rounded up or down."""
        number, offset = divmod(n, self.size)
        known = self._shuffle  # read once: threads may ask for samples of other rounds
        if known is None or known[0] != number:
            key = (self._seed, number, self._draws.bucket, self._draws.prior, *b"round")
            shift = float(np.random.default_rng(key).uniform(1e-6, 1 - 1e-6))
            known = self._shuffle = number, Permutation(self.size, key), shift
        _, permutation, shift = known
        draw = permutation[offset]
        if self._cumulative is not None:
            member = int(np.searchsorted(self._cumulative, draw + shift))
        elif self.size == self._draws.length:
            return draw
        else:
            member = int((draw + shift) * self._draws.length / self.size)
        return min(member, self._draws.length - 1)


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
        chosen, draw = self._turn(n)
        return chosen[draw]

    def lookup(self, n: int) -> Lookup[int]:
        """The index of the n-th draw, with the addresses."""
        chosen, draw = self._turn(n)
        return (yield from chosen.lookup(draw))

    def _turn(self, n: int) -> tuple[_Round, int]:
        """Whose turn the n-th draw is, and which of its draws."""
        before, after = n * self.prior // self.size, (n + 1) * self.prior // self.size
        chosen, number = (self.subject, n - before) if before == after else (self.others, before)
        assert chosen, "a kind without images in this bucket has no draws"
        return chosen, number


class Positions(torch.utils.data.Sampler[list[int]]):
    """A batch sampler: the positions that one process computes in each pass, from `first_step` to `steps`.

    Step s, pass a, process r takes samples `s·batch + (a·processes + r)·share …`, `share` of them: the global batch is
    the same set for any number of processes and passes.
    """

    def __init__(self, first_step: int, steps: int, batch: int, passes: int, rank: int, processes: int):
        self._first, self._steps, self._batch, self._passes = first_step, steps, batch, passes
        self._rank, self._processes = rank, processes

    def __len__(self) -> int:
        return max(0, self._steps - self._first) * self._passes

    def __iter__(self) -> Iterator[list[int]]:
        share = self._batch // (self._passes * self._processes)
        for step, i in itertools.product(range(self._first, self._steps), range(self._passes)):
            start = step * self._batch + (i * self._processes + self._rank) * share
            yield list(range(start, start + share))
