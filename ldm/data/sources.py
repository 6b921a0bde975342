"""Every way to store images, with captions or without, as one stream of records.

A source is a path: a folder (with a metadata file, caption files beside the images, class folders, or just
images), tars, parquet, a data set of `datasets` on disk or on the Hub, kohya's TOML, or a built-in set. The kind is
auto-detected. What an image needs follows from what stage two is conditioned on: `text` needs captions, `class` needs
classes.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ldm.config.kohya import subsets
from ldm.config.schema import SourceConfig
from ldm.data import archives, folders, kohya, openmoji
from ldm.data.folder_tree import FolderTree
from ldm.data.formats import REMEDIES, is_image_file
from ldm.data.layout import FolderLayout, choose_split, folder_layout
from ldm.data.metadata_files import METADATA, metadata_files, read_metadata
from ldm.data.records import (
    MAX_EXAMPLES,
    TABLE_ROW,
    BadSample,
    ImageLocation,
    LeftOut,
    LeftOutCounts,
    ReadOptions,
    Record,
    Sample,
)
from ldm.data.tables import Table
from ldm.data.unread_files import SIDECARS, may_hold_captions
from ldm.utils.errors import UserError

# Each kind of source, as it is described to the user.
KINDS = {
    "openmoji": "the built-in OpenMoji drawings",
    "metadata": "a folder with a metadata file",
    "sidecars": "a folder with a caption file beside each image",
    "classes": "class folders: an image's folder is its caption",
    "images": "a folder of images",
    "tar": "WebDataset tars",
    "parquet": "parquet with an image column",
    "datasets": "a data set of the library datasets",
    "kohya": "kohya's TOML",
}
_TABULAR = ("metadata", "tar", "parquet", "datasets")
# The kinds of sources that a key has an effect on, where that is not all of them.
KINDS_OF_KEY = {
    "caption_column": _TABULAR,
    "label": _TABULAR,
    "image": ("parquet", "datasets"),
    "lines": ("sidecars", *_TABULAR),
    "template": ("classes",),
    "caption": ("sidecars",),
    "split": ("sidecars", "classes", "images", *_TABULAR),
}
FOLDERS = ("metadata", "sidecars", "classes", "images")
STREAMED = ("tar", "parquet", "datasets")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
CAPTIONED = ("text",)  # conditions of a model that reads captions


def detect(source: SourceConfig, conditions: Sequence[str] = CAPTIONED) -> str:
    """The kind of a source, a key of KINDS; UserError, with a suggestion, where the path is none of them."""
    path = source.path
    if source.kind == "images" and "text" in conditions:
        raise UserError(
            f"data.source.kind: images, so {path} has no captions, and stage2.conditions has text; "
            "leave out the kind, or text"
        )
    if source.kind != "auto":
        return source.kind
    if path in openmoji.SUBSETS:
        return "openmoji"
    if path.endswith(archives.TARS):
        return "tar"
    if path.endswith(".parquet"):
        return "parquet"
    if path.endswith(".toml"):
        return "kohya"
    folder = Path(path)
    if not folder.is_dir():
        close = difflib.get_close_matches(path, openmoji.SUBSETS, n=1)
        if close or not HUB_ID.match(path) or folder.exists():
            hint = f"did you mean {close[0]!r}?" if close else f"give a folder or one of {', '.join(openmoji.SUBSETS)}"
            raise UserError(f"data.source: {path!r} is neither a folder nor a built-in set; {hint}")
        return "datasets"
    if any((folder / name).exists() for name in METADATA):
        return "metadata"
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
        return "datasets"
    return _kind_of_folder(folder, source, "text" in conditions)


def _kind_of_folder(folder: Path, source: SourceConfig, captions: bool) -> str:
    in_classes = loose = metadata = False
    undecoded: Path | None = None
    unread: Path | None = None
    layout = folder_layout(folder, source.split, captions)
    for directory in FolderTree(folder, layout.other_splits).walk():
        images = [name for name in directory.names if is_image_file(name)]
        if folders.CaptionFiles(directory.names).by_image:
            return "sidecars"
        for suffixes, kind in ((archives.TARS, "tar"), ((".parquet",), "parquet")):
            tables = [name for name in directory.names if name.endswith(suffixes) and name not in METADATA]
            if not images and tables:
                return kind
        others = (name for name in directory.names if Path(name).suffix.lower() in REMEDIES)
        undecoded = undecoded or next((directory.path / name for name in others), None)
        metadata |= not set(METADATA).isdisjoint(directory.names)
        if images:
            in_class = len(directory.path.relative_to(folder).parts) > layout.depth
            in_classes, loose = in_classes or in_class, loose or not in_class
        stems = {Path(name).stem for name in images}
        texts = (name for name in directory.names if may_hold_captions(name, stems))
        unread = unread or next((directory.path / name for name in texts), None)
    if metadata:
        return "metadata"
    if source.caption and (loose or in_classes):
        return "sidecars"
    if loose and not captions:
        return "images"
    if captions and (in_classes or loose) and (unread := unread or _metadata_above(folder)):
        raise UserError(
            f"data.source: {unread} may hold the captions of {folder}, but isn't read: that takes a "
            f"{' or '.join(METADATA)} in this folder, or a .txt beside each image; write one of these, or set "
            "data.source.kind=classes to caption images by their folders' names"
        )
    if in_classes:
        return "classes"
    if undecoded and not loose:
        remedy = REMEDIES[undecoded.suffix.lower()]
        raise UserError(f"data.source: {folder} has only images that aren't read here, such as {undecoded}; {remedy}")
    raise UserError(
        f"data.source: no captioned image in {folder}; put a metadata.jsonl there, or a .txt beside each image, "
        "or set data.source.caption"
        if loose
        else f"data.source: no image in {folder}; expected .jpg, .png and the like, tars or parquet"
    )


def _metadata_above(folder: Path) -> Path | None:
    """A metadata file in the folder above that names files of this one."""
    for file in (folder.resolve().parent / name for name in METADATA):
        if file.is_file() and (file.suffix == ".parquet" or f"{folder.resolve().name}/".encode() in file.read_bytes()):
            return file
    return None


def check_keys(source: SourceConfig, kind: str) -> None:
    """UserError where a key of the source is set that has no effect on its kind."""
    for key, kinds in KINDS_OF_KEY.items():
        value = getattr(source, key)
        if kind not in kinds and value != SourceConfig.model_fields[key].default:
            raise UserError(
                f"data.source.{key}: {value!r} has no effect on {source.path}, {KINDS[kind]}; leave it out, or set "
                f"data.source.kind to one of {', '.join(kinds)}"
            )

    if kind in FOLDERS and source.split != "train" and Path(source.path).is_dir():
        layout = folder_layout(Path(source.path), source.split)
        if not layout.depth:  # no folder there names a split
            choose_split((), source.split, source.path)


def check(sources: Sequence[SourceConfig], streaming: bool = False, conditions: Sequence[str] = CAPTIONED) -> None:
    """UserError where a source is not of the kind that is configured, or can't be streamed; no file is opened."""
    for source in sources:
        kind = detect(source, conditions)
        check_keys(source, kind)
        if streaming and kind not in STREAMED:
            raise UserError(
                f"data.streaming: {source.path} is {KINDS[kind]}; set it to false: tars, parquet and datasets stream"
            )
        if kind in FOLDERS and not Path(source.path).is_dir():
            raise UserError(f"data.source: no folder {source.path}")
        if kind == "metadata" and not metadata_files(Path(source.path)):
            raise UserError(f"data.source: none of {', '.join(METADATA)} in {source.path}; write one")
        if kind == "kohya":
            subsets(Path(source.path))


