"""Images in WebDataset tars, and the bytes of single images in files, tars and behind URLs."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from webdataset.tariterators import group_by_keys

from ldm.data.formats import IMAGE_SUFFIXES, REMEDIES
from ldm.data.layout import choose_split
from ldm.data.records import (
    BadSample,
    BadSampleError,
    ImageLocation,
    LeftOut,
    ReadOptions,
    Record,
    Records,
    Sample,
    captions_of,
    label_of,
)
from ldm.utils.errors import UserError

TEXTS = (".txt", ".caption", ".json", ".cls")
MAX_MEMBER_BYTES = 2**34  # no image is larger: the header is damaged
MAX_CAPTION_BYTES = 2**20
TARS = (".tar", ".tar.gz", ".tgz")


def expand(path: str, suffixes: tuple[str, ...]) -> list[str]:
    """The files that a pattern (`data-{000..099}.tar`, `data/*.tar`), a folder or a URL stands for, in order."""
    files: list[str] = []
    try:
        for pattern in braceexpand(path):
            system, root = url_to_fs(pattern)
            if system.isdir(root):
                names = (name for name in system.find(root) if name.endswith(suffixes))
                files += [_with_protocol(system, name) for name in sorted(names)]
            elif any(character in root for character in "*?["):
                files += [_with_protocol(system, name) for name in sorted(system.glob(root))]
            else:
                files.append(pattern)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data.source: can't list {path} ({' '.join(str(error).split())})") from None
    if not files:
        raise UserError(f"data.source: no file matches {path}; expected {' or '.join(suffixes)}")
    return files


def files_of_split(path: str, suffixes: tuple[str, ...], split: str) -> tuple[list[str], list[LeftOut]]:
    """The files of a pattern, folder or URL that belong to a split by their names, and those of other splits."""
    files = expand(path, suffixes)
    chosen = choose_split(files, split, path)
    others = set(files).difference(chosen)
    return chosen, [LeftOut(file, "files of other splits") for file in files if file in others]


def tar_records(urls: Sequence[str], options: ReadOptions) -> Records:
    """The samples of WebDataset tars: an image, its captions in `.txt`, `.caption` or a key of `.json`, its class in
    another, or in `.cls`.
    """
    for url in urls:
        if not url.endswith(".tar"):
            raise UserError(f"data.source: {url} is compressed; unpack it to a .tar, or set data.streaming=true")
        for group in _groups(url, with_bytes=False):
            if isinstance(group, BadSample | LeftOut):
                yield group
            else:
                sample = _record(url, group, options)
                yield sample if isinstance(sample, BadSample) else sample[0]


def tar_samples(url: str, options: ReadOptions) -> Iterator[Sample | LeftOut]:
    """The samples of one tar, read sequentially, with the bytes of each image."""
    for group in _groups(url, with_bytes=True):
        if isinstance(group, BadSample | LeftOut):
            yield group
        else:
            sample = _record(url, group, options)
            yield sample if isinstance(sample, BadSample) else (sample[0], sample[1])


class _Header(tarfile.TarInfo):
    """A member's header. A damaged one raises ReadError; tarfile alone would take it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> _Header:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            tar.ended = True  # type: ignore[attr-defined]
            raise
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(f"{error} at byte {tar.offset}") from None


def _groups(url: str, with_bytes: bool) -> Iterator[dict[str, Any] | BadSample | LeftOut]:
    """Samples as webdataset groups them: suffix → bytes. Without `with_bytes`, an image is its header in the tar."""
    problems: list[BadSample | LeftOut] = []

    def note_problem(error: Exception) -> bool:
        text = str(error.args[0] if error.args else error).split(" dict_keys")[0]
        problems.append(BadSample(url, text, "give each file of a tar its own name"))
        return True

    def members(file: IO[bytes]) -> Iterator[dict[str, Any]]:
        end = 0
        try:
            with tarfile.open(fileobj=file, mode="r|*" if with_bytes else "r:", tarinfo=_Header) as tar:
                tar.ended = False  # type: ignore[attr-defined]
                for member in tar:
                    if not 0 <= member.size < MAX_MEMBER_BYTES or member.offset < end:  # or the loop never ends
                        raise tarfile.ReadError(f"{member.name} claims {member.size} bytes")
                    end = member.offset_data
                    suffix = Path(member.name).suffix.lower()
                    key = f"{Path(url).name}:{member.name}"
                    hidden = Path(member.name).name.startswith(".") or "__MACOSX" in Path(member.name).parts
                    if hidden and not member.isdir():
                        problems.append(LeftOut(key, "hidden files"))
                        continue
                    if suffix in TEXTS and (member.issparse() or member.size > MAX_CAPTION_BYTES):
                        problems.append(BadSample(key, f"a caption of {member.size:,} bytes", "shorten it"))
                        continue
                    if not member.isreg() and suffix in IMAGE_SUFFIXES:
                        problems.append(BadSample(key, "it is a link, a folder or a device", "store the image itself"))
                    if member.isreg() and (suffix in TEXTS or suffix in IMAGE_SUFFIXES or suffix in REMEDIES):
                        read = with_bytes or suffix in TEXTS
                        data = tar.extractfile(member).read() if read else member  # type: ignore[union-attr]
                        yield {"fname": member.name, "data": data, "__url__": url}
                    elif member.isreg():
                        problems.append(LeftOut(key, "other files"))
                    tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header in memory
            if not tar.ended:  # type: ignore[attr-defined]
                raise tarfile.ReadError(f"it ends at byte {tar.offset} without the mark of an end")
        except Exception as error:  # damaged headers make tarfile raise anything
            problems.append(BadSample(url, f"the tar can't be read on ({error or error!r})", "fetch or write it anew"))

    try:
        with fsspec.open(url, "rb") as file:
            for group in group_by_keys(members(file), handler=note_problem):
                yield from _left_out_so_far(problems)
                yield group
    except Exception as error:  # a remote file system may raise anything
        reason = f"it can't be read ({error or error!r})"
        problems.append(BadSample(url, reason, "see that it is there and may be read"))
    yield from problems


