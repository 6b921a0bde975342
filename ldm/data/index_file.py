"""The file of an index: every image is opened once, by all processes together, and what is found stays on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagehash
import numpy as np
import pyarrow as pa
from accelerate import PartialState
from tqdm import tqdm

from ldm.config.schema import DataConfig
from ldm.data.archives import stamp
from ldm.data.images import decode
from ldm.data.records import TABLE_ROW, BadSample, BadSampleError, ImageLocation, Record
from ldm.data.sources import Sources
from ldm.distributed.consensus import gathered, on_all, seen_by_all
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import sync
from ldm.utils.errors import UserError

TEXT = pa.large_string()  # the captions of 36 million pictures pass the 2 GiB that offsets of 32 bits reach


SCHEMA = pa.schema(
    [
        ("key", TEXT), ("file", TEXT), ("start", pa.int64()), ("size", pa.int64()),
        ("captions", pa.large_list(TEXT)), ("label", TEXT), ("split", TEXT), ("weight", pa.float64()),
        ("repeats", pa.int32()), ("flip", pa.bool_()), ("dropout", pa.float64()), ("attributes", TEXT),
        ("source", pa.int32()), ("reason", TEXT), ("fix", TEXT),
        ("stamp", pa.binary(16)), ("sha256", pa.binary(32)), ("width", pa.int32()), ("height", pa.int32()),
        ("phash", pa.uint64()),
    ]
)  # fmt: skip


FACTS = ("sha256", "width", "height", "phash", "reason", "fix")


CHUNK = 1024  # rows written at once, and opened by one process


AHEAD = 1024  # pictures that are opened while others are listed


def write_index(path: Path, sources: Sources, data: DataConfig) -> pa.Table:
    """The index, written beside and then put in its place; what an interrupted one had found is taken over."""
    state = PartialState()
    left = list(path.parent.glob(f".{path.name}.*"))
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")

    def share() -> _Listing:
        path.parent.mkdir(parents=True, exist_ok=True)  # on a machine that doesn't share it, too, to be told so
        known = _Known([path, *left])
        with tqdm(
            desc="checking pictures", unit=" img", total=known.count or None, leave=False,
            disable=not state.is_main_process,
        ) as bar:  # fmt: skip
            listing = _Listing(sources, bar)
            _write(part, _rows(listing, data, known))
        return listing

    listing = on_all(share)
    if state.num_processes == 1:
        whole, batches, parts = part, _mapped(part), list[Path]()
    else:
        whole, batches, parts = _joined(part, listing)

    def place() -> None:
        whole.replace(path)
        for other in parts:
            other.unlink(missing_ok=True)
        for other in left:
            with suppress(FileNotFoundError):  # another run may be writing a younger one
                if time.time() - other.stat().st_mtime > 3600:
                    other.unlink()

    on_main(place)
    return pa.Table.from_batches(batches, SCHEMA)


class _Listing:
    """The records of all sources, in their order, and which of them this process opens."""

    def __init__(self, sources: Sources, bar: tqdm[Any]):
        self.sources, self.bar = sources, bar
        self.count, self.digest = 0, hashlib.sha256()  # of all that were listed

    def __iter__(self) -> Iterator[tuple[int, Record | BadSample]]:
        """Those that are this process's own, each with the number of its source."""
        rank, processes = PartialState().process_index, PartialState().num_processes
        for number in range(len(self.sources.configs)):
            for item in self.sources.records(number):
                if processes > 1:  # of a bad one only the name: reasons may tell where an object stood
                    self.digest.update(repr(item.key if isinstance(item, BadSample) else item).encode())
                if self.count // CHUNK % processes == rank:
                    yield number, item
                else:
                    self.bar.update()
                self.count += 1


def _rows(listing: _Listing, data: DataConfig, known: _Known) -> Iterator[dict[str, Any]]:
    """A row for each record that is this process's own; threads decode some ahead."""
    sources = listing.sources
    ahead: deque[tuple[dict[str, Any], Future[dict[str, Any]] | dict[str, Any]]] = deque()
    seen: dict[str, str] = {}

    def first() -> dict[str, Any]:
        listing.bar.update()
        row, facts = ahead.popleft()
        return {**row, **(facts.result() if isinstance(facts, Future) else facts)}

    share = (os.cpu_count() or 2) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max_workers=max(2, data.workers, share)) as pool:
        for number, item in listing:
            if isinstance(item, BadSample):
                ahead.append(({**item.__dict__, "source": number, "stamp": bytes(16)}, {}))
            else:
                row = _row(item, number, seen, sources.table_stamp(number))
                ahead.append((row, known.facts(row["stamp"]) or pool.submit(_facts, sources, item.where, data)))
            if len(ahead) >= AHEAD:
                yield first()
        while ahead:
            yield first()


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    _write_batches(path, (pa.RecordBatch.from_pylist(chunk, SCHEMA) for chunk in chunks))


def _write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    sync(path)