def _class_remedy(kind: str, column: str) -> str:
    if kind == "kohya":
        return "give its subset class_tokens"
    if kind == "tar":
        return f"add a .cls of the same name, or the key {column!r} to its .json"
    return f"write it into the column {column!r}, or put it in a class folder"


def _is_utf8(name: str) -> bool:
    """Python puts surrogates for bytes of a file name that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


class Sources:
    """The sources of a run, in the order of `data.source`: their records, and the bytes of the images."""

    def __init__(self, configs: Sequence[SourceConfig], size: int, cache: Path, conditions: Sequence[str] = CAPTIONED):
        self.configs, self.size, self.cache, self.conditions = tuple(configs), size, cache, tuple(conditions)
        self.kinds = [detect(source, conditions) for source in self.configs]
        for source, kind in zip(self.configs, self.kinds, strict=True):
            check_keys(source, kind)
        self._left_out = [LeftOutCounts() for _ in self.configs]

    def __getstate__(self) -> dict[str, object]:  # a loader process opens tables itself
        return {name: getattr(self, name) for name in ("configs", "size", "cache", "conditions", "kinds", "_left_out")}

    def describe(self) -> list[str]:
        """A line for each source: its path and its kind; then captions that were guessed, with examples."""
        lines = []
        for source, kind in zip(self.configs, self.kinds, strict=True):
            lines.append(f"data     {source.path}: {KINDS[kind]}")
            if source.caption:
                lines.append(f"captions {source.caption!r} where an image has no caption file")
            if kind in ("classes", "sidecars"):
                lines += self._describe_folder_names(source, kind)
        return lines

    def _describe_folder_names(self, source: SourceConfig, kind: str) -> list[str]:
        """What was made of the names of folders, with examples."""
        tree, layout = self._folder(source)
        guessed = kind == "classes" and "text" in self.conditions
        if not guessed and not layout.repeated:
            return []
        lines = list[str]()
        first = folders.first_class_folders(tree, layout, MAX_EXAMPLES)
        captions = [folders.class_caption(label, source.template) for label in first]
        if guessed:
            lines.append(f"captions guessed from folder names: {', '.join(map(repr, captions))}")
        if guessed and len(captions) == 1:
            lines.append(
                f"warning  all images of {source.path} share the caption {captions[0]!r}; write a metadata.jsonl, or a "
                ".txt beside each image, unless that is meant"
            )
        if layout.repeated:
            matches = [match for key in first.values() if (match := layout.repeated_folder(key))]
            repeats = sorted(((int(match[1]), match[0]) for match in matches), reverse=True)
            lines.append(f"repeats  from folder names: {', '.join(f'{n} × {name}' for n, name in repeats)}")
        return lines

    def left_out(self) -> LeftOutCounts:
        """The files that `records` left out on purpose, of all sources read so far."""
        total = LeftOutCounts()
        for counts in self._left_out:
            total.update(counts)
        return total

    def prepare(self) -> None:
        """Creates what all processes then share: rendered drawings, and the files that `datasets` converts."""
        for number, (source, kind) in enumerate(zip(self.configs, self.kinds, strict=True)):
            if kind == "openmoji":
                self._draw(source)
            self.table_stamp(number)

    def records(self, number: int) -> Iterator[Record | BadSample]:
        """All records of source `number`, good and bad; no image is read. What is left out is counted."""
        source, kind = self.configs[number], self.kinds[number]
        left_out = self._left_out[number] = LeftOutCounts()
        for record in self._records(number, source, kind):
            if isinstance(record, LeftOut):
                left_out.add(record)
                continue
            key = record.key if len(self.configs) == 1 else f"{number}:{record.key}"
            if isinstance(record, BadSample):
                yield replace(record, key=key)
            elif not _is_utf8(record.location.file + record.label):  # the index could not store it
                yield BadSample(key, "its name is not UTF-8", "rename it")
            elif "class" in self.conditions and not record.label:
                yield BadSample(key, "it has no class", _class_remedy(kind, source.label))
            else:
                yield replace(record, key=key, repeats=record.repeats * source.repeats)

    def read(self, location: ImageLocation) -> bytes:
        """The encoded bytes of an image; OSError or ValueError where they can't be read."""
        if location.size == TABLE_ROW:
            return self._tables[int(location.file)].image_bytes(location.start)
        return archives.read_bytes(location)

    def shards(self, number: int) -> list[tuple[int, str | int]]:
        """The parts of source `number` that are read sequentially: (number, URL of a tar or shard of a table)."""
        source, kind = self.configs[number], self.kinds[number]
        if kind == "tar":
            urls, _ = archives.files_of_split(source.path, archives.TARS, source.split)
            return [(number, url) for url in urls]
        check([source], streaming=True, conditions=self.conditions)
        return [(number, shard) for shard in range(self._streams[number].rows.num_shards)]

    def samples(self, shard: tuple[int, str | int]) -> Iterator[Sample]:
        """The samples of a shard with the bytes of their images, in the order of the shard."""
        number, name = shard
        if isinstance(name, str):
            samples = archives.tar_samples(name, self._read_options(self.configs[number]))
            return self._without_left_out(number, samples)
        return self._streams[number].samples(str(number), name)

    def _without_left_out(self, number: int, samples: Iterator[Sample | LeftOut]) -> Iterator[Sample]:
        for sample in samples:
            if isinstance(sample, LeftOut):
                self._left_out[number].add(sample)
            else:
                yield sample

    def table_stamp(self, number: int) -> str:
        """A text that changes with a table's content; empty for a source that is no table."""
        return self._tables[number].stamp if number in self._tables else ""

    def _open_table(self, number: int, streaming: bool = False) -> Table:
        source, kind = self.configs[number], self.kinds[number]
        cache_dir = str(self.cache / "datasets")
        return Table(source.path, kind, source.split, self._read_options(source), source.image, streaming, cache_dir)

    def _read_options(self, source: SourceConfig) -> ReadOptions:
        label = source.label if "class" in self.conditions else None
        return ReadOptions(source.caption_column, source.lines, "text" in self.conditions, label)

    @cached_property
    def _tables(self) -> dict[int, Table]:
        return {i: self._open_table(i) for i, kind in enumerate(self.kinds) if kind in ("parquet", "datasets")}

    @cached_property
    def _streams(self) -> dict[int, Table]:
        return {
            i: self._open_table(i, streaming=True)
            for i, kind in enumerate(self.kinds)
            if kind in ("parquet", "datasets")
        }

    def _folder(self, source: SourceConfig) -> tuple[FolderTree, FolderLayout]:
        layout = folder_layout(Path(source.path), source.split, "text" in self.conditions)
        return FolderTree(Path(source.path), layout.other_splits), layout

    def _records(self, number: int, source: SourceConfig, kind: str) -> Iterator[Record | BadSample | LeftOut]:
        folder, options = Path(source.path), self._read_options(source)
        if kind == "openmoji":
            return (drawing.record(path, options) for drawing, path in self._draw(source))
        if kind in ("metadata", "sidecars", "images", "classes"):
            tree, layout = self._folder(source)
            if kind == "metadata":
                return read_metadata(tree, options)
            if kind == "classes":
                return folders.classes(tree, source.template, options, layout)
            return folders.sidecars(tree, options, SIDECARS if kind == "sidecars" else (), source.caption, layout)
        if kind == "kohya":
            return kohya.read(folder, options)
        if kind == "tar":
            urls, other_splits = archives.files_of_split(source.path, archives.TARS, source.split)
            return itertools.chain(other_splits, archives.tar_records(urls, options))
        samples = self._tables[number].samples(str(number))
        records = (sample if isinstance(sample, BadSample) else sample[0] for sample in samples)
        if kind == "datasets":
            return records
        _, other_splits = archives.files_of_split(source.path, (".parquet",), source.split)
        return itertools.chain(other_splits, records)

    def _draw(self, source: SourceConfig) -> list[tuple[openmoji.Drawing, Path]]:
        return openmoji.draw(source.path, self.size, self.cache / f"{source.path}-{self.size}px")
