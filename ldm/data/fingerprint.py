"""What a fingerprint is made of: the content of images and masks, captions, classes, and how often each is drawn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ldm.data.arrow_columns import BLOCK, leading_bytes, take_rows

COLUMNS = ("captions", "sha256", "weight", "repeats", "flip", "dropout", "label", "mask_sha256")
MAX_SINGLE = 2**22  # rows that are entered one by one, in half a minute: as version 0.1 did, whose runs continue


def fingerprint_bytes(table: pa.Table, rows: np.ndarray) -> Iterator[bytes | memoryview]:
    """Bytes that tell some rows of an index from any others: row by row or, of many, column by column of a block."""
    if len(rows) <= MAX_SINGLE:
        *columns, masks = ((v for part in take_rows(table[name], rows) for v in part.to_pylist()) for name in COLUMNS)
        for *row, mask in zip(*columns, masks, strict=True):
            yield repr((*row, *([] if mask is None else [mask]))).encode()
        return
    yield f"{len(rows)} rows".encode()
    for start in range(0, len(rows), BLOCK):
        for name in COLUMNS:
            yield from _content(pa.concat_arrays(list(take_rows(table[name], rows[start : start + BLOCK]))))


def _content(array: pa.Array) -> Iterator[bytes | memoryview]:
    """Bytes that tell an array from others of its length: which values are null; lengths and content of the rest."""
    yield np.packbits(array.is_valid().to_numpy(zero_copy_only=False)).data
    values = array.drop_null()
    if pa.types.is_large_list(values.type):
        yield values.value_lengths().to_numpy().data
        yield from _content(values.flatten())
    elif pa.types.is_large_string(values.type):
        yield pc.binary_length(values).to_numpy().data
        _, offsets, characters = values.buffers()
        start, end = np.frombuffer(offsets, np.int64)[[values.offset, values.offset + len(values)]]
        yield memoryview(characters or b"")[start:end]
    elif pa.types.is_fixed_size_binary(values.type):
        yield leading_bytes(pa.chunked_array([values]), values.type.byte_width).data
    else:
        yield values.to_numpy(zero_copy_only=False).data
