"""The index of a run's pictures: every one is opened once, and what was found stays on disk, memory-mapped.

A picture that has not changed since (its file's size and time) is not opened again. The bad ones are in the index too,
so the report can be written from it, and a million pictures take a few bytes each in memory.

All processes of a run list all pictures and open a share of them: chunks are dealt in turn. What a process found stands
in a part beside the index until the main process has joined the parts.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
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
from ldm.data.buckets import Buckets
from ldm.data.images import Size, decode
from ldm.data.index_file import CHUNK, SCHEMA, TEXT, leading_bytes, write_index
from ldm.data.records import BadSample, ImageLocation, Record
from ldm.data.sources import CAPTIONED, Sources
from ldm.distributed.consensus import on_all
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import whole_file
from ldm.utils.errors import UserError

NAMED = 10_000  # bad ones that the report lists


@dataclass(frozen=True)
class Entry(Record):
    """A record whose picture has been opened: SHA-256 of its bytes, width and height as it is seen (EXIF)."""

    sha256: bytes = b""
    width: int = 0
    height: int = 0


class Index:
    """The usable pictures of a run, or some of them: a sequence of entries over a memory-mapped file."""

    def __init__(self, table: pa.Table, sources: Sources, data: DataConfig, rows: np.ndarray | None = None):
        self.table, self.sources, self.data = table, sources, data
        if rows is None:
            rows = np.flatnonzero(self.table["reason"].is_null().to_numpy(zero_copy_only=False))
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Entry:
        row = self.table.slice(int(self.rows[i]), 1).to_pylist()[0]
        return Entry(
            row["key"], ImageLocation(row["file"], row["start"], row["size"]), tuple(row["captions"]), row["label"],
            row["split"], row["weight"], row["repeats"], row["flip"], row["dropout"],
            json.loads(row["attributes"]) if row["attributes"] else {}, row["sha256"], row["width"], row["height"],
        )  # fmt: skip

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def select(self, *splits: str) -> Index:
        """The entries of some splits: `train`, `reconstruction`, `combination`."""
        chosen = pc.is_in(self.table["split"], pa.array(splits, TEXT)).to_numpy(zero_copy_only=False)
        return Index(self.table, self.sources, self.data, self.rows[chosen[self.rows].astype(bool)])

    def first(self, count: int) -> Index:
        return Index(self.table, self.sources, self.data, self.rows[:count])

    def some(self, count: int) -> Index:
        """All entries, or so many of them, drawn at random but always the same."""
        if len(self) <= count:
            return self
        chosen = np.sort(np.random.default_rng(0).permutation(len(self))[:count])
        return Index(self.table, self.sources, self.data, self.rows[chosen])

    def half(self, number: int) -> Index:
        """One of two halves, 0 or 1; which one an entry is in follows from its file's content."""
        last = np.array([sha256[-1] for sha256 in self.column("sha256")], int)
        return Index(self.table, self.sources, self.data, self.rows[last % 2 == number])

    def column(self, name: str) -> np.ndarray:
        """One fact of all entries as an array, `(N,)`."""
        return pa.chunked_array(_taken(self.table[name], self.rows), self.table[name].type).to_numpy()

    def captions(self) -> Iterator[list[str]]:
        """The captions of each entry, without the rest of it."""
        return self._values("captions")

    def _values(self, name: str) -> Iterator[Any]:
        for part in _taken(self.table[name], self.rows):
            yield from part.to_pylist()

    def picture(self, i: int) -> Image.Image:
        """The decoded picture; UserError, naming it, where it was changed or removed since it was indexed."""
        entry = self[i]
        try:
            content = self.sources.read(entry.where)
            if hashlib.sha256(content).digest() == entry.sha256:
                return decode(content, self.data.background, self.data.min_side)
            reason = "it was changed since it was indexed"
        except Exception as error:  # whatever its file system or library raises
            reason = f"it can't be read any more ({error or error!r})"
        raise UserError(f"{entry.key}: {reason}; put it back, or start the same command again to index it anew")

    def weights(self) -> np.ndarray:
        """How often each entry is drawn, `(N,)`: its own weight, and its source's share where sources have weights."""
        weights = self.column("weight")
        shares = [source.weight for source in self.data.source]
        if shares[0] is not None:
            sources, drawn = self.column("source"), weights * self.column("repeats")
            for number, share in enumerate(shares):
                mine = sources == number
                if mine.any():
                    weights = np.where(mine, weights * share / drawn[mine].sum(), weights)
        return weights

    @cached_property
    def sizes(self) -> list[Size]:
        """The size that each entry is brought to."""
        buckets, known = Buckets(self.data.size, self.data.buckets), dict[Size, Size]()
        pairs = zip(self.column("width").tolist(), self.column("height").tolist(), strict=True)
        return [known.get(pair) or known.setdefault(pair, buckets.of(*pair)) for pair in pairs]

    def by_size(self) -> dict[Size, np.ndarray]:
        """The places of the entries of each size."""
        names, groups = np.unique(np.array(self.sizes), axis=0, return_inverse=True)
        return {(int(w), int(h)): np.flatnonzero(groups.ravel() == i) for i, (w, h) in enumerate(names)}

    def labels(self) -> list[str]:
        """The classes of all usable pictures, whatever was selected, sorted; a class's number is its place in them."""
        usable = self.table["label"].filter(pc.is_null(self.table["reason"]))
        return sorted(label for label in pc.unique(usable).to_pylist() if label)

    def fingerprint(self) -> str:
        """SHA-256 of which pictures with which captions and classes: a run is only continued on the same ones."""
        digest = hashlib.sha256()
        if "class" in self.sources.conditions:  # one that only others have changes the numbers of these
            digest.update(repr(self.labels()).encode())
        names = ("sha256", "weight", "repeats", "flip", "dropout", "label")
        facts = (self._values(name) for name in names)
        for captions, *row in zip(self.captions(), *facts, strict=True):
            digest.update(repr((captions, *row)).encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------------ what is bad

    def bad(self) -> Iterator[BadSample]:
        wrong = self.table.filter(pc.is_valid(self.table["reason"])).select(["key", "reason", "fix"])
        for batch in wrong.to_batches(CHUNK):
            yield from (BadSample(**row) for row in batch.to_pylist())

    def bad_count(self) -> int:
        return len(self.table) - self.table["reason"].null_count

    def report(self, path: Path) -> None:
        """Writes `data-report.json`: how many are good, and each bad one: file, reason, remedy."""
        listed = [bad.__dict__ for _, bad in zip(range(NAMED), self.bad(), strict=False)]
        facts = {
            "pictures": len(self), "bad": self.bad_count(), "on_error": self.data.on_error,
            "max_bad": self.data.max_bad, "list": listed,
        }  # fmt: skip
        with whole_file(path) as tmp_path:
            tmp_path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def verdict(self, report: Path) -> str:
        """Why training would stop over bad pictures, in one line, or nothing."""
        bad, total = self.bad_count(), len(self.table)
        if not len(self):
            first = next(self.bad(), None)
            return f"data.source: no usable picture in {self.data.name}" + (
                f"; the first bad one: {first}" if first else ""
            )
        stops = bad and self.data.on_error == "stop"
        if stops or bad > self.data.max_bad * total:
            rule = "data.on_error is stop" if stops else f"data.max_bad is {self.data.max_bad}"
            return f"{bad} of {total} pictures are bad, and {rule}; see {report}. The first: {next(self.bad())}"
        return ""


def build(data: DataConfig, cache_dir: Path, conditions: Sequence[str] = CAPTIONED) -> Index:
    """Indexes the images of `data`, or takes up the index in `cache_dir`; all processes of a run share it.

    `conditions` are those of the model that is trained: `text` needs captions, `class` needs classes. Raises UserError,
    on all, where a source can't be read at all, or where they don't see the same; single bad pictures are kept in the
    index as such.
    """
    sources = on_all(lambda: Sources(data.source, data.size, cache_dir, conditions))
    captions, classes = "text" in conditions, "class" in conditions
    unread = {"weight", "repeats"} if classes else {"weight", "repeats", "label"}
    asked = [{**source.model_dump(exclude=unread), "at": str(Path(source.path).resolve())} for source in data.source]
    facts: list[Any] = [asked, data.background, data.min_side, data.size]
    if (captions, classes) != (True, False):  # others are good, so that such an index is no other run's
        facts.append({"captions": captions, "classes": classes})
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]

    def begin() -> None:
        cache_dir.mkdir(parents=True, exist_ok=True)
        for line in sources.says():
            tqdm.write(line)
        if PartialState().num_processes > 1:
            sources.prepare()

    on_main(begin)
    table = write_index(cache_dir / f"index-{key}.arrow", sources, data)
    return Index(_hold_out(table, data.val_fraction), sources, data)


