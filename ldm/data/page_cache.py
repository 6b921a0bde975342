"""Lookups in memory-mapped files, many at once: the system reads what all of them need next, while none waits.

A program waits for an element that is not in memory as long as the disk takes, and then for the next one. A batch needs
hundreds, which lie anywhere; asked for together, they take as long as a few.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
from collections.abc import Callable, Generator, Iterable, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

T = TypeVar("T")
Lookup = Generator[Sequence[int], None, T]
"""Finds something in mapped files; before it reads there, it yields the addresses."""


def look_up(lookups: Iterable[Lookup[Any]]) -> None:
    """Has the system read what all lookups need; they advance together, and it reads the pages of a turn all at once.

    Where it has no call for that, each page is read when a lookup comes to it.
    """
    for addresses in together(lookups):
        _advise_pages({address // mmap.PAGESIZE for address in addresses})


def together(lookups: Iterable[Lookup[Any]]) -> Lookup[None]:
    """One lookup of several, whose turns are those of all."""
    active = list(lookups)
    while active:
        turns = [(lookup, addresses) for lookup in active if (addresses := next(lookup, None)) is not None]
        active = [lookup for lookup, _ in turns]
        yield [address for _, addresses in turns for address in addresses]


def _advise_pages(pages: Iterable[int]) -> None:
    if advise := _madvise():
        for page in pages:
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


def address(values: np.ndarray, index: int = 0) -> int:
    """Where an element of a contiguous array is."""
    return int(values.__array_interface__["data"][0]) + index * values.itemsize


class MappedArray:
    """An Arrow array of a memory-mapped file, as a lookup reads its rows."""

    def __init__(self, array: pa.Array):
        validity, *buffers = array.buffers()[: 2 if pa.types.is_large_list(array.type) else 3]
        self._array = array  # whose memory is to stay
        self._empty, self._offset = array.null_count == len(array), array.offset
        self._validity = validity.address if validity else 0
        self._address, self._bits, self._offsets = 0, 0, None
        self._values: MappedArray | int = 0
        if self._empty:
            return
        self._address = buffers[0].address
        if pa.types.is_large_string(array.type) or pa.types.is_large_list(array.type):
            self._offsets = memoryview(buffers[0]).cast("q")
            listed = pa.types.is_large_list(array.type)
            self._values = MappedArray(array.values) if listed else buffers[1].address if buffers[1] else 0
        else:
            self._bits = array.type.bit_width

    def row(self, number: int) -> Lookup[None]:
        """Reads what a row is made of; of a long text, the first and the last page."""
        if self._empty:
            return
        number += self._offset
        validity = (self._validity + number // 8,) if self._validity else ()
        if self._offsets is None:
            yield (self._address + number * self._bits // 8, *validity)
            return
        yield (self._address + 8 * number, *validity)
        start, end = self._offsets[number], self._offsets[number + 1]
        if isinstance(self._values, MappedArray):
            yield from together(map(self._values.row, range(start, end)))
        elif end > start:
            yield self._values + start, self._values + end - 1
