"""The index of a run's images, a memory-mapped table on disk. It is built by opening every image once.

An image whose file has not changed since (size and time) is not opened again. Bad images are in the index too, for the
report. A million images take a few bytes each in memory.

All processes of a run list all images, and open the chunks of them in turn. Each writes what it read to a file of its
own, which the main process then joins.
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
from ldm.data.index_file import CHUNK, MASK_COLUMNS, RECORD_COLUMNS, SCHEMA, TEXT, leading_bytes, write_index
from ldm.data.masks import load_mask
from ldm.data.records import PRIOR, BadSample, ImageLocation, Record
from ldm.data.source_kinds import CAPTIONED
from ldm.data.sources import Sources
from ldm.distributed.consensus import on_all
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

MAX_REPORTED = 10_000  # bad samples that the report lists


@dataclass(frozen=True)
class Entry(Record):
    """A record whose image has been opened: SHA-256 of its bytes, width and height after rotation by its EXIF.

    `mask_sha256` is None where the image has no mask.
    """

    sha256: bytes = b""
    width: int = 0
    height: int = 0
    mask_sha256: bytes | None = None


class Index:
    """The usable images of a run, or a subset: a sequence of entries over a memory-mapped table."""

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
            location=ImageLocation(row["file"], row["start"], row["size"]),
            captions=tuple(row["captions"]),
            attributes=json.loads(row["attributes"]) if row["attributes"] else {},
            mask=None if row["mask_file"] is None else ImageLocation(*(row[name] for name in MASK_COLUMNS)),
            **{name: row[name] for name in (*RECORD_COLUMNS, "sha256", "width", "height", "mask_sha256")},
        )

    def __iter__(self) -> Iterator[Entry]:
        return (self[i] for i in range(len(self)))

    def select(self, *splits: str) -> Index:
        """The entries of these splits: `train`, `reconstruction`, `combination`, `prior`."""
        chosen = pc.is_in(self.table["split"], pa.array(splits, TEXT)).to_numpy(zero_copy_only=False)
        return Index(self.table, self.sources, self.data, self.rows[chosen[self.rows].astype(bool)])

    def first(self, count: int) -> Index:
        return Index(self.table, self.sources, self.data, self.rows[:count])

    def subset(self, count: int) -> Index:
        """At most `count` entries, drawn at random but always the same."""
        if len(self) <= count:
            return self
        chosen = np.sort(np.random.default_rng(0).permutation(len(self))[:count])
        return Index(self.table, self.sources, self.data, self.rows[chosen])

    def half(self, number: int) -> Index:
        """One of two halves, 0 or 1. An entry's half follows from its file's content."""
        last = np.array([sha256[-1] for sha256 in self.column("sha256")], int)
        return Index(self.table, self.sources, self.data, self.rows[last % 2 == number])

    def column(self, name: str) -> np.ndarray:
        """A column of the table for all entries, `(N,)`."""
        return pa.chunked_array(_take_rows(self.table[name], self.rows), self.table[name].type).to_numpy()

    def captions(self) -> Iterator[list[str]]:
        """The captions of each entry."""
        return self._values("captions")

    def _values(self, name: str) -> Iterator[Any]:
        for part in _take_rows(self.table[name], self.rows):
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
        of_class = pc.equal(self.table["split"], PRIOR).fill_null(False).to_numpy(zero_copy_only=False)[self.rows]
        return of_class.astype(bool) if of_class.any() else None

    @cached_property
    def sizes(self) -> list[Size]:
        """The size of the bucket of each entry."""
        buckets, known = Buckets(self.data.size, self.data.buckets), dict[Size, Size]()
        pairs = zip(self.column("width").tolist(), self.column("height").tolist(), strict=True)
        return [known.get(pair) or known.setdefault(pair, buckets.of(*pair)) for pair in pairs]

    def by_size(self) -> dict[Size, np.ndarray]:
        """The numbers of the entries of each size."""
        sizes, groups = np.unique(np.array(self.sizes), axis=0, return_inverse=True)
        return {(int(w), int(h)): np.flatnonzero(groups.ravel() == i) for i, (w, h) in enumerate(sizes)}

    def labels(self) -> list[str]:
        """The classes of all usable images, also of other splits, sorted. A class's number is its index here."""
        usable = self.table["label"].filter(pc.is_null(self.table["reason"]))
        return sorted(label for label in pc.unique(usable).to_pylist() if label)

    def fingerprint(self) -> str:
        """SHA-256 of the images' content, masks, captions and classes: a run is only continued on the same data."""
        digest = hashlib.sha256()
        if "class" in self.sources.conditions:  # a class that only other splits have changes the numbers of these
            digest.update(repr(self.labels()).encode())
        names = ("sha256", "weight", "repeats", "flip", "dropout", "label")
        columns = (self._values(name) for name in (*names, "mask_sha256"))
        for captions, *row, mask in zip(self.captions(), *columns, strict=True):
            digest.update(repr((captions, *row, *([] if mask is None else [mask]))).encode())
        return digest.hexdigest()

    # ------------------------------------------------------------------------------------------------------------ masks

    def masks_by_source(self) -> dict[int, tuple[int, int]]:
        """Of each source with masks: how many of its usable images have one, and how many don't."""
        table = self._should_have_masks()
        sources, present = (column.to_numpy() for column in (table["source"], pc.is_valid(table["mask_sha256"])))
        return {
            int(n): (int(present[sources == n].sum()), int((~present[sources == n]).sum())) for n in np.unique(sources)
        }

    def without_masks(self) -> Iterator[str]:
        """The names of usable images that should have a mask and have none."""
        table = self._should_have_masks()
        for batch in table.filter(pc.is_null(table["mask_sha256"])).to_batches(CHUNK):
            yield from batch["key"].to_pylist()

    def _should_have_masks(self) -> pa.Table:
        table = self.table.select(["key", "source", "reason", "mask_file", "mask_sha256"])
        return table.filter(pc.and_(pc.is_null(table["reason"]), pc.is_valid(table["mask_file"])))

    # ------------------------------------------------------------------------------------------------------ bad samples

    def bad_samples(self) -> Iterator[BadSample]:
        table = self.table.filter(pc.is_valid(self.table["reason"])).select(["key", "reason", "fix"])
        for batch in table.to_batches(CHUNK):
            yield from (BadSample(**row) for row in batch.to_pylist())

    def bad_count(self) -> int:
        return len(self.table) - self.table["reason"].null_count

    def write_report(self, path: Path) -> None:
        """Writes `data-report.json`: how many good images and captions; each bad image: file, reason, remedy."""
        listed = [bad.__dict__ for _, bad in zip(range(MAX_REPORTED), self.bad_samples(), strict=False)]
        splits, counts = np.unique(self.column("split").astype(str), return_counts=True)
        captions = pc.fill_null(pc.list_value_length(self.table["captions"]), 0).to_numpy()
        report = {
            "images": len(self),
            "splits": dict(zip(splits.tolist(), counts.tolist(), strict=True)),
            "captions": int(captions[self.rows].sum()),
            "bad": self.bad_count(),
            "left_out": dict(self.sources.left_out().counts),
            "on_error": self.data.on_error,
            "max_bad": self.data.max_bad,
            "list": listed,
        }
        if masks := self.masks_by_source():
            names = [name for _, name in zip(range(MAX_REPORTED), self.without_masks(), strict=False)]
            report["masks"] = {"images": sum(n for n, _ in masks.values()), "without": names}
        with atomic_file(path) as tmp_path:
            tmp_path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")

    def stop_reason(self, report: Path) -> str:
        """Why the bad images forbid training, in one line that names the file `report`; empty if they don't."""
        bad, total = self.bad_count(), len(self.table)
        if not len(self):
            first = next(self.bad_samples(), None)
            return f"data.source: no usable image in {self.data.name}" + (
                f"; the first bad one: {first}" if first else ""
            )
        if not len(self.select("train")):
            if self.prior() is not None and not self.data.val_fraction:
                return f"data.source: {self.data.name} has only images of the class; add those of the subject"
            fraction = self.data.val_fraction
            return f"data.val_fraction: {fraction} holds out all {len(self)} images; set it to 0, or add some"
        for number, (masked, _) in self.masks_by_source().items():
            if not masked:
                return self.sources.no_masks(number)
        stops = bad and self.data.on_error == "stop"
        if stops or bad > self.data.max_bad * total:
            rule = "data.on_error is stop" if stops else f"data.max_bad is {self.data.max_bad}"
            return f"{bad} of {total} images are bad, and {rule}; see {report}. The first: {next(self.bad_samples())}"
        return ""


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
    table = write_index(cache_dir / f"index-{_cache_key(data, conditions)}.arrow", sources, data)
    return Index(_hold_out(table, data.val_fraction), sources, data)


