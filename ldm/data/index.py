"""The index of a run's images, a memory-mapped table on disk. It is built by opening every image once.

An image whose file has not changed since (size and time) is not opened again. Bad images are in the index too, for the
report. What has a value for each image is a file that processes map: the table, and the columns that follow from it.

All processes of a run list all images, and open the chunks of them in turn. Each writes what it read to a file of its
own, which the main process then joins. It also writes the columns that follow, in a folder named by the content.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import PartialState
from PIL import Image
from tqdm import tqdm

from ldm.config.schema import DataConfig
from ldm.data.arrow_columns import BLOCK, leading_bytes, take_rows
from ldm.data.buckets import Buckets, EntrySizes
from ldm.data.column_store import ColumnStore
from ldm.data.draw_table import Draws, DrawTable, draw_table
from ldm.data.fingerprint import fingerprint_bytes
from ldm.data.images import Size, decode
from ldm.data.index_file import cache_key, write_index
from ldm.data.index_table import SPLITS, IndexTable
from ldm.data.masks import load_mask
from ldm.data.page_cache import Lookup, address
from ldm.data.records import PRIOR, TRAINED, BadSample, Entry, SampleFields
from ldm.data.source_kinds import CAPTIONED
from ldm.data.sources import Sources
from ldm.distributed.consensus import on_all, wait_until_visible
from ldm.distributed.launch import on_main
from ldm.utils.errors import UserError


class Index:
    """The usable images of a run, or a subset: a sequence of entries over a memory-mapped table.

    `rows` are the numbers of their rows; without, they are those of `splits`.
    """

    def __init__(
        self,
        table: IndexTable,
        sources: Sources,
        data: DataConfig,
        rows: np.ndarray | None = None,
        splits: Sequence[str] = SPLITS,
    ):
        self.table, self.sources, self.data = table, sources, data
        self._splits: frozenset[str] | None = None  # those that it has all images of; None: it has others
        self.columns = ColumnStore()
        if rows is None:
            self._splits = frozenset(splits).intersection(table.split_counts(data.val_fraction))
            self.columns = table.columns
            rows = table.rows_of(self._splits, data.val_fraction)
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Entry:
        number = int(self.rows[i])
        return self.table.entry(number, self._split_of(number))

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def sample_fields(self, i: int) -> SampleFields:
        """What a training sample needs of entry i."""
        number = int(self.rows[i])
        return self.table.sample_fields(number, self._split_of(number))

    def lookup(self, i: int) -> Lookup[None]:
        """Reads what `sample_fields` of entry i needs, and its size."""
        yield [address(self.rows, i)]
        row = int(self.rows[i])
        yield [address(self._split_numbers, row), self.sizes.address(row)]
        yield from self.table.lookup(row)

    @cached_property
    def _split_numbers(self) -> np.ndarray:
        return self.table.splits(self.data.val_fraction)

    def _split_of(self, row: int) -> str:
        return SPLITS[self._split_numbers[row] - 1]

    def split_numbers(self) -> np.ndarray:
        """The number of each entry's split in SPLITS, from 1, `(N,)` uint8."""
        return self._split_numbers[self.rows]

    def _of_rows(self, rows: np.ndarray) -> Index:
        return Index(self.table, self.sources, self.data, rows)

    def select(self, *splits: str) -> Index:
        """The entries of these splits: `train`, `reconstruction`, `combination`, `prior`."""
        if self._splits is not None:
            chosen = sorted(self._splits.intersection(splits))
            return Index(self.table, self.sources, self.data, splits=chosen)
        numbers = [SPLITS.index(split) + 1 for split in splits]
        return self._of_rows(self.rows[np.isin(self.split_numbers(), numbers)])

    def first(self, count: int) -> Index:
        return self._of_rows(self.rows[:count])

    def subset(self, count: int) -> Index:
        """At most `count` entries, drawn at random but always the same."""
        if len(self) <= count:
            return self
        numbers = np.arange(len(self), dtype=self.rows.dtype)
        np.random.default_rng(0).shuffle(numbers)
        return self._of_rows(self.rows[np.sort(numbers[:count])])

    def half(self, number: int) -> Index:
        """One of two halves, 0 or 1. An entry's half follows from its file's content."""
        parts = [np.zeros(0, self.rows.dtype)]
        for start in range(0, len(self), BLOCK):
            rows = self.rows[start : start + BLOCK]
            parts.append(rows[self.sha256(slice(start, start + BLOCK))[:, -1] % 2 == number])
        return self._of_rows(np.concatenate(parts))

    def sha256(self, entries: np.ndarray | slice = slice(None)) -> np.ndarray:
        """The SHA-256 of the files of some entries, `(N, 32)` uint8."""
        return leading_bytes(self._taken("sha256", self.rows[entries]), 32)

    def column(self, name: str) -> np.ndarray:
        """A column of the table for all entries, `(N,)`."""
        if name == "split":
            return np.array(SPLITS, object)[self.split_numbers() - 1]
        return self._taken(name, self.rows).to_numpy()

    def _taken(self, name: str, rows: np.ndarray) -> pa.ChunkedArray:
        return pa.chunked_array(take_rows(self.table[name], rows), self.table[name].type)

    def captions(self, entries: np.ndarray | slice = slice(None)) -> Iterator[list[str]]:
        """The captions of all entries, or of some."""
        return self._values("captions", entries)

    def caption_counts(self) -> np.ndarray:
        """How many captions each entry has, `(N,)`."""
        return np.concatenate([pc.list_value_length(part) for part in take_rows(self.table["captions"], self.rows)])

    def _values(self, name: str, entries: np.ndarray | slice = slice(None)) -> Iterator[Any]:
        for part in take_rows(self.table[name], self.rows[entries]):
            yield from part.to_pylist()

    def load_image(self, i: int) -> Image.Image:
        """The decoded image; UserError, naming it, where it was changed or removed since it was indexed."""
        entry = self[i]
        try:
            content = self.sources.read(entry.location)
            if hashlib.sha256(content).digest() == entry.sha256:
                return decode(content, self.data.background, self.data.min_side)
            reason = "it was changed since it was indexed"
        except Exception as error:  # file systems and libraries may raise anything
            reason = f"it can't be read any more ({error or error!r})"
        raise _lost(entry.key, reason)

    @cached_property
    def has_masks(self) -> bool:
        """Whether any image of the table, of this subset or not, has a mask."""
        return self.table["mask_sha256"].null_count < len(self.table)

    def load_mask(self, i: int) -> Image.Image | None:
        """The image's mask, 8-bit grey of the image's size, or None; UserError where it was changed or removed."""
        entry = self[i]
        if entry.mask_sha256 is None:
            return None
        try:
            mask = load_mask(entry, (entry.width, entry.height), self.sources.read)
            if mask and mask[1] == entry.mask_sha256:
                return mask[0]
            reason = "its mask was changed since it was indexed"
        except Exception as error:  # file systems and libraries may raise anything
            reason = f"its mask can't be read any more ({error or error!r})"
        raise _lost(entry.key, reason)

    def weights(self) -> np.ndarray:
        """The relative frequency of each entry, `(N,)`: its own weight, scaled to its source's, if sources have any."""
        weights = self.column("weight")
        shares = [source.weight for source in self.data.source]
        if shares[0] is not None:
            sources, repeated = self.column("source"), weights * self.column("repeats")
            for number, share in enumerate(shares):
                of_source = sources == number
                if of_source.any():
                    weights = np.where(of_source, weights * share / repeated[of_source].sum(), weights)
        return weights

    def prior(self) -> np.ndarray | None:
        """Which entries are images of the class, for prior preservation, `(N,)` bool; None where none is."""
        if self._splits is not None and PRIOR not in self._splits:
            return None
        of_class = self.split_numbers() == SPLITS.index(PRIOR) + 1
        return of_class if of_class.any() else None

    @cached_property
    def sizes(self) -> EntrySizes:
        """The size of the bucket of each entry."""
        distinct, numbers = self.table.bucket_numbers(Buckets(self.data.size, self.data.buckets))
        return EntrySizes(distinct, numbers, self.rows)

    def by_size(self) -> dict[Size, np.ndarray]:
        """The numbers of the entries of each size."""
        numbers = self.sizes.numbers()
        return {self.sizes.distinct[n]: np.flatnonzero(numbers == n) for n in np.flatnonzero(np.bincount(numbers))}

    def draws(self) -> DrawTable:
        """What an order of the entries needs: which a bucket has, and how often an epoch draws each."""
        shares = [source.weight for source in self.data.source]
        settings = (self._settings(), shares, self.data.size, repr(self.data.buckets))

        @functools.cache
        def computed() -> DrawTable:
            return draw_table(self.weights(), self.sizes.numbers(), self.column("repeats"), self.prior())

        def array(name: str, number: int) -> np.ndarray:
            def column() -> np.ndarray:
                column = computed()[number]
                assert isinstance(column, np.ndarray)
                return column

            return self.columns.array(name, settings, column)

        facts = self.columns.value("draws", settings, lambda: [computed()[0], *(a is not None for a in computed()[1:])])
        members, cumulative = (
            array(name, number) if facts[number] else None for number, name in enumerate(("members", "cumulative"), 1)
        )
        return DrawTable([Draws(*draws) for draws in facts[0]], members, cumulative)

    def labels(self) -> list[str]:
        """The classes of all usable images, also of other splits, sorted. A class's number is its index here."""
        return self.table.labels()

    def fingerprint(self) -> str:
        """SHA-256 of the images' content, masks, captions and classes: a run is only continued on the same data."""

        def compute() -> str:
            digest = hashlib.sha256()
            if "class" in self.sources.conditions:  # a class that only other splits have changes the numbers of these
                digest.update(repr(self.labels()).encode())
            for part in fingerprint_bytes(self.table.table, self.rows):
                digest.update(part)
            return digest.hexdigest()

        return str(self.columns.value("fingerprint", self.fingerprint_settings(), compute))

    def fingerprint_settings(self) -> object:
        """What the fingerprint depends on besides the table."""
        return self._settings(), "class" in self.sources.conditions

    def _settings(self) -> object:
        """What its rows depend on."""
        return sorted(self._splits or ()), self.data.val_fraction

    @property
    def name(self) -> str:
        """Of its content and buckets; empty where nothing that is kept says what its rows are."""
        buckets = (self._settings(), self.data.size, repr(self.data.buckets))
        folder = self.columns.folder
        return f"{folder.name}-{hashlib.sha256(repr(buckets).encode()).hexdigest()[:16]}" if folder else ""

    def prepare(self) -> None:
        """Computes the columns that a training needs, unless the table's store has them."""
        if len(self):
            self.draws()
            self.fingerprint()

    def bad_samples(self) -> Iterator[BadSample]:
        return self.table.bad_samples()

    def bad_count(self) -> int:
        return self.table.bad_count()


