"""Every way to store images, with captions or without, as one stream of records.

A source is a path: a folder (with a metadata file, caption files beside the images, class folders, or just
images), tars, parquet, a data set of `datasets` on disk or on the Hub, kohya's TOML, or a built-in set. The kind is
auto-detected. What an image needs follows from what stage two is conditioned on: `text` needs captions, `class` needs
classes.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from ldm.config.schema import SourceConfig
from ldm.data import archives, folders, kohya, openmoji
from ldm.data.folder_tree import FolderTree
from ldm.data.formats import is_image_file
from ldm.data.layout import FolderLayout, folder_layout
from ldm.data.masks import ALPHA, MaskFolder, mask_folder
from ldm.data.metadata_files import read_metadata
from ldm.data.read_ahead import waiting_for_storage
from ldm.data.records import (
    MASK_ROW,
    MAX_EXAMPLES,
    NO_MASK,
    PRIOR,
    TABLE_ROW,
    BadSample,
    ImageLocation,
    LeftOut,
    LeftOutCounts,
    ReadOptions,
    Record,
    Records,
    Sample,
    one_line,
)
from ldm.data.source_kinds import CAPTIONED, KINDS, check, check_keys, detect
from ldm.data.tables import Table
from ldm.data.unread_files import SIDECARS
from ldm.utils.errors import UserError

MAX_REPEATS = 1_000_000  # an epoch's order takes some bytes for each


def _class_remedy(kind: str, column: str) -> str:
    if kind == "kohya":
        return "give its subset class_tokens"
    if kind == "tar":
        return f"add a .cls of the same name, or the key {column!r} to its .json"
    return f"write it into the column {column!r}, or put it in a class folder"


def _is_utf8(name: str) -> bool:
    """Python puts surrogates for bytes of a file name that are not UTF-8."""
    return not any("\ud800" <= character <= "\udfff" for character in name)


class WordReplacer:
    """Puts other words in the place of `words` in captions, each caption once; capitals make no difference."""

    def __init__(self, words: Mapping[str, str]):
        self.words = {old.lower(): new for old, new in words.items()}
        self.missing = dict.fromkeys(self.words)  # those that no caption has had so far
        longest_first = sorted(map(re.escape, self.words), key=len, reverse=True)
        self._pattern = re.compile(rf"(?<!\w)(?:{'|'.join(longest_first)})(?!\w)", re.IGNORECASE)

    def __call__(self, captions: Sequence[str]) -> tuple[str, ...]:
        if not self.words:
            return tuple(captions)
        return tuple(dict.fromkeys(self._pattern.sub(self._other, caption) for caption in captions))

    def _other(self, match: re.Match[str]) -> str:
        old = match[0].lower()
        self.missing.pop(old, None)
        return self.words[old]


CONFIRMATION = "--yes or data.source.kind=classes"  # of a caption that all images share, on the command line


class Sources:
    """The sources of a run, in the order of `data.source`: their records, and the bytes of the images."""

    def __init__(self, configs: Sequence[SourceConfig], size: int, cache: Path, conditions: Sequence[str] = CAPTIONED):
        self.configs, self.size, self.cache, self.conditions = tuple(configs), size, cache, tuple(conditions)
        self.kinds = [detect(source, conditions) for source in self.configs]
        for source, kind in zip(self.configs, self.kinds, strict=True):
            check_keys(source, kind)
        self._left_out = [LeftOutCounts() for _ in self.configs]
        self._unread_keys: dict[int, set[str]] = {}  # of the tars that were streamed

    def __getstate__(self) -> dict[str, object]:  # a loader process opens tables itself
        names = ("configs", "size", "cache", "conditions", "kinds", "_left_out", "_unread_keys")
        return {name: getattr(self, name) for name in names}

    def describe(self) -> list[str]:
        """A line for each source: its path and its kind; then captions that were guessed, with examples."""
        lines = []
        for source, kind in zip(self.configs, self.kinds, strict=True):
            of_class = "; images of the class" if source.prior and kind != "kohya" else ""
            lines.append(f"data     {source.path}: {KINDS[kind]}{of_class}")
            if source.caption:
                lines.append(f"captions {self._default_captions(source)} where an image has no caption file")
            if source.mask:
                in_folder = mask_folder(source, kind)
                origin = "alpha channels" if source.mask == ALPHA else "the folder" if in_folder else "the column"
                lines.append(f"masks    from {origin}{'' if source.mask == ALPHA else f' {source.mask}'}")
            if kind in ("classes", "sidecars"):
                lines += self._describe_folder_names(source, kind)
        return [one_line(line) for line in lines]

    def _default_captions(self, source: SourceConfig) -> str:
        """`data.source.caption`, or, where it takes the file's name, what becomes of the first names."""
        if "{}" not in source.caption:
            return repr(source.caption)
        tree, _ = self._folder(source, "sidecars")
        names = (name for directory in tree.walk() for name in directory.names if is_image_file(name))
        captions = [folders.file_caption(name, source.caption) for name in itertools.islice(names, MAX_EXAMPLES)]
        return f"from file names, such as {', '.join(map(repr, captions))},"

    def _describe_folder_names(self, source: SourceConfig, kind: str) -> list[str]:
        """What was made of the names of folders, with examples."""
        tree, layout = self._folder(source, kind)
        guessed = kind == "classes" and "text" in self.conditions
        if not guessed and not layout.repeated:
            return []
        lines = list[str]()
        first = folders.first_class_folders(tree, layout, MAX_EXAMPLES)
        captions = [folders.class_caption(label, source.template) for label in first]
        if guessed:
            lines.append(f"captions guessed from folder names: {', '.join(map(repr, captions))}")
        if layout.repeated:
            matches = [match for key in first.values() if (match := layout.repeated_folder(key))]
            repeats = sorted(((int(match[1]), match[0]) for match in matches), reverse=True)
            lines.append(f"repeats  from folder names: {', '.join(f'{n} × {name}' for n, name in repeats)}")
        return lines

    def unconfirmed_caption(self, confirmation: str = CONFIRMATION) -> str:
        """The problem where all images of a source share a caption guessed from a folder's name; else empty.

        The message names the `confirmation` that the caller takes.
        """
        for source, kind in zip(self.configs, self.kinds, strict=True):
            confirmed = source.kind == "classes" or source.template != "{}"
            if kind == "classes" and not confirmed and "text" in self.conditions:
                tree, layout = self._folder(source, kind)
                labels = [*folders.first_class_folders(tree, layout, 2)]
                if len(labels) == 1 and not layout.repeated:  # `10_sks dog` is named so on purpose
                    caption = folders.class_caption(labels[0], source.template)
                    return (
                        f"data.source: all images of {source.path} share the caption {caption!r}, guessed from the "
                        f"folder's name; if that is meant, give {confirmation}; else write a metadata.jsonl, or a .txt "
                        "beside each image"
                    )
        return ""

    def no_masks(self, number: int) -> str:
        """What is wrong where source `number` has masks for none of its images, in one line."""
        source, kind = self.configs[number], self.kinds[number]
        if kind == "kohya":
            return f"{source.path}: alpha_mask, conditioning_data_dir: no image has a mask; add them, or drop the keys"
        if source.mask == ALPHA:
            where, fix = "an alpha channel", "save them as PNG with one"
        elif mask_folder(source, kind):
            where, fix = f"a mask in {source.mask}", f"the one of a/b.jpg is {Path(source.mask, 'a/b.png')}"
        else:
            folder = f"; a folder is written ./{source.mask}" if kind == "metadata" else ""
            where, fix = f"a mask in the column {source.mask!r}", f"name masks there{folder}"
        return f"data.source.mask: no image of {source.path} has {where}; {fix}, or leave out the key"

    def left_out(self) -> LeftOutCounts:
        """The files that `records` left out on purpose, of all sources read so far."""
        total = LeftOutCounts()
        for counts in self._left_out:
            total.update(counts)
        return total

    def set_left_out(self, counts: LeftOutCounts) -> None:
        """Takes over what an earlier listing of the same files left out."""
        self._left_out = [counts, *(LeftOutCounts() for _ in self.configs[1:])]

    def tars(self) -> list[tuple[str, str]]:
        """All tars, each with a text that changes with it, and what is left out next to them, each with its reason.

        Empty where there are other sources, or where a tar has no such text.
        """
        files, stamps = list[tuple[str, str]](), dict[str, str]()
        for source, kind in zip(self.configs, self.kinds, strict=True):
            if kind != "tar":
                return []
            urls, left_out = archives.files_of_split(source.path, archives.TARS, source.split)
            files += [(url, archives.stamp(url, stamps)) for url in urls]
            files += [(file.key, file.reason) for file in left_out]
        return files if all(version for _, version in files) else []

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
        count, replaced = 0, WordReplacer(source.replace)
        for record in self._records(number, source, kind):
            if isinstance(record, LeftOut):
                left_out.add(record)
                continue
            if source.limit and count >= source.limit:
                left_out.add(LeftOut(record.key, "images beyond data.source.limit"))
                continue
            key = record.key if len(self.configs) == 1 else f"{number}:{record.key}"
            count += 1
            if isinstance(record, BadSample):
                yield replace(record, key=key)
            elif not _is_utf8(record.location.file + record.label + (record.mask or NO_MASK).file):
                # the index could not store it
                yield BadSample(key, "its name is not UTF-8", "rename it")
            elif "class" in self.conditions and not record.label:
                yield BadSample(key, "it has no class", _class_remedy(kind, source.label))
            else:
                repeats = record.repeats * source.repeats
                if repeats > MAX_REPEATS:
                    raise UserError(f"data.source: {key} is repeated {repeats:,} times; give {MAX_REPEATS:,} at most")
                of_class = source.prior and kind != "kohya" and record.split == "train"  # held out stays held out
                split = PRIOR if of_class else record.split
                mask = record.location if source.mask == ALPHA else record.mask
                captions = replaced(record.captions)
                yield replace(record, key=key, captions=captions, repeats=repeats, split=split, mask=mask)
        if replaced.missing:
            raise UserError(
                f"data.source.replace: no caption of {source.path} has {next(iter(replaced.missing))!r}; write it as "
                "captions do, or leave it out"
            )

    def read(self, location: ImageLocation) -> bytes:
        """The encoded bytes of an image; OSError or ValueError where they can't be read."""
        with waiting_for_storage():
            if location.size == TABLE_ROW:
                return self._tables[int(location.file)].image_bytes(location.start)
            if location.size == MASK_ROW:
                return self._tables[int(location.file)].mask_bytes(location.start)
            return archives.read_bytes(location)

    def shards(self, number: int) -> list[tuple[int, str | int]]:
        """The parts of source `number` that are read sequentially: (number, URL of a tar or shard of a table)."""
        source, kind = self.configs[number], self.kinds[number]
        shards: list[str] | range
        if kind == "tar":
            shards, left_out = archives.files_of_split(source.path, archives.TARS, source.split)
        else:
            check([source], streaming=True, conditions=self.conditions)
            table = self._streams[number]
            shards, left_out = range(table.rows.num_shards), table.left_out
        self._left_out[number] = LeftOutCounts()
        for file in left_out:
            self._left_out[number].add(file)
        return [(number, shard) for shard in shards]

    def samples(self, shard: tuple[int, str | int]) -> Iterator[Sample]:
        """The samples of a shard with the bytes of their images, in the order of the shard."""
        replaced = WordReplacer(self.configs[shard[0]].replace)
        for sample in self._samples(shard):
            if replaced.words and not isinstance(sample, BadSample):
                record, content = sample
                sample = replace(record, captions=replaced(record.captions)), content
            yield sample

    def _samples(self, shard: tuple[int, str | int]) -> Iterator[Sample]:
        number, name = shard
        if isinstance(name, str):
            unread_keys = self._unread_keys.setdefault(number, set())
            samples = archives.tar_samples(name, self._read_options(number), unread_keys)
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
        return Table(source.path, kind, source.split, self._read_options(number), source.image, streaming, cache_dir)

    def _read_options(self, number: int) -> ReadOptions:
        source = self.configs[number]
        label = source.label if "class" in self.conditions else None
        in_folder = mask_folder(source, self.kinds[number])
        mask = None if in_folder or source.mask in ("", ALPHA) else source.mask
        return ReadOptions(source.caption_column, source.lines, "text" in self.conditions, label, mask)

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

    def _folder(self, source: SourceConfig, kind: str) -> tuple[FolderTree, FolderLayout]:
        masks = mask_folder(source, kind)
        layout = folder_layout(Path(source.path), source.split, "text" in self.conditions, masks)
        return FolderTree(Path(source.path), layout.other_splits, masks), layout

    def _records(self, number: int, source: SourceConfig, kind: str) -> Iterator[Record | BadSample | LeftOut]:
        folder, options = Path(source.path), self._read_options(number)
        if kind == "openmoji":
            return (drawing.record(path, options) for drawing, path in self._draw(source))
        if kind in ("metadata", "sidecars", "images", "classes"):
            records = self._folder_records(source, kind, options)
            masks = mask_folder(source, kind)
            return MaskFolder(masks).masked(records) if masks else records
        if kind == "kohya":
            return kohya.read(folder, options, source.prior)
        if kind == "tar":
            urls, left_out = archives.files_of_split(source.path, archives.TARS, source.split)
            return itertools.chain(left_out, archives.tar_records(urls, options))
        table = self._tables[number]
        records = (sample if isinstance(sample, BadSample) else sample[0] for sample in table.samples(str(number)))
        return itertools.chain(table.left_out, records)

    def _folder_records(self, source: SourceConfig, kind: str, options: ReadOptions) -> Records:
        tree, layout = self._folder(source, kind)
        if kind == "metadata":
            return read_metadata(tree, options)
        if kind == "classes":
            return folders.classes(tree, source.template, options, layout)
        return folders.sidecars(tree, options, SIDECARS if kind == "sidecars" else (), source.caption, layout)

    def _draw(self, source: SourceConfig) -> list[tuple[openmoji.Drawing, Path]]:
        return openmoji.draw(source.path, self.size, self.cache / f"{source.path}-{self.size}px")