def _left_out_so_far(problems: list[BadSample | LeftOut]) -> Iterator[LeftOut]:
    """Takes what is left out from the list, which stays short: bad members are reported at the end of the tar."""
    yield from (problem for problem in problems if isinstance(problem, LeftOut))
    problems[:] = [problem for problem in problems if isinstance(problem, BadSample)]


def _record(url: str, group: dict[str, Any], options: ReadOptions) -> tuple[Record, Any] | BadSample:
    """The record of a group, and its image: bytes, or the header in the tar."""
    suffix = next((suffix for suffix in group if f".{suffix}" in IMAGE_SUFFIXES), None)
    key = f"{Path(url).name}:{group['__key__']}"
    unread = next((suffix for suffix in group if f".{suffix}" in REMEDIES), None)
    if not suffix and unread:
        return BadSample(f"{key}.{unread}", f"images of type .{unread} aren't read here", REMEDIES[f".{unread}"])
    if not suffix:
        return BadSample(key, "it has no image (a name ends at its first dot)", "add one, or drop its other files")
    image = group[suffix]
    try:
        if text := next((name for name in ("txt", "caption") if name in group), None):
            captions = captions_of(group[text], options)
        elif "json" in group:
            captions = captions_of(
                _json_value(group["json"], "caption_column", options.column, options.captions), options
            )
        elif not options.captions:
            captions = ("",)
        else:
            raise BadSampleError("it has no caption", "add a .txt or .json of the same name")
        label = _label(group, options)
    except BadSampleError as error:
        return BadSample(f"{key}.{suffix}", *error.args)
    location = ImageLocation(url) if isinstance(image, bytes) else ImageLocation(url, image.offset_data, image.size)
    return Record(f"{key}.{suffix}", location, captions, label), image


def _label(group: dict[str, Any], options: ReadOptions) -> str:
    """The class of a sample: a key of its `.json`, or else its `.cls`."""
    if options.label is None:
        return ""
    label = label_of(_json_value(group["json"], "label", options.label, False)) if "json" in group else ""
    return label or label_of(group.get("cls"))


def _json_value(content: bytes, key: str, name: str | None, required: bool) -> Any:
    """The value of `name` in a JSON object; `key` is the key of `data.source` that sets `name`."""
    try:
        return json.loads(content)[name]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, KeyError | TypeError) and not required:
            return None
        raise BadSampleError(
            f"its .json has no {name!r} ({' '.join(str(error).split())})", f"write it, or set data.source.{key}"
        ) from None


def read_bytes(location: ImageLocation) -> bytes:
    """The encoded bytes of an image in a file or behind a URL."""
    if "://" not in location.file:
        with Path(location.file).open("rb") as file:
            file.seek(location.start)
            return file.read(location.size)
    system, path = url_to_fs(location.file)
    return system.cat_file(path, location.start, None if location.size < 0 else location.start + location.size)


# What remote file systems report of a file that changes with its content.
VERSION_FIELDS = {"etag", "mtime", "last-modified", "last_modified", "lastmodified", "updated", "md5hash", "generation"}


def stamp(file: str, cache: dict[str, str]) -> str:
    """A text that changes with a file: size and times of a local one, what its file system reports of a remote one.

    Empty where that is unknown. `cache` keeps the stamps of remote files, and of those that can't be read.
    """
    if file not in cache:
        try:
            if "://" in file:
                system, path = url_to_fs(file)
                info = system.info(path)
                version = {name: str(info[name]) for name in sorted(info) if name.lower() in VERSION_FIELDS}
                cache[file] = repr(version) if version else ""
            else:
                status = Path(file).stat()
                return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"
        except Exception:  # opening the file will report what is wrong
            cache[file] = ""
    return cache[file]


def _with_protocol(system: Any, path: str) -> str:
    return path if "file" in system.protocol else system.unstrip_protocol(path)
