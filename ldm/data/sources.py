"""Every way people keep pictures, with captions or without, as one stream of records.

A source is a path: a folder (with a metadata file, caption files beside the pictures, class folders, or just
pictures), tars, parquet, a data set of `datasets` on disk or on the Hub, kohya's TOML, or a built-in set. Which one it
is, is found by looking; what its pictures need follows from what stage two is conditioned on: `text` needs captions,
`class` needs classes.
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
from ldm.data.records import PICTURES, TABLE_ROW, BadSample, ImageLocation, ReadOptions, Record, Records
from ldm.utils.errors import UserError

SAYS = {
    "openmoji": "the built-in OpenMoji drawings",
    "metadata": "a folder with a metadata file",
    "sidecars": "a folder with a caption file beside each picture",
    "classes": "class folders: a picture's folder is its caption",
    "pictures": "a folder of pictures",
    "tar": "WebDataset tars",
    "parquet": "parquet with an image column",
    "datasets": "a data set of the library datasets",
    "kohya": "kohya's TOML",
}
STREAMED = ("tar", "parquet", "datasets")
HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")
CAPTIONED = ("text",)  # the conditions of a model that reads captions


def detect(source: SourceConfig, conditions: Sequence[str] = CAPTIONED) -> str:
    """The kind of a source, one of SAYS; UserError, with what could be meant, where it is none."""
    path = source.path
    if source.kind == "pictures" and "text" in conditions:
        raise UserError(
            f"data.source.kind: pictures, so {path} has no captions, and stage2.conditions has text; "
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
        pictures = [name for name in names if folders.is_picture(name)]
        if any(Path(name).stem + extension in here for name in pictures for extension in folders.SIDECARS):
            return "sidecars"
        for suffixes, kind in ((archives.TARS, "tar"), ((".parquet",), "parquet")):
            if not pictures and any(name.endswith(suffixes) for name in names):
                return kind
        loose |= bool(pictures) and directory == folder
        in_classes |= bool(pictures) and directory != folder
    if loose and not captions:
        return "pictures"
    if in_classes:
        return "classes"
    raise UserError(
        f"data.source: no captioned picture in {folder}; put a metadata.jsonl there, or a .txt beside each picture"
        if loose
        else f"data.source: no picture in {folder}; expected {', '.join(sorted(PICTURES))}, tars or parquet"
    )


def check(sources: Sequence[SourceConfig], streaming: bool = False, conditions: Sequence[str] = CAPTIONED) -> None:
    """UserError where a source can't be what it says, or can't be streamed; nothing is opened."""
    for source in sources:
        kind = detect(source, conditions)
        if streaming and kind not in STREAMED:
            raise UserError(
                f"data.streaming: {source.path} is {SAYS[kind]}; set it to false: tars, parquet and datasets stream"
            )
        if kind in ("metadata", "sidecars", "classes", "pictures") and not Path(source.path).is_dir():
            raise UserError(f"data.source: no folder {source.path}")
        if kind == "metadata" and not any((Path(source.path) / name).exists() for name in folders.METADATA):
            raise UserError(f"data.source: none of {', '.join(folders.METADATA)} in {source.path}; write one")
        if kind == "kohya":
            subsets(Path(source.path))


def _is_text(name: str) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


class Sources:
    """The sources of a run, in their order: their records, and the bytes of the pictures that these name."""

    def __init__(self, configs: Sequence[SourceConfig], size: int, cache: Path, conditions: Sequence[str] = CAPTIONED):
        self.configs, self.size, self.cache, self.conditions = tuple(configs), size, cache, tuple(conditions)
        self.kinds = [detect(source, conditions) for source in self.configs]

    def __getstate__(self) -> dict[str, object]:  # a loader's process opens tables itself
        return {name: getattr(self, name) for name in ("configs", "size", "cache", "conditions", "kinds")}

    def says(self) -> list[str]:
        """A line a source: what it was taken for."""
        return [f"data     {source.path}: {SAYS[kind]}" for source, kind in zip(self.configs, self.kinds, strict=True)]

    def prepare(self) -> None:
        """Makes what one process makes for all, where it isn't there yet: drawings, and what `datasets` converts."""
        for number, (source, kind) in enumerate(zip(self.configs, self.kinds, strict=True)):
            if kind == "openmoji":
                self._drawn(source)
            self.table_stamp(number)

    def records(self, number: int) -> Records:
        """What source `number` holds, good and bad; only names, captions and classes are read."""
        source, kind = self.configs[number], self.kinds[number]
        for item in self._records(number, source, kind):
            key = item.key if len(self.configs) == 1 else f"{number}:{item.key}"
            if isinstance(item, BadSample):
                yield replace(item, key=key)
            elif not _is_text(item.where.file + item.label):  # an index could not hold it
                yield BadSample(key, "its name is not UTF-8", "rename it")
            elif "class" in self.conditions and not item.label:
                column = f"write it into the column {source.label!r}, or put it in a class folder"
                yield BadSample(key, "it has no class", "give its subset class_tokens" if kind == "kohya" else column)
            else:
                yield replace(item, key=key, repeats=item.repeats * source.repeats)

    def read(self, where: ImageLocation) -> bytes:
        """The bytes of a picture; OSError or ValueError where they can't be had."""
        if where.size == TABLE_ROW:
            return self._tables[int(where.file)].picture(where.start)
        return archives.read_bytes(where)

    def shards(self, number: int) -> list[tuple[int, str | int]]:
        """What of source `number` is read from its beginning to its end: tars, or parts of a table."""
        source, kind = self.configs[number], self.kinds[number]
        if kind == "tar":
            return [(number, url) for url in archives.expand(source.path, archives.TARS)]
        check([source], streaming=True, conditions=self.conditions)
        return [(number, shard) for shard in range(self._streams[number].rows.num_shards)]

    def samples(self, shard: tuple[int, str | int]) -> Iterator[archives.Sample]:
        """The samples of a shard with the bytes of their pictures, in the order in which they lie there."""
        number, name = shard
        if isinstance(name, str):
            return archives.tar_samples(name, self._read_options(self.configs[number]))
        return self._streams[number].samples(str(number), name)

    def table_stamp(self, number: int) -> str:
        """What tells that a table is as it was."""
        return self._tables[number].stamp if number in self._tables else ""

    def table(self, number: int, streaming: bool = False) -> archives.Table:
        source, kind = self.configs[number], self.kinds[number]
        cache = str(self.cache / "datasets")
        return archives.Table(
            source.path, kind, source.split, self._read_options(source), source.image, streaming, cache
        )

    def _read_options(self, source: SourceConfig) -> ReadOptions:
        label = source.label if "class" in self.conditions else None
        return ReadOptions(source.caption_column, source.lines, "text" in self.conditions, label)

    @cached_property
    def _tables(self) -> dict[int, archives.Table]:
        return {i: self.table(i) for i, kind in enumerate(self.kinds) if kind in ("parquet", "datasets")}

    @cached_property
    def _streams(self) -> dict[int, archives.Table]:
        return {i: self.table(i, True) for i, kind in enumerate(self.kinds) if kind in ("parquet", "datasets")}

    def _records(self, number: int, source: SourceConfig, kind: str) -> Records:
        folder, options = Path(source.path), self._read_options(source)
        if kind == "openmoji":
            return (
                Record(
                    d.code, ImageLocation(str(path.resolve())), d.captions, d.label if options.label else "", d.split,
                    d.weight,
                    attributes={"role": d.role, "tone": d.tone} if d.role else {},
                )
                for d, path in self._drawn(source)
            )  # fmt: skip
        if kind == "metadata":
            return folders.metadata(folder, options)
        if kind in ("sidecars", "pictures"):
            return folders.sidecars(folder, options, folders.SIDECARS if kind == "sidecars" else ())
        if kind == "classes":
            return folders.classes(folder, source.template, options)
        if kind == "kohya":
            return kohya.read(folder, options)
        if kind == "tar":
            return archives.tars(archives.expand(source.path, archives.TARS), options)
        return (item if isinstance(item, BadSample) else item[0] for item in self._tables[number].samples(str(number)))

    def _drawn(self, source: SourceConfig) -> list[tuple[openmoji.Drawing, Path]]:
        return openmoji.draw(source.path, self.size, self.cache / f"{source.path}-{self.size}px")
