"""Columns of a memory-mapped Arrow table by their chunks, which are never joined: that would copy the whole column."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

BLOCK = 2**20  # rows


def take_rows(column: pa.ChunkedArray, rows: np.ndarray) -> Iterator[pa.Array]:
    """The values of some rows, in their order."""
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    for first in range(0, len(rows), BLOCK):
        block = rows[first : first + BLOCK].astype(np.int64)
        which = np.searchsorted(ends, block, side="right")
        borders = np.flatnonzero(np.diff(which)) + 1
        for start, end in itertools.pairwise((0, *borders.tolist(), len(block))):
            chunk = column.chunk(which[start])
            local = block[start:end] - (ends[which[start]] - len(chunk))
            contiguous = np.array_equal(local, np.arange(local[0], local[0] + len(local)))
            yield chunk.slice(local[0], len(local)) if contiguous else chunk.take(pa.array(local))


def leading_bytes(column: pa.ChunkedArray, count: int) -> np.ndarray:
    """The first bytes of the values of a fixed-width column, `(N, count)`; zeros for nulls."""
    width, parts = column.type.byte_width, [np.zeros((0, count), np.uint8)]
    for chunk in filter(len, column.chunks):
        values = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        part = values.reshape(-1, width)[:, :count]
        if chunk.null_count:
            part = np.where(chunk.is_valid().to_numpy(zero_copy_only=False)[:, None], part, np.uint8(0))
        parts.append(part)
    return np.concatenate(parts)