def _joined(part: Path, listing: _Listing) -> tuple[Path, list[pa.RecordBatch], list[Path]]:
    """The whole index, which the main process makes of all parts and every process sees, and those parts.

    UserError, on all, where the processes didn't list the same pictures, or don't see the same index.
    """
    state = PartialState()
    listings = gathered((part, part.stat().st_size, listing.count, listing.digest.hexdigest()))
    counts = [count for _, _, count, _ in listings]
    for rank, (_, _, count, digest) in enumerate(listings):
        if (count, digest) != listings[0][2:]:
            raise UserError(
                f"data.source: process {rank} lists other pictures than process 0 ({count:,} and {counts[0]:,}); put "
                "them on a file system that all machines share, let nothing change them, and start the command again"
            )
    parts, sizes = [listed[0] for listed in listings], {listed[0]: listed[1] for listed in listings}
    seen_by_all(parts, lambda file: not state.is_main_process or _has(file, sizes[file]))
    whole = part.with_name(f"{parts[0].name}.whole")

    def join() -> int:
        if not state.is_main_process:
            return 0
        shares = [iter(_mapped(listed)) for listed in parts]
        chunks = range(-(-listing.count // CHUNK))
        _write_batches(whole, (next(shares[k % len(shares)]) for k in chunks))
        return whole.stat().st_size

    size = gathered(on_all(join))[0]
    seen_by_all([whole], lambda file: _has(file, size))
    batches = on_all(lambda: _mapped(whole))
    digests = gathered(_digest(batches))
    if len(set(digests)) > 1:
        raise UserError(
            f"data.cache_dir: the processes read different things in {whole}; "
            "give a folder on a file system that all machines share"
        )
    return whole, batches, parts


def _has(path: Path, size: int) -> bool:
    """Whether a file is there, as large as it was written."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size
    except OSError:
        return False


def _digest(batches: Sequence[pa.RecordBatch]) -> str:
    """SHA-256 of how many rows there are, and of a few batches from beginning to end."""
    digest = hashlib.sha256(repr([batch.num_rows for batch in batches]).encode())
    for number in sorted({*range(0, len(batches), 1 + len(batches) // 16), len(batches) - 1} - {-1}):
        digest.update(batches[number].serialize())
    return digest.hexdigest()


def _mapped(path: Path) -> list[pa.RecordBatch]:
    """The memory-mapped batches of a file that was written whole."""
    try:
        with pa.memory_map(str(path)) as file:
            return list(pa.ipc.open_stream(file))
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.cache_dir: can't read {path} ({reason}); start the same command again") from None


def _left_in(path: Path) -> list[pa.RecordBatch]:
    """The memory-mapped batches of an index as far as it was written; none where there is none, or just begun."""
    batches: list[pa.RecordBatch] = []
    with suppress(OSError, pa.ArrowException), pa.memory_map(str(path)) as file:
        for batch in pa.ipc.open_stream(file):
            batches.append(batch)
    return batches


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


def _facts(sources: Sources, where: ImageLocation, data: DataConfig) -> dict[str, Any]:
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
        schema = pa.schema([SCHEMA.field(name) for name in ("stamp", *FACTS)])
        tables = [schema.empty_table()]
        for path in paths:
            batches = _left_in(path)
            if batches and batches[0].schema.names == SCHEMA.names:
                with suppress(pa.ArrowException):  # one of other types than it ever had
                    tables.append(pa.Table.from_batches(batches).select(schema.names).cast(schema))
        table = pa.concat_tables(tables)
        stamps = leading_bytes(table["stamp"], 16).view("S16").ravel()
        self.order = np.argsort(stamps, kind="stable")
        self.stamps = stamps[self.order]
        self.count = len(stamps)
        self.batches = table.to_batches()
        self.ends = np.cumsum([batch.num_rows for batch in self.batches])

    def facts(self, mark: bytes) -> dict[str, Any] | None:
        if not self.count or mark == bytes(16):
            return None
        sought = np.array([mark], "S16")  # as an array: numpy takes the NULs off the end of a single one
        place = int(np.searchsorted(self.stamps, sought)[0])
        if place == self.count or self.stamps[place : place + 1] != sought:
            return None
        row = int(self.order[place])
        number = int(np.searchsorted(self.ends, row, side="right"))
        batch = self.batches[number]
        row += batch.num_rows - int(self.ends[number])
        return {name: batch[name][row].as_py() for name in FACTS}


def leading_bytes(column: pa.ChunkedArray, count: int) -> np.ndarray:
    """The first bytes of values that are all of one width, `(N, count)`; zeros where there is no value."""
    width, parts = column.type.byte_width, [np.zeros((0, count), np.uint8)]
    for chunk in filter(len, column.chunks):
        values = np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * width, chunk.offset * width)
        part = values.reshape(-1, width)[:, :count]
        if chunk.null_count:
            part = np.where(chunk.is_valid().to_numpy(zero_copy_only=False)[:, None], part, np.uint8(0))
        parts.append(part)
    return np.concatenate(parts)
