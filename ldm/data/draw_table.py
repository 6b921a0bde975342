"""Which indices an epoch draws, and how often: what an order needs of the data, as arrays that may be files."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ldm.data.arrow_columns import BLOCK


class Draws(NamedTuple):
    """The draws of a bucket, of images of the class (`prior`) or of others, in an epoch: `size`.

    Its `length` members begin at `start` in the table's arrays.
    """

    bucket: int
    prior: int
    start: int
    length: int
    size: int


class DrawTable(NamedTuple):
    """The draws of all buckets, by number; `members` are their indices, `(N,)`, None where these are 0 … N - 1.

    `cumulative`, `(N,)`, is how many draws the members of a bucket up to each have; None where all have equally many.
    """

    draws: list[Draws]
    members: np.ndarray | None
    cumulative: np.ndarray | None


def draw_table(
    weights: np.ndarray,
    buckets: np.ndarray | None = None,
    repeats: np.ndarray | None = None,
    prior: np.ndarray | None = None,
) -> DrawTable:
    """The table of indices with these weights and, where they have some, numbers of buckets, repeats and kinds.

    All arrays are `(N,)`. The images of either kind have as many draws together as they have repeats.
    """
    count = len(weights)
    kinds = np.zeros(count, np.uint32) if buckets is None else buckets.astype(np.uint32) * 2
    if prior is not None:
        kinds |= prior
    if not count:
        return DrawTable([], None, None)
    numbers, starts, members = _grouped(kinds)
    repeats = np.ones(1, np.int32) if repeats is None else repeats
    shares = np.broadcast_to(weights * repeats, count)
    if equal := bool((shares == shares[0]).all()):
        shares = np.broadcast_to(shares[:1].copy(), count)  # frees the memory of so many
    elif members is not None:
        shares = shares[members]
    totals = np.add.reduceat(shares, starts)
    of_class = numbers % 2 == 1
    repeats_of = [int(np.broadcast_to(repeats, count)[kinds % 2 == kind].sum()) for kind in (0, 1)]
    weights_of = [totals[of_class == kind].sum() for kind in (0, 1)]
    ends, draws = [*starts[1:].tolist(), count], []
    for number, start, end, total in zip(numbers.tolist(), starts.tolist(), ends, totals.tolist(), strict=True):
        bucket, kind = divmod(number, 2)
        size = max(1, round(total * repeats_of[kind] / weights_of[kind]))
        draws.append(Draws(bucket, kind, start, end - start, size))
    equal = equal or all((shares[d.start : d.start + d.length] == shares[d.start]).all() for d in draws)
    return DrawTable(draws, members, None if equal else _cumulative(shares, draws))


def _grouped(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The kinds that occur, where each begins in the grouped indices, and these; None where they are in order."""
    blocks = [kinds[first : first + BLOCK] for first in range(0, len(kinds), BLOCK)]  # a sort of all takes more memory
    kind_count = int(kinds.max()) + 1
    counts = np.sum([np.bincount(block, minlength=kind_count) for block in blocks], axis=0)
    numbers = np.flatnonzero(counts)
    starts = np.cumsum(counts[numbers]) - counts[numbers]
    if len(numbers) < 2:
        return numbers, starts, None
    members = np.empty(len(kinds), np.uint32 if len(kinds) < 2**32 else np.uint64)
    free = np.zeros(len(counts), np.int64)
    free[numbers] = starts
    for number, block in enumerate(blocks):
        order = np.argsort(block, kind="stable")
        block_counts = np.bincount(block, minlength=len(counts))
        offsets = np.cumsum(block_counts) - block_counts
        members[np.arange(len(block)) + (free - offsets)[block[order]]] = number * BLOCK + order
        free += block_counts
    return numbers, starts, members


def _cumulative(shares: np.ndarray, draws: list[Draws]) -> np.ndarray:
    cumulative = np.empty(len(shares))
    for d in draws:
        part = cumulative[d.start : d.start + d.length]
        np.cumsum(shares[d.start : d.start + d.length], out=part)
        part *= d.size / part[-1]
    return cumulative
