"""What earlier indices of a run's images hold, so that an unchanged image is not opened again."""

from __future__ import annotations

import bisect
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ldm.data.arrow_columns import leading_bytes
from ldm.data.images import may_be_read_now
from ldm.data.index_schema import READ_COLUMNS, SCHEMA
from ldm.data.key_lookup import sort_keys


class EarlierIndices:
    """What earlier indices hold of images that have not changed since, by stamp."""

    def __init__(self, paths: Sequence[Path]):
        schema = pa.schema([SCHEMA.field(name) for name in ("stamp", *READ_COLUMNS)])
        tables = [schema.empty_table()]
        for path in paths:
            batches = _memory_map_leftover(path)
            if batches and set(schema.names[:-1]) <= set(batches[0].schema.names):
                earlier = pa.Table.from_batches(batches)
                if schema.names[-1] not in earlier.column_names:
                    earlier = earlier.append_column(schema.field(-1), pa.nulls(len(earlier), schema.field(-1).type))
                with suppress(pa.ArrowException):  # another version's column types
                    tables.append(earlier.select(schema.names).cast(schema))
        self._table = pa.concat_tables(tables)
        self.count, self._batches = len(self._table), self._table.to_batches()
        self._ends = np.cumsum([batch.num_rows for batch in self._batches]).tolist()
        self._shift = 0  # from the position of the last image that was found to its row

    def find(self, row_stamp: bytes, position: int) -> dict[str, Any] | None:
        """READ_COLUMNS of the image with this stamp; None where no earlier index has it, or today's decoders may.

        `position` is the image's among all; where nothing was added or removed, that is its row.
        """
        if not self.count or row_stamp == bytes(16):
            return None
        for row in self._candidates(row_stamp, position):
            number = bisect.bisect_right(self._ends, row)
            batch, at = self._batches[number], row - self._ends[number]  # negative: from the batch's end
            if batch["stamp"][at].as_py() == row_stamp:
                self._shift = row - position
                columns = {name: batch[name][at].as_py() for name in READ_COLUMNS}
                return None if columns["reason"] and may_be_read_now(columns["reason"]) else columns
        return None

    def _candidates(self, row_stamp: bytes, position: int) -> Iterator[int]:
        """The rows that may have this stamp: the one after the last that was found, then those that begin like it."""
        if 0 <= (row := position + self._shift) < self.count:
            yield row
        prefixes, order = self._sorted
        prefix = np.uint64(int.from_bytes(row_stamp[:8]))
        for n in range(int(np.searchsorted(prefixes, prefix)), self.count):
            if prefixes[n] != prefix:
                break
            yield int(order[n])

    @cached_property
    def _sorted(self) -> tuple[np.ndarray, np.ndarray]:
        """The first halves of all stamps, sorted, and the row of each; made where an image is new or elsewhere."""
        prefixes = leading_bytes(self._table["stamp"], 8)
        order = np.empty(self.count, np.uint32 if self.count < 2**32 else np.uint64)
        start = 0
        for part in sort_keys(prefixes.view("S8").ravel()):
            order[start : start + len(part)] = part
            start += len(part)
        return prefixes.view(">u8").ravel()[order].astype(np.uint64), order


def _memory_map_leftover(path: Path) -> list[pa.RecordBatch]:
    """The memory-mapped batches of an index as far as it was written; none where the file is missing or empty."""
    batches: list[pa.RecordBatch] = []
    with suppress(OSError, pa.ArrowException), pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            batches.append(batch)
    return batches
