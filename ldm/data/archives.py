"""Pictures in few large files: WebDataset tars, parquet, and data sets that `datasets` opens, here or on the Hub."""

from __future__ import annotations

import itertools
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from webdataset.tariterators import group_by_keys

from ldm.data.records import (
    PICTURES,
    TABLE_ROW,
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

Sample = tuple[Record, bytes] | BadSample
CAPTIONS = (".txt", ".json")
HUGE = 2**34  # bytes of a member: no picture, so a damaged header
LONGEST = 2**20  # bytes of a caption's file
TARS = (".tar", ".tar.gz", ".tgz")


def expand(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that `data-{000..099}.tar`, `data/*.tar`, a folder or a URL of such mean, in order."""
    files: list[str] = []
    try:
        for pattern in braceexpand(path):
            system, root = url_to_fs(pattern)
            if system.isdir(root):
                inside = (name for name in system.find(root) if name.endswith(suffixes))
                files += [_named(system, name) for name in sorted(inside)]
            elif any(letter in root for letter in "*?["):
                files += [_named(system, name) for name in sorted(system.glob(root))]
            else:
                files.append(pattern)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data.source: can't list {path} ({' '.join(str(error).split())})") from None
    if not files:
        raise UserError(f"data.source: no file matches {path}; expected {' or '.join(suffixes)}")
    return files


def tars(urls: Sequence[str], options: ReadOptions) -> Records:
    """The samples of WebDataset tars: a picture, its captions in `.txt` or a key of `.json`, its class in another."""
    for url in urls:
        if not url.endswith(".tar"):
            raise UserError(f"data.source: {url} is compressed; unpack it to a .tar, or set data.streaming=true")
        for group in _groups(url, whole=False):
            if isinstance(group, BadSample):
                yield group
            else:
                sample = _record(url, group, options)
                yield sample if isinstance(sample, BadSample) else sample[0]


def tar_samples(url: str, options: ReadOptions) -> Iterator[Sample]:
    """The same of one tar, read from its beginning to its end, with the bytes of each picture."""
    for group in _groups(url, whole=True):
        if isinstance(group, BadSample):
            yield group
        else:
            sample = _record(url, group, options)
            yield sample if isinstance(sample, BadSample) else (sample[0], sample[1])


class _Header(tarfile.TarInfo):
    """A member's header. One that is damaged is an error, which tarfile takes for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from None


def _groups(url: str, whole: bool) -> Iterator[dict[str, Any] | BadSample]:
    """Samples as webdataset groups them: suffix → bytes, or a picture's place in the tar unless `whole`."""
    problems: list[BadSample] = []

    def problem(error: Exception) -> bool:
        text = str(error.args[0] if error.args else error).split(" dict_keys")[0]
        problems.append(BadSample(url, text, "give each file of a tar its own name"))
        return True

    def members(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r|*" if whole else "r:", tarinfo=_Header) as tar:
                tar.ended = False  # type: ignore[attr-defined]
                for member in tar:
                    if not 0 <= member.size < HUGE or member.offset < end:  # it would be read for ever
                        raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")
                    end = member.offset_data
                    suffix = Path(member.name).suffix.lower()
                    if suffix in CAPTIONS and (member.issparse() or member.size > LONGEST):
                        key = f"{Path(url).name}:{member.name}"
                        problems.append(BadSample(key, f"a caption of {member.size:,} bytes", "shorten it"))
                        continue
                    if not member.isreg() and suffix in PICTURES:
                        key = f"{Path(url).name}:{member.name}"
                        problems.append(
                            BadSample(key, "it is a link, a folder or a device", "store the picture itself")
                        )
                    if member.isreg() and suffix in (*CAPTIONS, *PICTURES):
                        small = suffix in CAPTIONS
                        data = tar.extractfile(member).read() if whole or small else member  # type: ignore[union-attr]
                        yield {"fname": member.name, "data": data, "__url__": url}
                    tar.members = []  # type: ignore[attr-defined]  # or it keeps them all
            if not tar.ended:  # type: ignore[attr-defined]
                raise tarfile.ReadError(f"it ends at byte {tar.offset} without the mark of an end")
        except Exception as error:  # tarfile raises whatever damaged headers make it stumble over
            problems.append(BadSample(url, f"the tar can't be read on ({error or error!r})", "fetch or write it anew"))

    try:
        with fsspec.open(url, "rb") as file:
            yield from group_by_keys(members(file), handler=problem)
    except Exception as error:  # whatever its file system raises
        problems.append(
            BadSample(url, f"it can't be read ({error or error!r})", "see that it is there and may be read")
        )
    yield from problems


def _record(url: str, group: dict[str, Any], options: ReadOptions) -> tuple[Record, Any] | BadSample:
    suffix = next((suffix for suffix in group if f".{suffix}" in PICTURES), None)
    key = f"{Path(url).name}:{group['__key__']}"
    if not suffix:
        return BadSample(key, "it has no picture (a name ends at its first dot)", "add one, or drop its other files")
    picture = group[suffix]
    try:
        if "txt" in group:
            captions = captions_of(group["txt"], options)
        elif "json" in group:
            captions = captions_of(_column(group["json"], "column", options.column, options.captions), options)
        elif not options.captions:
            captions = ("",)
        else:
            raise BadSampleError("it has no caption", "add a .txt or .json of the same name")
        labelled = options.label is not None and "json" in group
        label = label_of(_column(group["json"], "label", options.label, False)) if labelled else ""
    except BadSampleError as error:
        return BadSample(f"{key}.{suffix}", *error.args)
    where = ImageLocation(url) if isinstance(picture, bytes) else ImageLocation(url, picture.offset_data, picture.size)
    return Record(f"{key}.{suffix}", where, captions, label), picture


def _column(content: bytes, key: str, name: str | None, needed: bool) -> Any:
    """What a JSON has under the name that `data.source.KEY` gives."""
    try:
        return json.loads(content)[name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, KeyError | TypeError) and not needed:
            return None
        raise BadSampleError(
            f"its .json has no {name!r} ({' '.join(str(error).split())})", f"write it, or set data.source.{key}"
        ) from None


# ------------------------------------------------------------------------------------------------- tables of `datasets`


class Table:
    """A data set that `datasets` opens, with one picture a row, which stays encoded until it is asked for."""

    def __init__(
        self,
        path: str,
        kind: str,
        split: str,
        options: ReadOptions,
        image: str,
        streaming: bool = False,
        cache: str = "",
    ):
        import datasets  # with pandas, a second: only for those who have such a table

        self.options, self.image = options, image
        arguments: dict[str, Any] = {"split": split, "streaming": streaming, "cache_dir": cache or None}
        quiet = datasets.is_progress_bar_enabled()
        datasets.disable_progress_bars()
        try:
            if kind == "parquet":
                files = expand(path, (".parquet",))
                self.rows = datasets.load_dataset("parquet", data_files={split: files}, **arguments)
            elif (Path(path) / "dataset_dict.json").exists() or (Path(path) / "state.json").exists():
                table = datasets.load_from_disk(path)
                if isinstance(table, datasets.DatasetDict):
                    if split not in table:
                        raise UserError(
                            f"data.source.split: {path} has no {split!r}, but {', '.join(table)}; name one of them"
                        )
                    table = table[split]
                self.rows = table.to_iterable_dataset(min(64, len(table))) if streaming else table
            else:
                self.rows = datasets.load_dataset(path, **arguments)
            names = self.rows.column_names or list(next(iter(self.rows)))
            column = options.column if options.captions else None
            for key, name in (("column", column), ("label", options.label), ("image", image)):
                if name is not None and name not in names:
                    raise UserError(
                        f"data.source: {path} has no column {name!r} among {', '.join(names)}; set data.source.{key}"
                    )
            strings, raw = datasets.Value("string"), datasets.Value("binary")
            for text_type, binary_type in ((strings, raw), (datasets.List(strings), datasets.List(raw))):
                for name in (options.column, options.label):
                    if (self.rows.features or {}).get(name) == text_type:  # it may be no UTF-8
                        self.rows = self.rows.cast_column(name, binary_type)
            label = (self.rows.features or {}).get(options.label)
            self.classes: Sequence[str] = label.names if isinstance(label, datasets.ClassLabel) else ()
            if isinstance((self.rows.features or {}).get(image), datasets.Image):
                self.rows = self.rows.cast_column(image, datasets.Image(decode=False))
        except UserError:
            raise
        except Exception as error:  # datasets raises whatever its readers raise
            text = " ".join(str(error).split())[:200]
            here = "" if Path(path).exists() or kind == "parquet" else "there is no such folder here, and "
            raise UserError(f"data.source: {here}datasets can't open {path} ({type(error).__name__}: {text})") from None
        finally:
            if quiet:
                datasets.enable_progress_bars()
        self.name = Path(path.rstrip("/")).name
        self.folder = Path(path) if kind == "datasets" else None
        if not streaming:
            self.pictures = self.rows.select_columns([image])
            self.stamp: str = self.rows._fingerprint  # of its content, as datasets' own caches use it

    def samples(self, number: str = "", shard: int | None = None) -> Iterator[Sample]:
        """Record and picture of each row, or of those of one shard; `number` is what records call this table."""
        place = self.name if shard is None else f"{self.name}:{shard}"
        rows = iter(self.rows if shard is None else self._shard(shard))
        for i in itertools.count():
            key = f"{self.name}:{i}" if shard is None else f"{place}-{i}"
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:  # whatever its reader raises
                yield BadSample(
                    place, f"it can't be read on after row {i} ({error or error!r})", "fetch or write it anew"
                )
                return
            try:
                captions = captions_of(row.get(self.options.column), self.options)
                label = "" if self.options.label is None else label_of(row[self.options.label], self.classes)
                yield Record(key, ImageLocation(number, i, TABLE_ROW), captions, label), self._bytes(row)
            except BadSampleError as error:
                yield BadSample(key, *error.args)

    def _shard(self, shard: int) -> Iterator[dict[str, Any]]:
        """In batches, because rows by themselves would be divided among the loader's workers once more."""
        for batch in self.rows.shard(self.rows.num_shards, shard).iter(batch_size=16):
            yield from (dict(zip(batch, row, strict=True)) for row in zip(*batch.values(), strict=True))

    def picture(self, row: int) -> bytes:
        return self._bytes(self.pictures[row])

    def _file(self, path: Any) -> bytes | None:
        """A picture that a data set keeps beside its table, if it lies in its own folder or in the Hub's cache."""
        import datasets

        if not isinstance(path, str) or self.folder is None:  # a row of parquet may name any file
            return None
        if path.startswith("hf://"):
            with fsspec.open(path, "rb") as opened:
                return bytes(opened.read())
        places = (self.folder.resolve(), Path(datasets.config.HF_CACHE_HOME).resolve())
        file = Path(path).resolve()
        return file.read_bytes() if any(map(file.is_relative_to, places)) and file.is_file() else None

    def _bytes(self, row: dict[str, Any]) -> bytes:
        value = row[self.image]
        if isinstance(value, dict):
            value = value.get("bytes") or self._file(value.get("path"))
        if not isinstance(value, bytes):
            raise BadSampleError("its row has no picture, or only the name of one", "store the pictures' bytes in it")
        return value


# ---------------------------------------------------------------------------------------------------- bytes


def read_bytes(where: ImageLocation) -> bytes:
    """The bytes of a picture in a file or behind a URL."""
    if "://" not in where.file:
        with Path(where.file).open("rb") as file:
            file.seek(where.start)
            return file.read(where.size)
    system, path = url_to_fs(where.file)
    return system.cat_file(path, where.start, None if where.size < 0 else where.start + where.size)


TELLING = {"etag", "mtime", "last-modified", "last_modified", "lastmodified", "updated", "md5hash", "generation"}


def stamp(file: str, seen: dict[str, str]) -> str:
    """What tells that a file is as it was: size and time of a local one, what its system knows of another."""
    if file not in seen:
        try:
            if "://" in file:
                system, path = url_to_fs(file)
                facts_of = system.info(path)
                version = {name: str(facts_of[name]) for name in sorted(facts_of) if name.lower() in TELLING}
                seen[file] = repr(version) if version else ""
            else:
                facts = Path(file).stat()
                return f"{facts.st_size} {facts.st_mtime_ns} {facts.st_ctime_ns} {facts.st_ino}"
        except Exception:  # whatever its file system raises: then it is opened, and that says what is wrong
            seen[file] = ""
    return seen[file]


def _named(system: Any, path: str) -> str:
    return path if "file" in system.protocol else system.unstrip_protocol(path)
