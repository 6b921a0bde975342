"""The rows of an index, good and bad, as all processes map them, and the columns that follow from these."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ldm.data.arrow_columns import BLOCK, leading_bytes
from ldm.data.buckets import Buckets
from ldm.data.column_store import ColumnStore
from ldm.data.images import Size
from ldm.data.index_schema import MASK_COLUMNS, RECORD_COLUMNS
from ldm.data.page_cache import Lookup, MappedArray, together
from ldm.data.records import HELD_OUT, PRIOR, BadSample, Entry, ImageLocation, SampleFields

SPLITS = ("train", *HELD_OUT, PRIOR)  # numbered from 1; 0 is a bad sample
# Fields of an entry, as they are; `split` may be another than the table's.
ENTRY_COLUMNS = (*(name for name in RECORD_COLUMNS if name != "split"), "sha256", "width", "height", "mask_sha256")
ROW_COLUMNS = (*ENTRY_COLUMNS, *MASK_COLUMNS, "file", "start", "size", "captions", "attributes")
SAMPLE_COLUMNS = tuple(name for name in SampleFields._fields if name != "split")


class IndexTable:
    """A memory-mapped table of all rows of an index; `columns` keeps what follows from it.

    `rows` are the table's batches mapped a second time, for single rows.
    """

    def __init__(
        self, table: pa.Table, columns: ColumnStore | None = None, rows: Sequence[pa.RecordBatch] | None = None
    ):
        self.table, self.columns = table, columns or ColumnStore()
        self._batches = rows or table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches]).tolist()
        self._arrays: dict[int, dict[str, pa.Array]] = {}  # the columns of a row's batch, which are slow to make
        self._mapped: dict[int, list[MappedArray]] = {}  # those of a sample

    def __getstate__(self) -> dict[str, Any]:
        return {"table": self.table, "columns": self.columns}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, name: str) -> pa.ChunkedArray:
        return self.table[name]

    def entry(self, number: int, split: str) -> Entry:
        """The entry in a row, which is of this split."""
        row = self._row(number, ROW_COLUMNS)
        return Entry(
            location=ImageLocation(row["file"], row["start"], row["size"]),
            captions=tuple(row["captions"]),
            attributes=json.loads(row["attributes"]) if row["attributes"] else {},
            mask=None if row["mask_file"] is None else ImageLocation(*(row[name] for name in MASK_COLUMNS)),
            split=split,
            **{name: row[name] for name in ENTRY_COLUMNS},
        )

    def sample_fields(self, number: int, split: str) -> SampleFields:
        """The same of what a training sample needs."""
        row = self._row(number, SAMPLE_COLUMNS)
        return SampleFields(**{**row, "captions": tuple(row["captions"]), "split": split})

    def lookup(self, number: int) -> Lookup[None]:
        """Reads what `sample_fields` of a row needs."""
        batch = bisect.bisect_right(self._ends, number)
        if (columns := self._mapped.get(batch)) is None:
            columns = self._mapped[batch] = [MappedArray(self._batches[batch][name]) for name in SAMPLE_COLUMNS]
        row = number - self._ends[batch] + self._batches[batch].num_rows
        yield from together(column.row(row) for column in columns)

    def _row(self, number: int, names: Sequence[str]) -> dict[str, Any]:
        batch = bisect.bisect_right(self._ends, number)
        if (arrays := self._arrays.get(batch)) is None:
            arrays = self._arrays[batch] = {name: self._batches[batch][name] for name in ROW_COLUMNS}
        at = number - self._ends[batch]  # negative: from the batch's end
        return {name: arrays[name][at].as_py() for name in names}

    def blocks(self, *names: str) -> Iterator[pa.Table]:
        """These columns, some rows at a time."""
        table = self.table.select(names)
        for start in range(0, len(table), BLOCK):
            yield table.slice(start, BLOCK)

    def _column(self, dtype: Any, names: Sequence[str], values: Callable[[pa.Table], np.ndarray]) -> np.ndarray:
        """A column of the values that follow from others, `(N,)`."""
        column, start = np.zeros(len(self), dtype), 0
        for block in self.blocks(*names):
            column[start : start + len(block)] = values(block)
            start += len(block)
        return column

    # ------------------------------------------------------------------------------------------------ splits and sizes

    def splits(self, val_fraction: float) -> np.ndarray:
        """The number of each row's split, uint8; a fraction of `train` is moved to `reconstruction`, by its content."""

        def numbers(block: pa.Table) -> np.ndarray:
            known = pc.fill_null(pc.index_in(block["split"], pa.array(SPLITS, block["split"].type)), -1).to_numpy() + 1
            known = np.where(pc.is_null(block["reason"]).to_numpy(), known, 0)
            if val_fraction:
                drawn = leading_bytes(block["sha256"], 4).view(">u4").ravel()  # uniform: the first bytes of a SHA-256
                known[(known == 1) & (drawn < math.ceil(val_fraction * 2**32))] = 2
            return known

        names = ("split", "reason", "sha256")
        return self.columns.array("splits", val_fraction, lambda: self._column(np.uint8, names, numbers))

    def split_counts(self, val_fraction: float) -> dict[str, int]:
        """How many usable rows each split has, of those that have any."""

        def compute() -> dict[str, int]:
            counts = np.bincount(self.splits(val_fraction), minlength=len(SPLITS) + 1)[1:].tolist()
            return {name: count for name, count in zip(SPLITS, counts, strict=True) if count}

        return dict(self.columns.value("split-counts", val_fraction, compute))

    def rows_of(self, splits: frozenset[str], val_fraction: float) -> np.ndarray:
        """The numbers of the rows of these splits."""

        def compute() -> np.ndarray:
            chosen = np.array([False, *(name in splits for name in SPLITS)])
            numbers, dtype = self.splits(val_fraction), np.uint32 if len(self) < 2**32 else np.uint64
            parts = [np.zeros(0, dtype)]
            for start in range(0, len(numbers), BLOCK):
                parts.append((np.flatnonzero(chosen[numbers[start : start + BLOCK]]) + start).astype(dtype))
            return np.concatenate(parts)

        return self.columns.array("rows", (sorted(splits), val_fraction), compute) if splits else np.zeros(0, np.uint32)

    def bucket_numbers(self, buckets: Buckets) -> tuple[list[Size], np.ndarray]:
        """The sizes of all buckets that any row has, sorted, and the number of each row's among these."""
        settings, names = (buckets.sizes, repr(buckets.config)), ("width", "height")
        of_pair: dict[int, Size] = {}

        def pairs(block: pa.Table) -> np.ndarray:
            width, height = (pc.fill_null(block[name], 0).to_numpy().astype(np.uint64) for name in names)
            return width << np.uint64(32) | height

        def sizes() -> list[Size]:
            for block in self.blocks(*names):
                for pair in np.unique(pairs(block)).tolist():
                    if pair and pair not in of_pair:
                        of_pair[pair] = buckets.of(pair >> 32, pair & 0xFFFFFFFF)
            return sorted(set(of_pair.values()))

        distinct = [(int(w), int(h)) for w, h in self.columns.value("bucket-sizes", settings, sizes)]

        def numbers() -> np.ndarray:
            sizes()
            number_of = {size: number for number, size in enumerate(distinct)}
            known = np.array(sorted(of_pair), np.uint64)
            number = np.array([number_of[of_pair[pair]] for pair in known.tolist()] or [0])
            dtype = np.uint8 if len(distinct) < 2**8 else np.uint16
            of_block: Callable[[pa.Table], np.ndarray] = lambda block: number[  # noqa: E731
                np.searchsorted(known, pairs(block)).clip(max=len(number) - 1)
            ]
            return self._column(dtype, names, of_block)

        return distinct, self.columns.array("buckets", settings, numbers)

    def labels(self) -> list[str]:
        """The classes of all usable rows, sorted."""

        def compute() -> list[str]:
            labels = set[str]()
            for block in self.blocks("label", "reason"):
                labels.update(pc.unique(block["label"].filter(pc.is_null(block["reason"]))).to_pylist())
            return sorted(filter(None, labels))

        return list(self.columns.value("labels", (), compute))

    # ---------------------------------------------------------------------------------------------------------- masks

    def masks_by_source(self) -> dict[int, tuple[int, int]]:
        """Of each source with masks: how many of its usable images have one, and how many don't."""
        counts: dict[int, tuple[int, int]] = {}
        for block in self._should_have_masks():
            sources, present = (column.to_numpy() for column in (block["source"], pc.is_valid(block["mask_sha256"])))
            for n in np.unique(sources).tolist():
                masked, without = counts.get(n, (0, 0))
                of_source = present[sources == n]
                counts[n] = masked + int(of_source.sum()), without + int((~of_source).sum())
        return dict(sorted(counts.items()))

    def without_masks(self) -> Iterator[str]:
        """The names of usable images that should have a mask and have none."""
        for block in self._should_have_masks():
            yield from block.filter(pc.is_null(block["mask_sha256"]))["key"].to_pylist()

    def _should_have_masks(self) -> Iterator[pa.Table]:
        if self["mask_file"].null_count == len(self):
            return
        for block in self.blocks("key", "source", "reason", "mask_file", "mask_sha256"):
            yield block.filter(pc.and_(pc.is_null(block["reason"]), pc.is_valid(block["mask_file"])))

    # ----------------------------------------------------------------------------------------------------- bad samples

    def bad_samples(self) -> Iterator[BadSample]:
        for block in self.blocks("key", "reason", "fix") if self.bad_count() else ():
            yield from (BadSample(**row) for row in block.filter(pc.is_valid(block["reason"])).to_pylist())

    def bad_count(self) -> int:
        return len(self) - int(self["reason"].null_count)
