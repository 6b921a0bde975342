"""Which sample is the n-th of the run, and which random numbers belong to it: pure functions of (seed, n).

Nothing here remembers anything, so one process or eight, killed and resumed or not, train on the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch


class Order:
    """The endless sequence of sample indices of a run.

    An epoch is `len(weights)` samples long. Equal weights give every index exactly once an epoch, in a fresh order;
    otherwise an index comes `weight / mean(weights)` times an epoch, rounded up or down (systematic resampling).
    """

    def __init__(self, weights: Sequence[float], seed: int):
        if not len(weights):
            raise ValueError("an order needs at least one sample")
        self.size = len(weights)
        self.seed = seed
        self._cumulated = np.cumsum(np.asarray(weights, dtype=np.float64)) / np.sum(weights) * self.size
        self._epochs: dict[int, np.ndarray] = {}

    def __getitem__(self, n: int) -> int:
        """The index, in [0, size), of the run's n-th sample."""
        epoch, place = divmod(n, self.size)
        if epoch not in self._epochs:
            self._epochs = {epoch: self._shuffled(epoch)}
        return int(self._epochs[epoch][place])

    def _shuffled(self, epoch: int) -> np.ndarray:
        rng = np.random.default_rng([self.seed, epoch])
        points = np.arange(self.size) + rng.uniform(1e-6, 1 - 1e-6)
        indices = np.minimum(np.searchsorted(self._cumulated, points), self.size - 1)
        return rng.permutation(indices)


class Positions(torch.utils.data.Sampler[list[int]]):
    """A batch sampler: the positions of one process's share of each micro-batch, from `first_step` to `steps`.

    Step s, micro-batch a, process r takes samples `s·batch + (a·processes + r)·share …`, `share` of them: the global
    batch is the same set for any number of processes and micro-batches.
    """

    def __init__(self, first_step: int, steps: int, batch: int, micro_batches: int, rank: int, processes: int):
        share = batch // (micro_batches * processes)
        self._starts = [
            step * batch + (micro * processes + rank) * share
            for step in range(first_step, steps)
            for micro in range(micro_batches)
        ]
        self._share = share

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(start, start + self._share)) for start in self._starts)


def generator(seed: int, stream: str, n: int) -> np.random.Generator:
    """A generator for sample n of a named stream, independent of that of every other (seed, stream, n)."""
    return np.random.default_rng([seed, n, *stream.encode()])


def normal(seed: int, stream: str, positions: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, `(len(positions), *shape)` float32 on the CPU, each row drawn from its own position."""
    rows = [generator(seed, stream, int(n)).standard_normal(tuple(shape), dtype=np.float32) for n in positions]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, stream: str, positions: Iterable[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1), `(len(positions),)` float32 on the CPU, each drawn from its own position."""
    return torch.tensor([generator(seed, stream, int(n)).random(dtype=np.float32) for n in positions])
