"""Images in WebDataset tars, and the bytes of single images in files, tars and behind URLs."""

from __future__ import annotations

import contextlib
import json
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import fsspec
from braceexpand import braceexpand
from fsspec.core import url_to_fs
from webdataset.tariterators import base_plus_ext, group_by_keys

from ldm.data.formats import IMAGE_SUFFIXES, REMEDIES, is_image_file
from ldm.data.layout import choose_split
from ldm.data.records import (
    NO_MASK,
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
    unique_keys,
)
from ldm.data.unread_files import UNREAD_CAPTIONS
from ldm.utils.errors import UserError

TEXTS = (".txt", ".caption", ".json", ".cls")
MAX_MEMBER_BYTES = 2**34  # no image is larger: the header is damaged
MAX_CAPTION_BYTES = 2**20
TARS = (".tar", ".tar.gz", ".tgz")


def expand(path: str, suffixes: tuple[str, ...]) -> tuple[list[str], list[LeftOut]]:
    """The files that a pattern (`data-{000..099}.tar`, `data/*.tar`), a folder or a URL stands for, in order.

    And what is left out of a folder, or of what a pattern matches.
    """
    files, left_out = list[str](), list[LeftOut]()
    try:
        for pattern in braceexpand(path):
            system, root = url_to_fs(pattern)
            folder = system.isdir(root)
            if not folder and not any(character in root for character in "*?["):
                files.append(pattern)
                continue
            for name in sorted(system.find(root) if folder else system.glob(root)):
                if _is_hidden(name.removeprefix(root) if folder else Path(name).name):
                    left_out.append(LeftOut(_with_protocol(system, name), "hidden files"))
                elif folder and not name.endswith(suffixes):
                    reason = "images outside of the tars or tables" if is_image_file(name) else "other files"
                    left_out.append(LeftOut(_with_protocol(system, name), reason))
                else:
                    files.append(_with_protocol(system, name))
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"data.source: can't list {path} ({' '.join(str(error).split())})") from None
    if not files:
        raise UserError(f"data.source: no file matches {path}; expected {' or '.join(suffixes)}")
    return files, left_out


def _is_hidden(name: str) -> bool:
    """Whether a file or one of its folders is hidden, or was added by macOS."""
    return any(part == "__MACOSX" or (part.startswith(".") and part not in (".", "..")) for part in name.split("/"))


def files_of_split(path: str, suffixes: tuple[str, ...], split: str) -> tuple[list[str], list[LeftOut]]:
    """The files of a pattern, folder or URL that belong to a split by their names, and what is left out."""
    files, left_out = expand(path, suffixes)
    chosen = choose_split(files, split, path)
    others = set(files).difference(chosen)
    return chosen, [*left_out, *(LeftOut(file, "files of other splits") for file in files if file in others)]


def tar_records(urls: Sequence[str], options: ReadOptions) -> Records:
    """The samples of WebDataset tars: an image, its captions in `.txt`, `.caption` or a key of `.json`, its class in
    another, or in `.cls`.
    """
    unread_keys = set[str]()
    for url in urls:
        if not url.endswith(".tar"):
            raise UserError(f"data.source: {url} is compressed; unpack it to a .tar, or set data.streaming=true")
        for group in _groups(url, with_bytes=False):
            for sample in _samples(url, group, options, unread_keys):
                yield sample[0] if isinstance(sample, tuple) else sample


def tar_samples(url: str, options: ReadOptions, unread_keys: set[str]) -> Iterator[Sample | LeftOut]:
    """The samples of one tar, read sequentially, with the bytes of each image.

    `unread_keys` collects the keys of `.json` files that are not read, each of which is left out once.
    """
    for group in _groups(url, with_bytes=True):
        yield from _samples(url, group, options, unread_keys)


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
                    tar.members = []  # type: ignore[attr-defined]  # or tarfile keeps every header in memory
                    if _is_hidden(member.name):
                        if not member.isdir():
                            problems.append(LeftOut(key, "hidden files"))
                        continue
                    if suffix in TEXTS and (member.issparse() or member.size > MAX_CAPTION_BYTES):
                        problems.append(BadSample(key, f"a caption of {member.size:,} bytes", "shorten it"))
                        continue
                    known = suffix in TEXTS or suffix in IMAGE_SUFFIXES or suffix in REMEDIES
                    if not member.isreg() and suffix in IMAGE_SUFFIXES:
                        problems.append(BadSample(key, "it is a link, a folder or a device", "store the image itself"))
                    elif member.isreg() and known and base_plus_ext(member.name)[0] is None:
                        problems.append(BadSample(key, "a sample can't be named so", "rename it"))
                    elif member.isreg() and known:
                        read = with_bytes or suffix in TEXTS
                        data = tar.extractfile(member).read() if read else member  # type: ignore[union-attr]
                        yield {"fname": member.name, "data": data, "__url__": url}
                    elif not member.isdir():
                        problems.append(LeftOut(key, "other files"))
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


