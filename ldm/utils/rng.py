"""Random numbers of a sample, drawn from (seed, stream, position) and never from history."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch


def generator(seed: int, stream: str, n: int) -> np.random.Generator:
    """The generator of sample n of a named stream, independent of those of all other (seed, stream, n)."""
    return np.random.default_rng([seed, n, *stream.encode()])


def normal(seed: int, stream: str, positions: Iterable[int], shape: Sequence[int]) -> torch.Tensor:
    """Standard normal noise, `(len(positions), *shape)` float32 on the CPU, each row drawn from its own position."""
    rows = [generator(seed, stream, int(n)).standard_normal(tuple(shape), dtype=np.float32) for n in positions]
    return torch.from_numpy(np.stack(rows))


def uniform(seed: int, stream: str, positions: Iterable[int]) -> torch.Tensor:
    """Uniform numbers in [0, 1), `(len(positions),)` float32 on the CPU, each drawn from its own position."""
    return torch.tensor([generator(seed, stream, int(n)).random(dtype=np.float32) for n in positions])
