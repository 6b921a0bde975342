"""What earlier indices of a run's images hold, so that an unchanged image is not opened again."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ldm.data.arrow_columns import leading_bytes
from ldm.data.images import may_be_read_now
from ldm.data.index_schema import READ_COLUMNS, SCHEMA


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
        table = pa.concat_tables(tables)
        prefixes = leading_bytes(table["stamp"], 8).view(">u8").ravel().astype(np.uint64)
        self.count = len(prefixes)
        self.order = np.argsort(prefixes, kind="stable").astype(np.uint32 if self.count < 2**32 else np.uint64)
        self.prefixes = prefixes[self.order]  # half of the memory that whole stamps would take
        self.batches = table.to_batches()
        self.ends = np.cumsum([batch.num_rows for batch in self.batches])

    def find(self, row_stamp: bytes) -> dict[str, Any] | None:
        """READ_COLUMNS of the image with this stamp; None where no earlier index has it, or today's decoders may."""
        if not self.count or row_stamp == bytes(16):
            return None
        prefix = np.uint64(int.from_bytes(row_stamp[:8]))
        for position in range(int(np.searchsorted(self.prefixes, prefix)), self.count):
            if self.prefixes[position] != prefix:
                break
            row = int(self.order[position])
            number = int(np.searchsorted(self.ends, row, side="right"))
            batch = self.batches[number]
            row += batch.num_rows - int(self.ends[number])
            if batch["stamp"][row].as_py() == row_stamp:
                columns = {name: batch[name][row].as_py() for name in READ_COLUMNS}
                return None if columns["reason"] and may_be_read_now(columns["reason"]) else columns
        return None


def _memory_map_leftover(path: Path) -> list[pa.RecordBatch]:
    """The memory-mapped batches of an index as far as it was written; none where the file is missing or empty."""
    batches: list[pa.RecordBatch] = []
    with suppress(OSError, pa.ArrowException), pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            batches.append(batch)
    return batches
