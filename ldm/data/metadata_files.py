"""Metadata files: tables that name images, with their captions and classes."""

from __future__ import annotations

import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm.data.folder_tree import OTHER_SPLITS, FolderTree
from ldm.data.formats import is_image_file
from ldm.data.records import (
    NO_MASK,
    BadSample,
    BadSampleError,
    ImageLocation,
    LeftOut,
    ReadOptions,
    Record,
    Records,
    captions_of,
    label_of,
    one_line,
    unique_keys,
)
from ldm.data.unread_files import METADATA, SIDECARS, UNREAD_CAPTIONS, unread_file
from ldm.utils.errors import UserError


def metadata_files(folder: Path) -> list[Path]:
    """The first metadata file of the folder itself or, where it has none, of each of its sub-folders."""
    if any((folder / name).exists() for name in METADATA):
        return [next(folder / name for name in METADATA if (folder / name).exists())]
    return [
        directory.path / next(name for name in METADATA if name in directory.names)
        for directory in FolderTree(folder).walk()
        if not set(METADATA).isdisjoint(directory.names)
    ]


def read_metadata(tree: FolderTree, options: ReadOptions) -> Records:
    """The images that `metadata.jsonl`, `.csv` or `.parquet` name, relative to the file's own folder."""
    tables = metadata_files(tree.path)
    named: set[int] = set()  # hashes, which take less memory than the names
    for table in tables:
        if tree.in_other_split(table.relative_to(tree.path)):
            continue
        if isinstance(reason := tree.file(tree.key(table)), str):
            raise UserError(f"{table}: {reason}; write it into the folder")
        for record in _table(tree, table, options):
            if isinstance(record, str):
                named.add(hash(one_line(record)))
            else:
                yield record
    for directory in tree.walk():
        yield from (file for file in directory.left_out if file.reason == OTHER_SPLITS or hash(file.key) not in named)
        stems = {stem for name in directory.names if is_image_file(name) for stem in (name, Path(name).stem)}
        for name in directory.names:
            if directory.path / name in tables:
                continue
            key = tree.key(directory.path / name)
            if hash(one_line(key)) in named:
                continue
            unnamed = LeftOut(key, "images that no row names")
            if is_image_file(name):
                yield unnamed
            elif name.lower().endswith(SIDECARS) and Path(name).stem in stems:
                yield LeftOut(key, UNREAD_CAPTIONS)
            else:
                file = unread_file(directory.path / name, key)
                yield unnamed if isinstance(file, BadSample) else file


def _table(tree: FolderTree, table: Path, options: ReadOptions) -> Iterator[Record | BadSample | LeftOut | str]:
    """The record of each row, after the name of its image, relative to the source, where it has one.

    At the end, the columns that are not read.
    """
    column, prefix = options.column, table.parent.relative_to(tree.path)
    read = {"file_name", *([column] if options.captions else []), options.label, options.mask}
    unread = dict[str, None]()
    for number, row in _rows(table, options):
        row_key = f"{table} {'row' if table.suffix == '.parquet' else 'line'} {number}"
        if isinstance(row, BadSampleError):
            yield BadSample(row_key, *row.args)
            continue
        unread |= dict.fromkeys(name for name in row if name not in read)
        name = row.get("file_name")
        if not isinstance(name, str) or not name:
            yield BadSample(row_key, "it has no file_name", "name the image, relative to the folder")
            continue
        key = _key(prefix, name)
        image = _relative(tree, key)
        yield image
        row_key = f"{row_key}, {name!r}"
        if tree.in_other_split(Path(image)):
            if isinstance(tree.file(key), str) or not is_image_file(key):  # or it counts with its image
                yield LeftOut(row_key, "rows of other splits")
            continue
        path = tree.file(key)
        if isinstance(path, str):
            yield BadSample(row_key, path, f"name a file inside {tree.path}")
            continue
        try:
            if options.captions and column not in row:
                raise BadSampleError(f"it has no {column!r}", "write it, or set data.source.caption_column")
            captions = captions_of(row.get(column), options)
            label = label_of(row.get(options.label)) if options.label is not None else ""
            mask = _mask(tree, prefix, row[options.mask]) if options.mask and row.get(options.mask) else None
        except BadSampleError as error:
            yield BadSample(row_key, *error.args)
            continue
        if mask:
            yield mask[0]
        location = mask[1] if mask else NO_MASK if options.mask else None
        yield Record(image, ImageLocation(str(path)), captions, label, mask=location)
    yield from (LeftOut(f"{tree.key(table)}: {name}", "columns that are not read") for name in unread)