def build(data: DataConfig, cache_dir: Path, conditions: Sequence[str] = CAPTIONED) -> Index:
    """Indexes the images of `data`, or brings the index in `cache_dir` up to date; every process of the run calls it.

    `conditions` are those of the model that is trained: `text` needs captions, `class` needs classes. Single bad
    images are entered as such. Raises UserError, on all processes, where a source can't be read at all, or where
    processes don't see the same files.
    """
    sources = on_all(lambda: Sources(data.source, data.size, cache_dir, conditions))

    def prepare() -> None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for line in sources.describe():
            tqdm.write(line)
        if PartialState().num_processes > 1:
            sources.prepare()

    on_main(prepare)
    name = cache_key(data, conditions)
    table, rows, digest = write_index(cache_dir / f"index-{name}.arrow", sources, data)
    columns = ColumnStore(cache_dir / f"columns-{name}-{digest[:16]}")
    return _prepared(Index(IndexTable(table, columns, rows), sources, data))


def _prepared(index: Index) -> Index:
    """The index, once the main process has written what a training needs, and the others see it."""
    columns = index.table.columns
    assert columns.folder
    stem = columns.folder.name.rpartition("-")[0]

    def prepare() -> list[Path]:
        for selected in (index, index.select("train"), index.select(*TRAINED)):
            selected.prepare()
        columns.remove_older(stem)
        return columns.files()

    wait_until_visible(on_main(prepare), Path.exists)
    return index


def _lost(key: str, reason: str) -> UserError:
    return UserError(f"{key}: {reason}; put it back, or start the same command again to index it anew")