def _samples(
    url: str, group: dict[str, Any] | BadSample | LeftOut, options: ReadOptions, unread_keys: set[str]
) -> Iterator[tuple[Record, Any] | BadSample | LeftOut]:
    """The record of a group, with its image: bytes, or the header in the tar; and what of the group isn't read."""
    if isinstance(group, BadSample | LeftOut):
        yield group
        return
    key = f"{Path(url).name}:{group['__key__']}"
    members = [name for name in group if not name.startswith("__")]
    masks = [name for name in members if options.mask == Path(name).stem and Path(name).suffix in IMAGE_SUFFIXES]
    images = [name for name in members if f".{name}" in IMAGE_SUFFIXES]
    dotted = [name for name in members if "." in name and Path(name).suffix in (*IMAGE_SUFFIXES, *REMEDIES)]
    dotted = [name for name in dotted if name not in masks[:1] or not images]
    unread = [name for name in members if f".{name}" in REMEDIES]
    if not images and not unread:
        for name in dotted:
            yield BadSample(f"{key}.{name}", "a sample's name ends at its first dot", "rename it without other dots")
        if not dotted:
            yield BadSample(key, "it has no image", "add one, or drop its other files")
        return
    if not images:
        for name in unread:
            yield BadSample(f"{key}.{name}", f"images of type .{name} aren't read here", REMEDIES[f".{name}"])
        unread = []
    else:
        record = _record(url, key, group, images[0], options)
        if options.mask and isinstance(record, tuple):
            mask = _location(url, group[masks[0]]) if masks else NO_MASK
            record = (replace(record[0], mask=mask), record[1])
        yield record
    for name in members:
        if name in unread:
            yield LeftOut(f"{key}.{name}", "images that are read in another format")
        elif name in images[1:] or name in dotted:
            yield LeftOut(f"{key}.{name}", "other images of a sample")
        elif images and name not in (images[0], *masks, *_texts_read(group, images[0], options)):
            yield LeftOut(f"{key}.{name}", UNREAD_CAPTIONS if name != "cls" else "classes that are not read")
        elif images and name == "json":
            for unread_key in sorted(_unread_keys(group, images[0], options) - unread_keys):
                unread_keys.add(unread_key)
                yield LeftOut(f"{key}.json: {unread_key}", "keys of .json files that are not read")


def _unread_keys(group: dict[str, Any], image: str, options: ReadOptions) -> set[str]:
    read = {options.label, None if _caption_member(group, image) else options.column}
    with contextlib.suppress(ValueError, RecursionError):  # the sample is bad
        content = json.loads(group["json"])
        return {name for name in content if name not in read} if isinstance(content, dict) else set()
    return set()


def _caption_member(group: dict[str, Any], image: str) -> str | None:
    """The text file of a sample, which may repeat the image's suffix."""
    names = (f"{prefix}{text}" for prefix in ("", f"{image}.") for text in ("txt", "caption"))
    return next((name for name in names if name in group), None)


def _texts_read(group: dict[str, Any], image: str, options: ReadOptions) -> list[str]:
    """The members of a sample that are read beside its image: captions and class."""
    captions = _caption_member(group, image) or "json"
    return [captions] if options.label is None else [captions, "json", "cls"]


def _record(
    url: str, key: str, group: dict[str, Any], suffix: str, options: ReadOptions
) -> tuple[Record, Any] | BadSample:
    """The record of a group, and its image: bytes, or the header in the tar."""
    image = group[suffix]
    try:
        if text := _caption_member(group, suffix):
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
    return Record(f"{key}.{suffix}", _location(url, image), captions, label), image


def _location(url: str, member: Any) -> ImageLocation:
    """Where an image is: bytes that were read, or its header in the tar."""
    return ImageLocation(url) if isinstance(member, bytes) else ImageLocation(url, member.offset_data, member.size)


def _label(group: dict[str, Any], options: ReadOptions) -> str:
    """The class of a sample: a key of its `.json`, or else its `.cls`."""
    if options.label is None:
        return ""
    label = label_of(_json_value(group["json"], "label", options.label, False)) if "json" in group else ""
    return label or label_of(group.get("cls"))


def _json_value(content: bytes, key: str, name: str | None, required: bool) -> Any:
    """The value of `name` in a JSON object; `key` is the key of `data.source` that sets `name`."""
    try:
        return json.loads(content, object_pairs_hook=unique_keys)[name]
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
