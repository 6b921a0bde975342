"""Gradient accumulation: how a global batch is divided among processes and accumulation steps."""

from __future__ import annotations

import math
from typing import NamedTuple


class Accumulation(NamedTuple):
    """How the batch of an optimizer step is computed: in `steps` accumulation steps, of `images` on each device."""

    steps: int
    images: int


def accumulation(batch: int, processes: int, device_batch: int | None = None) -> Accumulation:
    """The fewest equal accumulation steps of a global batch, with at most `device_batch` images on a device at once.

    ValueError, naming the nearest batch that would do, where the batch can't be divided evenly among the processes.
    """
    if batch % processes:
        nearest = max(1, round(batch / processes)) * processes
        raise ValueError(f"{batch} can't be shared evenly by {processes} processes; {nearest} can")
    share = batch // processes
    steps = math.ceil(share / min(device_batch or share, share))
    while share % steps:
        steps += 1
    return Accumulation(steps, share // steps)
