"""Keys, which are hashes, sorted a part at a time: where each is among a hundred million, and which come first."""

from __future__ import annotations

import bisect
import functools
import itertools
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ldm.data.column_store import ColumnStore
from ldm.data.page_cache import Lookup, address

PART = 2**22  # keys that are sorted at once
RUN = 64  # keys, on average, that begin with the same bits: half a page, so that one is found with one access to a disk


def sort_keys(keys: np.ndarray) -> Iterator[np.ndarray]:
    """The indices that sort `keys`, `(N,)` bytes, stably, a part at a time; hashes fill all parts evenly."""
    if not len(keys):
        return
    first = np.ascontiguousarray(keys.view(np.uint8).reshape(len(keys), -1)[:, 0])
    ends, low = np.cumsum(np.bincount(first, minlength=256)), 0
    while low < 256:
        start = ends[low - 1] if low else 0
        high = max(low + 1, int(np.searchsorted(ends, start + PART, side="right")))
        indices = np.flatnonzero((first >= low) & (first < high))
        yield indices[np.argsort(keys[indices], kind="stable")]
        low = high


def first_occurrences(keys: np.ndarray) -> np.ndarray:
    """The indices of the keys, `(N,)` bytes, that no earlier one equals, in order."""
    first = np.zeros(len(keys), bool)
    for order in sort_keys(keys):
        part = keys[order]
        first[order[np.concatenate([[True], part[1:] != part[:-1]])[: len(order)]]] = True
    return np.flatnonzero(first)


class KeyLookup:
    """The sorted keys of the entries of some files, `keys`, `(N,)` of 32 bytes, and where each entry is.

    They are memory-mapped files of `columns`, made from what `read_keys` returns of each file where there are none yet.
    """

    def __init__(
        self, columns: ColumnStore, settings: object, files: Sequence[Path], read_keys: Callable[[Path], np.ndarray]
    ):
        counts = columns.value("counts", settings, lambda: [len(read_keys(file)) for file in files])
        self._ends = list(itertools.accumulate(counts))
        count = self._ends[-1] if counts else 0
        self.keys, self._order = np.zeros(0, "S32"), np.zeros(0, np.uint32)
        if not count:
            return

        @functools.cache
        def unsorted() -> np.ndarray:
            with tempfile.TemporaryFile(dir=columns.folder) as file:  # on the disk, as memory may be too small
                keys = np.memmap(file, "S32", "w+", shape=(count,))
            for path, end, number in zip(files, self._ends, counts, strict=True):
                keys[end - number : end] = read_keys(path)
            return keys

        def fill_order(order: np.ndarray) -> None:
            start = 0
            for part in sort_keys(unsorted()):
                order[start : start + len(part)] = part
                start += len(part)

        def fill_keys(keys: np.ndarray) -> None:
            for start in range(0, count, PART):
                keys[start : start + PART] = unsorted()[self._order[start : start + PART]]

        dtype = np.uint32 if count < 2**32 else np.uint64
        self._order = columns.filled("order", settings, dtype, (count,), fill_order)
        self.keys = columns.filled("keys", settings, "S32", (count,), fill_keys)
        self._bits = min(32, (count // RUN).bit_length())
        self._starts = columns.array("starts", (settings, RUN), self._count_runs)

    def _count_runs(self) -> np.ndarray:
        """Where the keys begin whose first bits are 0, 1, …, and where the last ones end, `(2**bits + 1,)`."""
        starts = np.zeros(2**self._bits + 1, np.int64)
        for first in range(0, len(self.keys), PART):
            keys = np.ascontiguousarray(self.keys[first : first + PART]).view(np.uint8).reshape(-1, 32)
            leading = np.ascontiguousarray(keys[:, :4]).view(">u4").ravel() >> (32 - self._bits)
            starts[1:] += np.bincount(leading.astype(np.int64), minlength=2**self._bits)
        return np.cumsum(starts)

    def find(self, keys: Any) -> tuple[np.ndarray, np.ndarray]:
        """The index of each key in `self.keys`, `(N,)`, and whether the key is there, `(N,)`."""
        requested = np.asarray(keys, "S32")  # an array: numpy strips NULs from the end of a scalar
        if not len(self.keys):
            return np.zeros(len(requested), int), np.zeros(len(requested), bool)
        indices = np.minimum(np.searchsorted(self.keys, requested), len(self.keys) - 1)
        return indices, self.keys[indices] == requested

    def lookup(self, key: bytes) -> Lookup[None]:
        """Reads where `place` looks a key up."""
        if not len(self.keys):
            return
        first = self._leading_bits(key)
        yield address(self._starts, first), address(self._starts, first + 1)
        start, end = self._starts[first : first + 2].tolist()
        if end > start:
            yield [address(values, i) for values in (self.keys, self._order) for i in (start, end - 1)]

    def _leading_bits(self, key: bytes) -> int:
        return int.from_bytes(key[:4]) >> (32 - self._bits)

    def place(self, key: bytes) -> tuple[int, int]:
        """The number of the file and the row of a key's entry; KeyError where there is none."""
        if not len(self.keys):
            raise KeyError(key)
        first = self._leading_bits(key)
        start, end = self._starts[first : first + 2].tolist()
        requested = np.array([key], "S32")  # an array: numpy strips NULs from the end of a scalar
        index = start + int(np.searchsorted(self.keys[start:end], requested)[0])
        if index == end or self.keys[index : index + 1] != requested:
            raise KeyError(key)
        number = int(self._order[index])
        file = bisect.bisect_right(self._ends, number)
        return file, number - (self._ends[file - 1] if file else 0)
