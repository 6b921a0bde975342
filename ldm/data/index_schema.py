"""The columns of an index."""

from __future__ import annotations

import pyarrow as pa

TEXT = pa.large_string()  # the captions of 36 million images exceed the 2 GiB of 32-bit offsets
SCHEMA = pa.schema(
    [
        ("key", TEXT),
        ("file", TEXT),
        ("start", pa.int64()),
        ("size", pa.int64()),
        ("captions", pa.large_list(TEXT)),
        ("label", TEXT),
        ("split", TEXT),
        ("weight", pa.float64()),
        ("repeats", pa.int32()),
        ("flip", pa.bool_()),
        ("dropout", pa.float64()),
        ("attributes", TEXT),
        ("source", pa.int32()),
        ("reason", TEXT),
        ("fix", TEXT),
        ("stamp", pa.binary(16)),
        ("sha256", pa.binary(32)),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("phash", pa.uint64()),
        ("mask_file", TEXT),
        ("mask_start", pa.int64()),
        ("mask_size", pa.int64()),
        ("mask_sha256", pa.binary(32)),
    ]
)
RECORD_COLUMNS = ("key", "label", "split", "weight", "repeats", "flip", "dropout")  # fields of a record, as they are
# What opening an image adds to its record; the last is not in indices that were written before there were masks.
READ_COLUMNS = ("sha256", "width", "height", "phash", "reason", "fix", "mask_sha256")
MASK_COLUMNS = ("mask_file", "mask_start", "mask_size")  # where a record's mask is
