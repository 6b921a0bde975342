"""Folders of images: captions in one metadata file, in a file beside each image, or in the name of the folder.

Nothing outside the folder is read, whatever a metadata file or a symbolic link says.
"""

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

from ldm.data.records import (
    IMAGE_SUFFIXES,
    BadSample,
    BadSampleError,
    ImageLocation,
    ReadOptions,
    Record,
    Records,
    captions_of,
    label_of,
)
from ldm.utils.errors import UserError

METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
SIDECARS = (".txt", ".caption")


def metadata(folder: Path, options: ReadOptions) -> Records:
    """A folder with `metadata.jsonl`, `.csv` or `.parquet`: columns of file names, captions and classes."""
    column = options.column
    file = next(folder / name for name in METADATA if (folder / name).exists())
    if isinstance(reason := _inside(folder, file.name), str):
        raise UserError(f"{file}: {reason}; write it into the folder")
    for number, row in _rows(file, options):
        key = f"{file} {'row' if file.suffix == '.parquet' else 'line'} {number}"
        if isinstance(row, str):
            yield BadSample(key, row, f'write {{"file_name": "a.png", "{column}": "…"}}')
        elif not isinstance(name := row.get("file_name"), str) or not name:
            yield BadSample(key, "it has no file_name", "name the image, relative to the folder")
        else:
            path = _inside(folder, name)
            if isinstance(path, str):
                yield BadSample(f"{key}, {name!r}", path, f"name a file inside {folder}")
                continue
            try:
                if options.captions and column not in row:
                    raise BadSampleError(f"it has no {column!r}", "write it, or set data.source.caption_column")
                captions = captions_of(row.get(column), options)
                label = label_of(row.get(options.label)) if options.label is not None else ""
            except BadSampleError as error:
                yield BadSample(f"{key}, {name!r}", *error.args)
                continue
            yield Record(name, ImageLocation(str(path)), captions, label)


def sidecars(folder: Path, options: ReadOptions, extensions: tuple[str, ...] = SIDECARS, default: str = "") -> Records:
    """A folder and its subfolders of images, each with a caption file: `a.jpg` and `a.txt` or `a.caption`.

    `default` is the caption of an image that has none. Where classes are read, a subfolder is one.
    """
    for directory, names in walk(folder):
        present = set(names)
        for name in names:
            stem = Path(name).stem
            if not is_image_file(name):
                continue
            key = str((directory / name).relative_to(folder))
            path = _inside(folder, key)
            sidecar = next((stem + extension for extension in extensions if stem + extension in present), None)
            if isinstance(path, str):
                yield BadSample(key, path, f"copy it into {folder}")
                continue
            try:
                if sidecar:
                    file = _inside(folder, str((directory / sidecar).relative_to(folder)))
                    if isinstance(file, str):
                        raise BadSampleError(f"its caption file {sidecar}: {file}", f"copy it into {folder}")
                    captions = captions_of(file.read_bytes(), options)
                elif default or not options.captions:
                    captions = captions_of(default, options._replace(lines=False))
                else:
                    raise BadSampleError("it has no caption", f"write one into {stem}{extensions[0]} beside it")
            except BadSampleError as error:
                yield BadSample(key, *error.args)
                continue
            except OSError as error:
                yield BadSample(key, f"can't read {sidecar}: {error.strerror}", "let it be read")
                continue
            in_class = options.label is not None and directory != folder
            yield Record(key, ImageLocation(str(path)), captions, Path(key).parts[0] if in_class else "")


def classes(folder: Path, template: str, options: ReadOptions) -> Records:
    """A folder of class folders; the caption is the folder's name in `template`, whose `{}` it replaces."""
    for directory, names in walk(folder):
        for name in names:
            if not is_image_file(name):
                continue
            key = str((directory / name).relative_to(folder))
            path = _inside(folder, key)
            label = Path(key).parts[0] if directory != folder else ""
            if isinstance(path, str):
                yield BadSample(key, path, f"copy it into {folder}")
            elif not label:
                yield BadSample(key, "it is in no class folder", "move it into the folder of its class")
            else:
                try:
                    captions = captions_of(template.replace("{}", label.replace("_", " ")), options)
                    yield Record(key, ImageLocation(str(path)), captions, label)
                except BadSampleError as error:
                    yield BadSample(key, *error.args)


def is_image_file(name: str) -> bool:
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def walk(folder: Path) -> Iterator[tuple[Path, list[str]]]:
    """Each directory and the names of its files, sorted, without hidden ones and links to directories."""
    for directory, directories, names in os.walk(folder, onerror=_unreadable):
        names += [name for name in directories if is_image_file(name)]  # reported as bad: no files
        directories[:] = sorted(name for name in directories if not name.startswith((".", "__MACOSX")))
        yield Path(directory), sorted(name for name in names if not name.startswith("."))


def _unreadable(error: OSError) -> None:
    raise UserError(f"data.source: can't list {error.filename} ({error.strerror}); let it be read, or move it away")


def _inside(folder: Path, name: str) -> Path | str:
    """The path of the file `name` of the folder, or the reason why it can't be used."""
    try:
        name.encode()  # an index holds text: names of other bytes can't be written to it
        path = (folder / name).resolve()
        if not path.is_relative_to(folder.resolve()):
            return "it leads out of the folder"
        return path if path.is_file() else "it is no file" if path.exists() else "there is no such file"
    except (OSError, ValueError, RuntimeError) as error:  # a loop of links, a NUL, a name that is too long
        return f"it can't be followed ({error})"


def _rows(file: Path, options: ReadOptions) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """Number, from 1, and content of each row, or the reason why it is bad; UserError where the file is no table."""
    try:
        if file.suffix == ".jsonl":
            with file.open("rb") as handle:
                for number, line in enumerate(handle, start=1):
                    if line.strip():
                        yield number, _json_row(line)
            return
        if file.suffix == ".parquet":
            with pq.ParquetFile(file) as table:
                names = table.schema_arrow.names
                _check_columns(file, names, options)
                columns = [name for name in names if name in ("file_name", options.column, options.label)]
                number = 0
                for batch in table.iter_batches(4096, columns=columns):
                    for values in zip(*(_raw(batch[name]).to_pylist() for name in columns), strict=True):
                        number += 1
                        cells = dict(zip(columns, values, strict=True))
                        if isinstance(cells["file_name"], bytes):
                            cells["file_name"] = os.fsdecode(cells["file_name"])
                        yield number, cells
            return
        csv.field_size_limit(sys.maxsize)
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.DictReader(text, strict=True)  # or an open quote swallows what follows
            _check_columns(file, list(reader.fieldnames or []), options)
            while True:
                try:
                    row = next(reader, None)
                except csv.Error as error:
                    yield reader.line_num, f"it is no CSV ({error})"
                    continue
                if row is None:
                    return
                yield reader.line_num, row
    except (pa.ArrowException, OSError, csv.Error) as error:
        raise UserError(f"{file}: can't be read ({' '.join(str(error).split())}); write it anew") from None


def _json_row(line: bytes) -> dict[str, Any] | str:
    try:
        row = json.loads(line.decode("utf-8-sig"))
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
    ):
        if name is not None and name not in names:
            raise UserError(f"{file}: no column {name!r} among {', '.join(names) or 'none'}; add it{alternative}")
