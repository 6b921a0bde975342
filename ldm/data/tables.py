"""Tables of images that the library `datasets` opens: parquet, data sets on disk, and data sets of the Hub."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec

from ldm.data.archives import files_of_split
from ldm.data.records import (
    MASK_ROW,
    NO_MASK,
    TABLE_ROW,
    BadSample,
    BadSampleError,
    ImageLocation,
    LeftOut,
    ReadOptions,
    Record,
    Sample,
    captions_of,
    label_of,
)
from ldm.utils.errors import UserError


class Table:
    """A data set that `datasets` opens, with one image a row. Images stay encoded."""

    def __init__(
        self,
        path: str,
        kind: str,
        split: str,
        options: ReadOptions,
        image_column: str,
        streaming: bool = False,
        cache_dir: str = "",
    ):
        import datasets  # with pandas, a second: only for those who have such a table

        self.options, self.image_column = options, image_column
        self.left_out: list[LeftOut] = []
        self._files: list[str] = []  # of parquet
        progress_bars = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            self.rows: Any = self._load(path, kind, split, streaming, cache_dir)
            self._check_columns(path)
            self._prepare_columns()
        except UserError:
            raise
        except Exception as error:  # the readers of datasets may raise anything
            error = error.__cause__ if isinstance(error.__cause__, Exception) else error  # datasets wraps what it meets
            text = " ".join(str(error).split())[:200]
            missing = "" if Path(path).exists() or kind == "parquet" else "there is no such folder here, and "
            message = f"{missing}datasets can't open {path} ({type(error).__name__}: {text})"
            if damaged := _first_damaged(self._files, error):
                message += f"; {damaged} is damaged: fetch or write it anew"
            raise UserError(f"data.source: {message}") from None
        finally:
            if progress_bars:
                datasets.enable_progress_bars()
        self.name = Path(path.rstrip("/")).name
        self.folder = Path(path) if kind == "datasets" else None
        if not streaming:
            self.image_rows = self.rows.select_columns([image_column])
            self.mask_rows = self.rows.select_columns([options.mask]) if options.mask else None
            self.stamp: str = self.rows._fingerprint  # of its content, as datasets' own caches use it

    def _load(self, path: str, kind: str, split: str, streaming: bool, cache_dir: str) -> Any:
        """The rows of a split, as a `Dataset` or, with `streaming`, an `IterableDataset`."""
        import datasets

        arguments: dict[str, Any] = {"split": split, "streaming": streaming, "cache_dir": cache_dir or None}
        if kind == "parquet":
            self._files, self.left_out = files_of_split(path, (".parquet",), split)
            return datasets.load_dataset("parquet", data_files={split: self._files}, **arguments)
        if not any((Path(path) / name).exists() for name in ("dataset_dict.json", "state.json")):
            table = datasets.load_dataset(path, **arguments)
            self._leave_out_splits(path, table.info.splits or (), split)
            return table
        table = datasets.load_from_disk(path)
        if isinstance(table, datasets.DatasetDict):
            if split not in table:
                raise UserError(f"data.source.split: {path} has no {split!r}, but {', '.join(table)}; name one of them")
            self._leave_out_splits(path, table, split)
            table = table[split]
        return table.to_iterable_dataset(min(64, len(table))) if streaming else table

    def _leave_out_splits(self, path: str, names: Iterable[str], split: str) -> None:
        prefix = Path(path.rstrip("/")).name
        self.left_out += [LeftOut(f"{prefix}: {name}", "other splits") for name in names if name != split]

    def _check_columns(self, path: str) -> None:
        names = self.rows.column_names or list(next(iter(self.rows)))
        captions = self.options.column if self.options.captions else None
        keys = ("caption_column", captions), ("label", self.options.label), ("image", self.image_column)
        for key, name in (*keys, ("mask", self.options.mask)):
            if name is not None and name not in names:
                raise UserError(
                    f"data.source: {path} has no column {name!r} among {', '.join(names)}; set data.source.{key}"
                )
        read = {captions, self.options.label, self.image_column, self.options.mask}
        label = f"{Path(path.rstrip('/')).name}: "
        self.left_out += [LeftOut(label + name, "columns that are not read") for name in names if name not in read]

    def _prepare_columns(self) -> None:
        """Has texts read as bytes, since they may not be UTF-8, and images as they are stored; sets `classes`."""
        import datasets

        for size in ("", "large_"):
            strings, raw = datasets.Value(f"{size}string"), datasets.Value(f"{size}binary")
            for text_type, binary_type in ((strings, raw), (datasets.List(strings), datasets.List(raw))):
                for name in (self.options.column, self.options.label):
                    if (self.rows.features or {}).get(name) == text_type:
                        self.rows = self.rows.cast_column(name, binary_type)
        label = (self.rows.features or {}).get(self.options.label)
        self.classes: Sequence[str] = label.names if isinstance(label, datasets.ClassLabel) else ()
        for name in (self.image_column, self.options.mask):
            if name and isinstance((self.rows.features or {}).get(name), datasets.Image):
                self.rows = self.rows.cast_column(name, datasets.Image(decode=False))

    def samples(self, source: str = "", shard: int | None = None) -> Iterator[Sample]:
        """Record and encoded image of each row, or of each row of one shard.

        `source` is the number of the table among the run's sources, by which records name it.
        """
        name = self.name if shard is None else f"{self.name}:{shard}"
        rows = iter(self.rows if shard is None else self._shard_rows(shard))
        for i in itertools.count():
            key = f"{self.name}:{i}" if shard is None else f"{name}-{i}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # the readers of datasets may raise anything
                reason = f"it can't be read on after {i} rows ({error or error!r})"
                yield BadSample(self._file_of(shard) or name, reason, "fetch or write it anew")
                return
            try:
                captions = captions_of(row.get(self.options.column), self.options)
                label = "" if self.options.label is None else label_of(row[self.options.label], self.classes)
                location, mask = ImageLocation(source, i, TABLE_ROW), self._mask_location(row, source, i)
                yield Record(key, location, captions, label, mask=mask), self._encoded(row, self.image_column)
            except BadSampleError as error:
                yield BadSample(key, *error.args)

    def _file_of(self, shard: int | None) -> str:
        """The file that is a shard of parquet; empty where none alone is."""
        return self._files[shard] if shard is not None and len(self._files) == self.rows.num_shards else ""

    def _shard_rows(self, shard: int) -> Iterator[dict[str, Any]]:
        """In batches, because `datasets` would divide single rows among the loader's workers once more."""
        for batch in self.rows.shard(self.rows.num_shards, shard).iter(batch_size=16):
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))

    def image_bytes(self, row: int) -> bytes:
        """The encoded image of a row."""
        return self._encoded(self.image_rows[row], self.image_column)

    def mask_bytes(self, row: int) -> bytes:
        """The encoded mask of a row."""
        assert self.options.mask and self.mask_rows is not None, "a mask is only located where a column has them"
        return self._encoded(self.mask_rows[row], self.options.mask)

    def _mask_location(self, row: dict[str, Any], source: str, number: int) -> ImageLocation | None:
        if not self.options.mask:
            return None
        return NO_MASK if row[self.options.mask] is None else ImageLocation(source, number, MASK_ROW)

    def _encoded(self, row: dict[str, Any], column: str) -> bytes:
        value = row[column]
        if isinstance(value, dict):
            value = value.get("bytes") or self._file_bytes(value.get("path"))
        if not isinstance(value, bytes):
            reason = f"its row has no {'image' if column == self.image_column else 'mask'}, or only the name of one"
            raise BadSampleError(reason, "store the images' bytes in it")
        return value

    def _file_bytes(self, path: Any) -> bytes | None:
        """An image that is stored beside its table: only from the data set's own folder or the Hub's cache."""
        import datasets

        if not isinstance(path, str) or self.folder is None:  # a row of parquet may name any file
            return None
        if path.startswith("hf://"):
            with fsspec.open(path, "rb") as opened:
                return bytes(opened.read())
        allowed = (self.folder.resolve(), Path(datasets.config.HF_CACHE_HOME).resolve())
        file = Path(path).resolve()
        return file.read_bytes() if any(map(file.is_relative_to, allowed)) and file.is_file() else None


def _first_damaged(files: Iterable[str], error: Exception) -> str | None:
    """The first of the parquet files whose footer can't be read, if the error is Arrow's."""
    from pyarrow import ArrowInvalid, parquet

    for file in files if isinstance(error, ArrowInvalid) else ():
        try:
            with fsspec.open(file, "rb") as opened:
                parquet.read_metadata(opened)
        except ArrowInvalid:
            return file
        except Exception:  # a remote file system may raise anything
            continue
    return None