def _key(prefix: Path, name: str) -> str:
    """The name of a file that a metadata file in the folder `prefix` names."""
    return str(prefix / name) if prefix.parts else name


def _relative(tree: FolderTree, key: str) -> str:
    return os.path.relpath(tree.path / key, tree.path) if Path(key).is_absolute() else os.path.normpath(key)


def _mask(tree: FolderTree, prefix: Path, value: Any) -> tuple[str, ImageLocation]:
    """The name of a mask's file, relative to the source, and its location; BadSampleError where it can't be read."""
    name = os.fsdecode(value) if isinstance(value, bytes) else value
    if not isinstance(name, str):
        raise BadSampleError(f"its mask is {name!r}", "name a file, relative to the folder")
    path = tree.file(_key(prefix, name))
    if isinstance(path, str):
        raise BadSampleError(f"its mask {name}: {path}", f"name a file inside {tree.path}")
    return _relative(tree, _key(prefix, name)), ImageLocation(str(path))


def _rows(file: Path, options: ReadOptions) -> Iterator[tuple[int, dict[str, Any] | BadSampleError]]:
    """Number, from 1, and content of each row, or the reason why it is bad; UserError where the file is no table."""
    try:
        if file.suffix == ".jsonl":
            with file.open("rb") as handle:
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        content = _json_row(line)
                        fix = f'write {{"file_name": "a.png", "{options.column}": "…"}}'
                        yield number, BadSampleError(content, fix) if isinstance(content, str) else content
            return
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                names = table.schema_arrow.names
                _check_columns(file, names, options)
                columns = [name for name in names if name in ("file_name", options.column, options.label, options.mask)]
                unread = dict.fromkeys(name for name in names if name not in columns)
                number = 0
                for batch in table.iter_batches(4096, columns=columns):
                    for values in zip(*(_raw(batch[name]).to_pylist() for name in columns), strict=True):
                        number += 1
                        cells = unread | dict(zip(columns, values, strict=True))
                        if isinstance(cells["file_name"], bytes):
                            cells["file_name"] = os.fsdecode(cells["file_name"])
                        yield number, cells
            return
        csv.field_size_limit(sys.maxsize)
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.DictReader(text, strict=True)  # or an open quote swallows what follows
            _check_columns(file, list(reader.fieldnames or []), options)
            while True:
                first = reader.reader.line_num + 1  # DictReader's own count stands still after an error
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    last = reader.reader.line_num
                    end = f", so lines {first} to {last} are lost" if last > first else ""
                    yield first, BadSampleError(f"it is no CSV ({error}){end}", "close its quotes")
                    continue
                if row is None:
                    return
                if surplus := row.pop(None, None):  # type: ignore[call-overload]  # DictReader's key of such cells
                    reason = f"it has {len(surplus)} more cells than the header"
                    yield reader.line_num, BadSampleError(reason, 'put a caption with commas in quotes: "a, b"')
                else:
                    yield reader.line_num, row
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise UserError(f"{file}: can't be read ({' '.join(str(error).split())}); write it anew") from None


def _json_row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig"), object_pairs_hook=unique_keys)
    except UnicodeDecodeError as error:
        return f"it is not UTF-8 ({error.reason} at byte {error.start})"
    except (ValueError, RecursionError) as error:
        return f"it is no JSON ({error})"
    return row if isinstance(row, dict) else "it is no JSON object"


def _raw(strings: pa.Array) -> pa.Array:
    """Strings, or lists of them, as bytes, since they may not be UTF-8."""
    arrow_type = strings.type
    if pa.types.is_string(arrow_type) or pa.types.is_large_string(arrow_type):
        return strings.cast(pa.large_binary())
    if pa.types.is_list(arrow_type) and pa.types.is_string(arrow_type.value_type):
        return strings.cast(pa.list_(pa.binary()))
    return strings


def _check_columns(file: Path, names: list[str], options: ReadOptions) -> None:
    for name, alternative in (
        ("file_name", ""),
        (options.column if options.captions else None, ", or name the one with captions in data.source.caption_column"),
        (options.label, ", or name the one with classes in data.source.label"),
        (options.mask, ", or name the one with masks in data.source.mask"),
    ):
        if name is not None and name not in names:
            raise UserError(f"{file}: no column {name!r} among {', '.join(names) or 'none'}; add it{alternative}")
        if name is not None and names.count(name) > 1:
            raise UserError(f"{file}: {names.count(name)} columns are named {name!r}; rename all but one")
