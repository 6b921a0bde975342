"""The file of an index: each image is opened once, by one of the processes, and what was read is kept on disk."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import imagehash
import pyarrow as pa
from accelerate import PartialState
from tqdm import tqdm

from ldm.config.schema import DataConfig
from ldm.data.archives import stamp
from ldm.data.earlier_indices import EarlierIndices
from ldm.data.images import decode
from ldm.data.index_schema import MASK_COLUMNS, RECORD_COLUMNS, SCHEMA
from ldm.data.listing import Listing
from ldm.data.listing_record import ListingRecord
from ldm.data.masks import load_mask
from ldm.data.records import MASK_ROW, NO_MASK, TABLE_ROW, BadSample, BadSampleError, ImageLocation, Record
from ldm.data.sources import Sources
from ldm.distributed.consensus import gather_objects, on_all, wait_until_visible
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import file_sha256, file_system_time, sync
from ldm.utils.errors import UserError

CHUNK = 1024  # rows that one process opens, and writes at once
CHUNKS = 64  # joined to one in the complete file: a table of many small chunks is slow and large
PREFETCH = 1024  # images that are opened while others are listed


def cache_key(data: DataConfig, conditions: Sequence[str]) -> str:
    """A hash of every setting that an index depends on."""
    captions, classes = "text" in conditions, "class" in conditions
    unread = {"weight", "repeats"} if classes else {"weight", "repeats", "label"}
    sources = [{**source.model_dump(exclude=unread), "at": str(Path(source.path).resolve())} for source in data.source]
    for source in sources:
        for key in ("caption", "limit", "mask", "prior", "replace"):
            if not source[key]:  # as before there was this key
                del source[key]
        if source["kind"] == "images":
            source["kind"] = "pictures"  # its name when the first indices were written, which stay valid
    settings: list[Any] = [sources, data.background, data.min_side, data.size]
    if (captions, classes) != (True, False):  # what is a bad sample depends on the conditions
        settings.append({"captions": captions, "classes": classes})
    return hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:12]


def write_index(path: Path, sources: Sources, data: DataConfig) -> tuple[pa.Table, list[pa.RecordBatch], str]:
    """Writes the index to a temporary file, then moves it to `path`; takes over what an interrupted run had written.

    Where it was made from tars that have not changed since, it stays as it is, and nothing is listed.
    Returns it, memory-mapped, its batches mapped for single rows, and the SHA-256 of its file.
    """
    record = ListingRecord(path, sources)
    if digest := record.unchanged():
        size = on_main(lambda: path.stat().st_size)
        wait_until_visible([path], lambda file: _has(file, size))
        batches, rows = on_all(lambda: (memory_map(path), map_for_single_rows(path)))
        return pa.Table.from_batches(batches, SCHEMA), rows, digest
    state = PartialState()
    leftovers = list(path.parent.glob(f".{path.name}.*"))
    part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")

    listing = Listing(sources, CHUNK)

    def write_part() -> None:
        with listing:
            path.parent.mkdir(parents=True, exist_ok=True)  # also on a machine that doesn't share it, for `_join`
            known = EarlierIndices([path, *leftovers])
            total, hidden = known.count or None, not state.is_main_process
            with tqdm(desc="checking images", unit=" img", total=total, leave=False, disable=hidden) as bar:
                _write(part, _rows(listing, data, known, bar))

    on_all(write_part)
    complete, batches, parts, digest = _join(part, listing)
    table = pa.Table.from_batches(batches, SCHEMA)

    def replace() -> None:
        complete.replace(path)
        record.write(table, digest)
        for file in parts:
            file.unlink(missing_ok=True)
        now = file_system_time(path.parent)
        for file in leftovers:
            with suppress(FileNotFoundError):  # another run may be writing a younger one
                if now - file.stat().st_mtime > 3600:
                    file.unlink()

    rows = on_all(lambda: map_for_single_rows(complete))  # by all, before the main process moves it
    on_main(replace)
    return table, rows, digest


def _rows(listing: Listing, data: DataConfig, known: EarlierIndices, bar: tqdm[Any]) -> Iterator[dict[str, Any]]:
    """A row for each record that this process opens; threads decode some ahead."""
    sources = listing.sources
    pending: deque[tuple[dict[str, Any], Future[dict[str, Any]] | dict[str, Any]]] = deque()
    stamps: dict[str, str] = {}

    def next_row() -> dict[str, Any]:
        row, read = pending.popleft()
        bar.update(listing.count - len(pending) - bar.n)
        return {**row, **(read.result() if isinstance(read, Future) else read)}

    threads = (os.cpu_count() or 2) // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    with ThreadPoolExecutor(max_workers=max(2, data.workers, threads)) as pool:
        for position, number, record in listing:
            if isinstance(record, BadSample):
                pending.append(({**record.__dict__, "source": number, "stamp": bytes(16)}, {}))
            else:
                row = _row(record, number, stamps, sources.table_stamp(number))
                read = known.find(row["stamp"], position) or pool.submit(_read_image, sources, record, data)
                pending.append((row, read))
            if len(pending) >= PREFETCH:
                yield next_row()
        while pending:
            yield next_row()


def _write(path: Path, rows: Iterator[dict[str, Any]]) -> None:
    chunks = iter(lambda: list(itertools.islice(rows, CHUNK)), [])
    write_batches(path, (pa.RecordBatch.from_pylist(chunk, SCHEMA) for chunk in chunks))


def write_batches(path: Path, batches: Iterable[pa.RecordBatch]) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, SCHEMA) as writer:
        for batch in batches:
            writer.write_batch(batch)
    sync(path)


def _join(part: Path, listing: Listing) -> tuple[Path, list[pa.RecordBatch], list[Path], str]:
    """The index that the main process joins from all parts.

    Returns its file, its batches as every process sees it, the parts, and the file's SHA-256.
    UserError, on all processes, where they didn't list the same images, or don't see the same file.
    """
    state = PartialState()
    listings = gather_objects((part, part.stat().st_size, listing.count, listing.digest))
    for rank, (_, _, count, digest) in enumerate(listings):
        if (count, digest) != listings[0][2:]:
            raise UserError(
                f"data.source: process {rank} lists other images than process 0 ({count:,} and {listings[0][2]:,}); "
                "put them on a file system that all machines share, let nothing change them, and start again"
            )
    sizes = {file: size for file, size, _, _ in listings}
    parts = list(sizes)
    wait_until_visible(parts, lambda file: not state.is_main_process or _has(file, sizes[file]))
    complete = part.with_name(f"{parts[0].name}.complete")

    def join() -> tuple[int, str]:
        if not state.is_main_process:
            return 0, ""
        chunks = [_read_batches(file) for file in parts]
        count = -(-listing.count // CHUNK)
        write_batches(complete, _packed(next(chunks[k % len(chunks)]) for k in range(count)))
        return complete.stat().st_size, file_sha256(complete)

    size, digest = gather_objects(on_all(join))[0]
    wait_until_visible([complete], lambda file: _has(file, size))
    batches = on_all(lambda: memory_map(complete))
    digests = gather_objects(_digest(batches))
    if len(set(digests)) > 1:
        raise UserError(
            f"data.cache_dir: the processes read different things in {complete}; "
            "give a folder on a file system that all machines share"
        )
    return complete, batches, parts, digest


def _packed(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """The same rows in batches of `CHUNKS` as many."""
    while some := list(itertools.islice(batches, CHUNKS)):
        yield from pa.Table.from_batches(some).combine_chunks().to_batches()


def _has(path: Path, size: int) -> bool:
    """Whether the file is there, in full."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size == size
    except OSError:
        return False


