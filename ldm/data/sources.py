"""Every way to store images, with captions or without, as one stream of records.

A source is a path: a folder (with a metadata file, caption files beside the images, class folders, or just
images), tars, parquet, a data set of `datasets` on disk or on the Hub, kohya's TOML, or a built-in set. The kind is
auto-detected. What an image needs follows from what stage two is conditioned on: `text` needs captions, `class` needs
classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ldm.config.kohya import subsets
from ldm.config.schema import SourceConfig
from ldm.data import archives, folders, kohya, openmoji
from ldm.data.records import IMAGE_SUFFIXES, TABLE_ROW, BadSample, ImageLocation, ReadOptions, Records, Sample
from ldm.data.tables import Table
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
    if any((folder / name).exists() for name in folders.METADATA):
        return "metadata"
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json", "dataset_info.json")):
        return "datasets"
    return _kind_of_folder(folder, "text" in conditions)


def _kind_of_folder(folder: Path, captions: bool) -> str:
    in_classes = loose = False
    for directory, names in folders.walk(folder):
        here = set(names)
        images = [name for name in names if folders.is_image_file(name)]
        if any(Path(name).stem + extension in here for name in images for extension in folders.SIDECARS):
            return "sidecars"
        for suffixes, kind in ((archives.TARS, "tar"), ((".parquet",), "parquet")):
            if not images and any(name.endswith(suffixes) for name in names):
                return kind
        loose |= bool(images) and directory == folder
        in_classes |= bool(images) and directory != folder
    if loose and not captions:
        return "images"
    if in_classes:
        return "classes"
    raise UserError(
        f"data.source: no captioned image in {folder}; put a metadata.jsonl there, or a .txt beside each image"
        if loose
        else f"data.source: no image in {folder}; expected {', '.join(sorted(IMAGE_SUFFIXES))}, tars or parquet"
    )


def check(sources: Sequence[SourceConfig], streaming: bool = False, conditions: Sequence[str] = CAPTIONED) -> None:
    """UserError where a source is not of the kind that is configured, or can't be streamed; no file is opened."""
    for source in sources:
        kind = detect(source, conditions)
        if streaming and kind not in STREAMED:
            raise UserError(
                f"data.streaming: {source.path} is {KINDS[kind]}; set it to false: tars, parquet and datasets stream"
            )
        if kind in ("metadata", "sidecars", "classes", "images") and not Path(source.path).is_dir():
            raise UserError(f"data.source: no folder {source.path}")
        if kind == "metadata" and not any((Path(source.path) / name).exists() for name in folders.METADATA):
            raise UserError(f"data.source: none of {', '.join(folders.METADATA)} in {source.path}; write one")
        if kind == "kohya":
            subsets(Path(source.path))


def _is_utf8(name: str) -> bool:
    """Python puts surrogates for bytes of a file name that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


class Sources:
    """The sources of a run, in the order of `data.source`: their records, and the bytes of the images."""

    def __init__(self, configs: Sequence[SourceConfig], size: int, cache: Path, conditions: Sequence[str] = CAPTIONED):
        self.configs, self.size, self.cache, self.conditions = tuple(configs), size, cache, tuple(conditions)
        self.kinds = [detect(source, conditions) for source in self.configs]

    def __getstate__(self) -> dict[str, object]:  # a loader process opens tables itself
        return {name: getattr(self, name) for name in ("configs", "size", "cache", "conditions", "kinds")}

    def describe(self) -> list[str]:
        """A line for each source: its path and its kind."""
        return [f"data     {source.path}: {KINDS[kind]}" for source, kind in zip(self.configs, self.kinds, strict=True)]

    def prepare(self) -> None:
        """Creates what all processes then share: rendered drawings, and the files that `datasets` converts."""
        for number, (source, kind) in enumerate(zip(self.configs, self.kinds, strict=True)):
            if kind == "openmoji":
                self._draw(source)
            self.table_stamp(number)

    def records(self, number: int) -> Records:
        """All records of source `number`, good and bad; no image is read."""
        source, kind = self.configs[number], self.kinds[number]
        for record in self._records(number, source, kind):
            key = record.key if len(self.configs) == 1 else f"{number}:{record.key}"
            if isinstance(record, BadSample):
                yield replace(record, key=key)
            elif not _is_utf8(record.location.file + record.label):  # the index could not store it
                yield BadSample(key, "its name is not UTF-8", "rename it")
            elif "class" in self.conditions and not record.label:
                column = f"write it into the column {source.label!r}, or put it in a class folder"
                yield BadSample(key, "it has no class", "give its subset class_tokens" if kind == "kohya" else column)
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
            return [(number, url) for url in archives.expand(source.path, archives.TARS)]
        check([source], streaming=True, conditions=self.conditions)
        return [(number, shard) for shard in range(self._streams[number].rows.num_shards)]

    def samples(self, shard: tuple[int, str | int]) -> Iterator[Sample]:
        """The samples of a shard with the bytes of their images, in the order of the shard."""
        number, name = shard
        if isinstance(name, str):
            return archives.tar_samples(name, self._read_options(self.configs[number]))
        return self._streams[number].samples(str(number), name)

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

    def _records(self, number: int, source: SourceConfig, kind: str) -> Records:
        folder, options = Path(source.path), self._read_options(source)
        if kind == "openmoji":
            return (drawing.record(path, options) for drawing, path in self._draw(source))
        if kind == "metadata":
            return folders.metadata(folder, options)
        if kind in ("sidecars", "images"):
            return folders.sidecars(folder, options, folders.SIDECARS if kind == "sidecars" else ())
        if kind == "classes":
            return folders.classes(folder, source.template, options)
        if kind == "kohya":
            return kohya.read(folder, options)
        if kind == "tar":
            return archives.tar_records(archives.expand(source.path, archives.TARS), options)
        samples = self._tables[number].samples(str(number))
        return (sample if isinstance(sample, BadSample) else sample[0] for sample in samples)

    def _draw(self, source: SourceConfig) -> list[tuple[openmoji.Drawing, Path]]:
        return openmoji.draw(source.path, self.size, self.cache / f"{source.path}-{self.size}px")