def _cache_key(data: DataConfig, conditions: Sequence[str]) -> str:
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


def _lost(key: str, reason: str) -> UserError:
    return UserError(f"{key}: {reason}; put it back, or start the same command again to index it anew")


def _hold_out(table: pa.Table, fraction: float) -> pa.Table:
    """Moves a fraction of the training images into the split `reconstruction`, chosen by their files' content."""
    if not fraction:
        return table
    drawn = leading_bytes(table["sha256"], 4).view(">u4").ravel()  # uniform: the first bytes of a SHA-256
    held = pc.and_(pa.array(drawn < math.ceil(fraction * 2**32)), pc.equal(table["split"], "train").fill_null(False))
    split = pc.if_else(held, pa.scalar("reconstruction", TEXT), table["split"])
    return table.set_column(SCHEMA.get_field_index("split"), "split", split)


# ---------------------------------------------------------------------------------------------- columns by their chunks


def _take_rows(column: pa.ChunkedArray, rows: np.ndarray) -> Iterator[pa.Array]:
    """The values of some rows, in their order. Chunks are never joined, which would copy the whole column."""
    ends = np.cumsum([len(chunk) for chunk in column.chunks])
    which = np.searchsorted(ends, rows, side="right")
    borders = np.flatnonzero(np.diff(which)) + 1
    for start, end in itertools.pairwise((0, *borders.tolist(), len(rows))):
        if start < end:
            chunk = column.chunk(which[start])
            local = rows[start:end] - (ends[which[start]] - len(chunk))
            contiguous = np.array_equal(local, np.arange(local[0], local[0] + len(local)))
            yield chunk.slice(local[0], len(local)) if contiguous else chunk.take(pa.array(local))
