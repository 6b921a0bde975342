"""The index of a run's pictures: every one is opened once, and what was found stays on disk, memory-mapped.

A picture that has not changed since (its file's size and time) is not opened again. The bad ones are in the index too,
so the report can be written from it, and a million pictures take a few bytes each in memory.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image
from tqdm import tqdm

from ldm.data.archives import stamp
from ldm.data.images import Buckets, Size, decode
from ldm.data.records import TABLE_ROW, Bad, BadSampleError, Record, Where
from ldm.data.sources import Sources
from ldm.errors import UserError
from ldm.files import sync, whole_file
from ldm.processes import on_main
from ldm.schema import Config, DataConfig

SCHEMA = pa.schema(
    [
        ("key", pa.string()), ("file", pa.string()), ("start", pa.int64()), ("size", pa.int64()),
        ("captions", pa.list_(pa.string())), ("label", pa.string()), ("split", pa.string()), ("weight", pa.float64()),
        ("repeats", pa.int32()), ("flip", pa.bool_()), ("dropout", pa.float64()), ("attributes", pa.string()),
        ("source", pa.int32()), ("reason", pa.string()), ("fix", pa.string()),
        ("stamp", pa.binary(16)), ("sha256", pa.binary(32)), ("width", pa.int32()), ("height", pa.int32()),
        ("phash", pa.uint64()),
    ]
)  # fmt: skip
FACTS = ("sha256", "width", "height", "phash", "reason", "fix")
CHUNK = 1024  # rows written at once
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
            row["key"], Where(row["file"], row["start"], row["size"]), tuple(row["captions"]), row["label"],
            row["split"], row["weight"], row["repeats"], row["flip"], row["dropout"],
            json.loads(row["attributes"]) if row["attributes"] else {}, row["sha256"], row["width"], row["height"],
        )  # fmt: skip

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def select(self, *splits: str) -> Index:
        """The entries of some splits: `train`, `reconstruction`, `combination`."""
        chosen = pc.is_in(self.table["split"], pa.array(splits)).to_numpy(zero_copy_only=False)
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
        return self.table[name].take(pa.array(self.rows)).to_numpy()

    def captions(self) -> Iterator[list[str]]:
        """The captions of each entry, without the rest of it."""
        column = self.table["captions"].combine_chunks()
        for start in range(0, len(self.rows), CHUNK):
            yield from column.take(pa.array(self.rows[start : start + CHUNK])).to_pylist()

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
            sources, each = self.column("source"), weights * self.column("repeats")
            for number, share in enumerate(shares):
                mine = sources == number
                if mine.any():
                    weights = np.where(mine, weights * share / each[mine].sum(), weights)
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
        facts = (self.table[name].take(pa.array(self.rows)).to_pylist() for name in names)
        for captions, *row in zip(self.captions(), *facts, strict=True):
            digest.update(repr((captions, *row)).encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------------ what is bad

    def bad(self) -> Iterator[Bad]:
        wrong = self.table.filter(pc.is_valid(self.table["reason"])).select(["key", "reason", "fix"])
        for batch in wrong.to_batches(CHUNK):
            yield from (Bad(**row) for row in batch.to_pylist())

    def bad_count(self) -> int:
        return len(self.table) - self.table["reason"].null_count

    def report(self, path: Path) -> None:
        """Writes `data-report.json`: how many are good, and each bad one: file, reason, remedy."""
        listed = [bad.__dict__ for _, bad in zip(range(NAMED), self.bad(), strict=False)]
        facts = {
            "pictures": len(self), "bad": self.bad_count(), "on_error": self.data.on_error,
            "max_bad": self.data.max_bad, "list": listed,
        }  # fmt: skip
        with whole_file(path) as beside:
            beside.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n", "utf-8")

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


def build(config: Config) -> Index:
    """Indexes the pictures of a configuration, or takes up the index that is there; one process does it for all.

    Raises UserError where a source can't be read at all; single bad pictures are kept in the index as such.
    """
    data, cache = config.data, config.cache_dir
    sources = Sources(data.source, data.size, cache, config.stage2.conditions)
    two = config.stage2
    unread = {"weight", "repeats"} if two.classes else {"weight", "repeats", "label"}
    asked = [{**source.model_dump(exclude=unread), "at": str(Path(source.path).resolve())} for source in data.source]
    facts: list[Any] = [asked, data.background, data.min_side, data.size]
    if (two.text, two.classes) != (True, False):  # others are good, so that such an index is no other run's
        facts.append({"captions": two.text, "classes": two.classes})
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:12]
    path = cache / f"index-{key}.arrow"

    def written() -> None:
        cache.mkdir(parents=True, exist_ok=True)
        for line in sources.says():
            tqdm.write(line)
        _write(path, sources, data)

    on_main(written)
    return Index(_hold_out(pa.Table.from_batches(_batches(path), SCHEMA), data.held_out), sources, data)


def _hold_out(table: pa.Table, share: float) -> pa.Table:
    """The same with a share of the training pictures as split `reconstruction`, chosen by what their files hold."""
    if not share:
        return table
    starts = pc.binary_slice(table["sha256"].combine_chunks().cast(pa.binary()), 0, 4).fill_null(bytes(4))
    drawn = np.frombuffer(b"".join(starts.to_pylist()), ">u4") / 2**32  # uniform: the first bytes of a SHA-256
    held = pc.and_(pa.array(drawn < share), pc.equal(table["split"], "train").fill_null(False))
    split = pc.if_else(held, "reconstruction", table["split"])
    return table.set_column(SCHEMA.get_field_index("split"), "split", split)


def _write(path: Path, sources: Sources, data: DataConfig) -> None:
    """Writes the index beside, then puts it in its place; what an interrupted one had found is taken over."""
    left = list(path.parent.glob(f".{path.name}.*"))
    known = _Known([path, *left])
    rows = _rows(sources, data, known)
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with pa.OSFile(str(beside), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        chunk: list[dict[str, Any]] = []
        with tqdm(rows, desc="checking pictures", unit=" img", total=known.count or None, leave=False) as bar:
            for row in bar:
                chunk.append(row)
                if len(chunk) == CHUNK:
                    writer.write_batch(pa.RecordBatch.from_pylist(chunk, SCHEMA))
                    chunk = []
        writer.write_batch(pa.RecordBatch.from_pylist(chunk, SCHEMA))
    sync(beside)
    beside.replace(path)
    for other in left:
        if other.exists() and time.time() - other.stat().st_mtime > 3600:  # another run may be writing a younger one
            other.unlink(missing_ok=True)


def _batches(path: Path) -> list[pa.RecordBatch]:
    """The memory-mapped batches of an index, as far as it was written."""
    found: list[pa.RecordBatch] = []
    try:
        with pa.memory_map(str(path)) as file:
            found.extend(batch for batch in _readable(pa.ipc.open_stream(file)) if batch.schema == SCHEMA)
    except (OSError, pa.ArrowException):  # there is none, or it had just been begun
        pass
    return found


def _readable(reader: pa.RecordBatchReader) -> Iterator[pa.RecordBatch]:
    with suppress(OSError, pa.ArrowException):  # one that was cut off
        yield from reader


def _rows(sources: Sources, data: DataConfig, known: _Known) -> Iterator[dict[str, Any]]:
    """A row for each record, in the sources' order; threads decode some ahead."""
    ahead: deque[tuple[dict[str, Any], Future[dict[str, Any]] | dict[str, Any]]] = deque()
    seen: dict[str, str] = {}
    with ThreadPoolExecutor(max_workers=max(2, data.workers, (os.cpu_count() or 2) // 2)) as pool:
        for number in range(len(sources.configs)):
            for item in sources.records(number):
                if isinstance(item, Bad):
                    row = {**item.__dict__, "source": number, "stamp": bytes(16)}
                    ahead.append((row, {}))
                else:
                    row = _row(item, number, seen, sources.table_stamp(number))
                    facts = known.facts(row["stamp"])
                    ahead.append((row, facts or pool.submit(_facts, sources, item.where, data)))
                if len(ahead) >= 256:
                    yield _joined(*ahead.popleft())
        while ahead:
            yield _joined(*ahead.popleft())


def _joined(row: dict[str, Any], facts: Future[dict[str, Any]] | dict[str, Any]) -> dict[str, Any]:
    return {**row, **(facts.result() if isinstance(facts, Future) else facts)}


def _row(record: Record, number: int, seen: dict[str, str], table_stamp: str) -> dict[str, Any]:
    where = record.where
    as_it_was = table_stamp if where.size == TABLE_ROW else stamp(where.file, seen)
    mark = hashlib.sha256(repr((*where, as_it_was)).encode()).digest()[:16] if as_it_was else bytes(16)
    return {
        "key": record.key, "file": where.file, "start": where.start, "size": where.size,
        "captions": list(record.captions), "label": record.label, "split": record.split, "weight": record.weight,
        "repeats": record.repeats, "flip": record.flip, "dropout": record.dropout, "source": number, "stamp": mark,
        "attributes": json.dumps(dict(record.attributes)) if record.attributes else None,
    }  # fmt: skip


def _facts(sources: Sources, where: Where, data: DataConfig) -> dict[str, Any]:
    """What opening a picture tells of it, or what is wrong with it."""
    try:
        content = sources.read(where)
        picture = decode(content, data.background, data.min_side)
    except BadSampleError as error:
        return dict(zip(("reason", "fix"), error.args, strict=True))
    except Exception as error:  # whatever its file system or library raises; it may pass, so it is tried again
        reason = f"it can't be read ({error or error!r})"
        return {"reason": reason, "fix": "see that it is there and may be read", "stamp": bytes(16)}
    return {
        "sha256": hashlib.sha256(content).digest(), "width": picture.width, "height": picture.height,
        "phash": int(str(imagehash.phash(picture)), 16),
    }  # fmt: skip


class _Known:
    """The facts of earlier indices, found by stamp."""

    def __init__(self, paths: Sequence[Path]):
        self.table = pa.Table.from_batches([batch for path in paths for batch in _batches(path)], SCHEMA)
        stamps = self.table["stamp"].to_numpy(zero_copy_only=False).astype("S16")
        self.order = np.argsort(stamps, kind="stable")
        self.stamps = stamps[self.order]
        self.count = len(stamps)

    def facts(self, mark: bytes) -> dict[str, Any] | None:
        if not self.count or mark == bytes(16):
            return None
        wanted = np.array([mark], "S16")  # as an array: numpy takes the NULs off the end of a single one
        place = int(np.searchsorted(self.stamps, wanted)[0])
        if place == self.count or self.stamps[place : place + 1] != wanted:
            return None
        row = int(self.order[place])
        return {name: self.table[name][row].as_py() for name in FACTS}