def _hold_out(table: pa.Table, share: float) -> pa.Table:
    """The same with a share of the training pictures as split `reconstruction`, chosen by what their files hold."""
    if not share:
        return table
    drawn = leading_bytes(table["sha256"], 4).view(">u4").ravel()  # uniform: the first bytes of a SHA-256
    held = pc.and_(pa.array(drawn < math.ceil(share * 2**32)), pc.equal(table["split"], "train").fill_null(False))
    split = pc.if_else(held, pa.scalar("reconstruction", TEXT), table["split"])
    return table.set_column(SCHEMA.get_field_index("split"), "split", split)


# ---------------------------------------------------------------------------------------------- columns by their chunks


def _taken(column: pa.ChunkedArray, rows: np.ndarray) -> Iterator[pa.Array]:
    """What stands in some rows, in their order. Chunks are never joined, which would copy the whole column."""
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    which = np.searchsorted(ends, rows, side="right")
    borders = np.flatnonzero(np.diff(which)) + 1
    for start, end in itertools.pairwise((0, *borders.tolist(), len(rows))):
        if start < end:
            chunk = column.chunk(which[start])
            within = rows[start:end] - (ends[which[start]] - len(chunk))
            neighbours = np.array_equal(within, np.arange(within[0], within[0] + len(within)))
            yield chunk.slice(within[0], len(within)) if neighbours else chunk.take(pa.array(within))


# ------------------------------------------------------------------------------------------------------------- indexing
