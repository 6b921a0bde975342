"""Elements of memory-mapped files that the system reads ahead, many at once.

A program waits for an element that is not in memory as long as the disk takes, and then for the next one. A batch needs
hundreds, which lie anywhere; asked for together, they take as long as a few.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable

import numpy as np
import pyarrow as pa


def will_need(values: np.ndarray, starts: np.ndarray, count: int | np.ndarray = 1) -> None:
    """Has the system read the pages of `count` elements from each of `starts` on, `(N,)`; it returns meanwhile.

    Of long spans, these are the first and the last page. Where the array, `(M,)`, is not of a mapped file, or the
    system has no such call, nothing happens.
    """
    if not (advise := _madvise()):
        return
    first = values.ctypes.data + starts.astype(np.int64) * values.itemsize
    last = first + count * values.itemsize - 1
    for page in np.unique(np.stack([first, last]) // mmap.PAGESIZE).tolist():
        advise(page * mmap.PAGESIZE, mmap.PAGESIZE, mmap.MADV_WILLNEED)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    """The system's call, by address: numpy and Arrow don't keep the object whose method it is."""
    try:
        call = ctypes.CDLL(None).madvise
    except (AttributeError, OSError, TypeError):  # not on Windows
        return None
    call.argtypes, call.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return call  # type: ignore[no-any-return]


def will_need_rows(array: pa.Array, rows: np.ndarray) -> None:
    """The same of some rows of an Arrow array, `(N,)`; strings and lists wait for their offsets."""
    if array.null_count == len(array) or not len(rows):
        return
    buffers, rows = array.buffers(), rows + array.offset
    if buffers[0]:
        will_need(np.frombuffer(buffers[0], np.uint8), rows // 8)
    if not (pa.types.is_large_string(array.type) or pa.types.is_large_list(array.type)):
        bits = array.type.bit_width
        will_need(np.frombuffer(buffers[1], np.uint8), rows * bits // 8, max(1, bits // 8))
        return
    offsets = np.frombuffer(buffers[1], np.int64)
    will_need(offsets, rows, 2)
    starts, ends = offsets[rows], offsets[rows + 1]
    if pa.types.is_large_list(array.type):
        will_need_rows(array.values, np.concatenate([np.arange(*span) for span in zip(starts, ends, strict=True)]))
    elif buffers[2]:
        filled = ends > starts
        will_need(np.frombuffer(buffers[2], np.uint8), starts[filled], (ends - starts)[filled])