def _digest(batches: Sequence[pa.RecordBatch]) -> str:
    """SHA-256 of the number of rows, and of some batches spread over the file."""
    digest = hashlib.sha256(repr([batch.num_rows for batch in batches]).encode())
    for number in sorted({*range(0, len(batches), 1 + len(batches) // 16), len(batches) - 1} - {-1}):
        digest.update(batches[number].serialize())
    return digest.hexdigest()


def memory_map(path: Path, advice: str = "MADV_NORMAL") -> list[pa.RecordBatch]:
    """The memory-mapped batches of a complete file; `advice` says how their columns will be read.

    Their heads, which lie far apart, are read without what follows them.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        _advise(mapped, "MADV_RANDOM")
        batches = list(pa.ipc.open_stream(pa.BufferReader(pa.py_buffer(mapped))))
    except (OSError, ValueError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None
    _advise(mapped, advice)
    return batches


def map_for_single_rows(path: Path) -> list[pa.RecordBatch]:
    """The same, mapped so that reading a row doesn't read its neighbours, 20 times as much of a disk."""
    return memory_map(path, "MADV_RANDOM")


def _advise(mapped: mmap.mmap, advice: str) -> None:
    if hasattr(mmap, advice):
        mapped.madvise(getattr(mmap, advice))


def _read_batches(path: Path) -> Iterator[pa.RecordBatch]:
    try:
        with pa.memory_map(str(path)) as file:
            yield from pa.ipc.open_stream(file)
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: Exception) -> UserError:
    reason = " ".join(str(error).split())
    return UserError(f"data.cache_dir: can't read {path} ({reason}); start the same command again")


def _row(record: Record, number: int, stamps: dict[str, str], table_stamp: str) -> dict[str, Any]:
    """A record as a row, without READ_COLUMNS. The stamp is zero where changes of a file can't be detected."""
    location, mask = record.location, record.mask
    files = [location] if mask in (None, NO_MASK) else [location, mask]
    versions = [table_stamp if at.size in (TABLE_ROW, MASK_ROW) else stamp(at.file, stamps) for at in files]
    stamped = [field for at, version in zip(files, versions, strict=True) for field in (*at, version)]
    row_stamp = hashlib.sha256(repr(tuple(stamped)).encode()).digest()[:16] if all(versions) else bytes(16)
    return {
        **{name: getattr(record, name) for name in RECORD_COLUMNS},
        "file": location.file,
        "start": location.start,
        "size": location.size,
        "captions": list(record.captions),
        "source": number,
        "stamp": row_stamp,
        "attributes": json.dumps(dict(record.attributes)) if record.attributes else None,
        **(dict(zip(MASK_COLUMNS, mask, strict=True)) if mask else {}),
    }


def _read_image(sources: Sources, record: Record, data: DataConfig) -> dict[str, Any]:
    """READ_COLUMNS of an image: the hashes of it and its mask, its size; or why it is bad."""

    def read(location: ImageLocation) -> bytes:
        return content if location == record.location else sources.read(location)

    try:
        content = sources.read(record.location)
        image = decode(content, data.background, data.min_side)
        mask = load_mask(record, image.size, read)
    except BadSampleError as error:
        return dict(zip(("reason", "fix"), error.args, strict=True))
    except Exception as error:  # anything, maybe temporary: a zero stamp has it tried again
        reason = f"it can't be read ({error or error!r})"
        return {"reason": reason, "fix": "see that it is there and may be read", "stamp": bytes(16)}
    return {
        "sha256": hashlib.sha256(content).digest(),
        "width": image.width,
        "height": image.height,
        "phash": int(str(imagehash.phash(image)), 16),
        "mask_sha256": mask[1] if mask else None,
    }
