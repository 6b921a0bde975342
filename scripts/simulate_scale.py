"""Measures the data layer at the size of a real data set, without images: start, batches, and continuing.

    python scripts/simulate_scale.py FOLDER --images 1e6 1e8

For each number of images it writes an index with captions of 60 bytes and the keys of a cache to FOLDER, and removes
them afterwards: 35 GB for a hundred million. Then it measures, in a process of its own each, what a rank does: the
first start, which writes the columns that follow from the index; a later start; 1,000 batches of `--batch` samples in a
loader process, with captions and their places in the cache, but no image; and the first batch after 73 % of an epoch.
Memory is the peak of what a process has for itself (anonymous): mapped files are shared, and may leave memory any time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import resource
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

import numpy as np
import pyarrow as pa
import torch

from ldm.config import loader
from ldm.data.arrow_columns import leading_bytes
from ldm.data.column_store import ColumnStore
from ldm.data.dataset import SamplePlan
from ldm.data.index import Index
from ldm.data.index_file import map_for_single_rows, memory_map, write_batches
from ldm.data.index_schema import SCHEMA
from ldm.data.index_table import IndexTable
from ldm.data.key_lookup import KeyLookup
from ldm.data.page_cache import look_up
from ldm.data.sampler import Positions, SampleSpec

ROWS, PER_FILE = 65_536, 4096  # of a chunk of the index; of a file of the cache
BATCHES, RESUMED_AT, RANKS = 1000, 0.73, 8
BOUNDS = {"memory": 4e9, "seconds": 60.0, "samples": 1000.0}
ROOT = Path(__file__).resolve().parents[1]
PHASES = ("columns", "start", "worker", "resume")


def main() -> int:
    parser = argparse.ArgumentParser(prog="simulate_scale.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help="created, and removed at the end")
    parser.add_argument("--images", type=lambda text: int(float(text)), nargs="+", default=[10**6], metavar="N")
    parser.add_argument("--batch", type=int, default=32, help="samples of a batch (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends a line of JSON for each number of images")
    parser.add_argument("--phase", choices=PHASES, help=argparse.SUPPRESS)  # of a process that measures
    args = parser.parse_args()
    if args.phase:
        print(json.dumps(measure(args.phase, args.folder, args.images[0], args.batch)))
        return 0
    results = [simulate(args.folder / str(images), images, args) for images in args.images]
    table(results)
    return 0 if all(holds(result) for result in results) else 1


def simulate(folder: Path, images: int, args: argparse.Namespace) -> dict[str, Any]:
    """Writes an index, measures with it, and removes it."""
    folder.mkdir(parents=True)
    try:
        start = time.perf_counter()
        write_batches(folder / "index.arrow", batches(images))
        result: dict[str, Any] = {"images": images, "write": {"seconds": time.perf_counter() - start}}
        result["bytes"] = (folder / "index.arrow").stat().st_size
        for phase in PHASES:
            command = [sys.executable, __file__, str(folder), f"--images={images}", f"--batch={args.batch}"]
            process = subprocess.run([*command, f"--phase={phase}"], capture_output=True, text=True, check=False)
            if process.returncode:
                raise SystemExit(process.stderr)
            result[phase] = json.loads(process.stdout.splitlines()[-1])
            print(f"{images:,} images, {phase}: {result[phase]}", file=sys.stderr, flush=True)
        result["bytes_derived"] = sum(file.stat().st_size for file in folder.rglob("*.npy"))
    finally:
        shutil.rmtree(folder)
    if args.json:
        with args.json.open("a") as file:
            file.write(json.dumps(result) + "\n")
    return result


# -------------------------------------------------------------------------------------------------- a synthetic index


def batches(images: int) -> Iterator[pa.RecordBatch]:
    """The rows of an index of so many images of several shapes, with distinct captions."""
    for start in range(0, images, ROWS):
        count = min(ROWS, images - start)
        rng, numbers = np.random.default_rng(start), np.arange(start, start + count)
        captions = text("a photograph of thing number 000000000, by a window, evening", 29, numbers)
        columns: dict[str, Any] = {
            "key": text("000000000.jpg", 0, numbers),
            "file": text("shards/000000000.tar", 7, numbers // 10_000),
            "captions": pa.LargeListArray.from_arrays(np.arange(count + 1), captions),
            "start": rng.integers(0, 2**30, count),
            "size": rng.integers(2**14, 2**18, count),
            "sha256": fixed(rng.bytes(32 * count), 32),
            "stamp": fixed(rng.bytes(16 * count), 16),
            "phash": rng.integers(0, 2**63, count).astype(np.uint64),
            "width": rng.choice([512, 640, 768, 1024, 1333], count).astype(np.int32),
            "height": rng.choice([512, 640, 768, 1000], count).astype(np.int32),
        }
        same = {"split": "train", "label": "", "weight": 1.0, "repeats": 1, "source": 0}
        arrays = [
            pa.array(columns[field.name], field.type)
            if field.name in columns
            else pa.repeat(pa.scalar(same.get(field.name), field.type), count)
            for field in SCHEMA
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def text(template: str, at: int, numbers: np.ndarray) -> pa.Array:
    """Copies of an ASCII text with a number of nine digits at a position in each."""
    characters = np.tile(np.frombuffer(template.encode(), np.uint8), (len(numbers), 1))
    for digit in range(9):
        characters[:, at + digit] = 48 + numbers // 10 ** (8 - digit) % 10
    offsets = np.arange(len(numbers) + 1, dtype=np.int64) * len(template)
    return pa.Array.from_buffers(pa.large_string(), len(numbers), [None, *map(pa.py_buffer, (offsets, characters))])


def fixed(content: bytes, width: int) -> pa.Array:
    return pa.Array.from_buffers(pa.binary(width), len(content) // width, [None, pa.py_buffer(content)])


# ---------------------------------------------------------------------------------------------------------- measuring


def measure(phase: str, folder: Path, images: int, batch: int) -> dict[str, float]:
    """One phase, in this process: seconds, memory, and what else it says."""
    with PeakMemory() as memory:
        start, cpu = time.perf_counter(), time.process_time()
        more = PHASE[phase](folder, images, batch)
        seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu, "memory": memory.peak, **more}


def opened(folder: Path) -> tuple[Index, KeyLookup]:
    """The index, and the places of its images' latents in the cache."""
    data = loader.load(ROOT / "configs/tiny.yaml", ["data.size=512", "data.buckets={step: 64}"]).data
    path = folder / "index.arrow"
    rows = pa.Table.from_batches(memory_map(path), SCHEMA)
    table = IndexTable(rows, ColumnStore(folder / "columns"), map_for_single_rows(path))
    index = Index(table, SimpleNamespace(conditions=("text",)), data)  # type: ignore[arg-type]
    files = [Path(str(number)) for number in range(-(-len(table) // PER_FILE))]
    chunks = table["sha256"]

    def read_keys(file: Path) -> np.ndarray:
        part = chunks.chunk(int(file.name) * PER_FILE // ROWS).slice(int(file.name) * PER_FILE % ROWS, PER_FILE)
        return leading_bytes(pa.chunked_array([part]), 32).view("S32").ravel()

    return index, KeyLookup(ColumnStore(folder / "lookup"), (), files, read_keys)


def columns(folder: Path, images: int, batch: int) -> dict[str, float]:
    """The first start after indexing: what follows from the index is written once, by the main process."""
    index, _ = opened(folder)
    index.draws()
    index.labels()
    start = time.process_time()
    index.fingerprint()
    return {"fingerprint_cpu_seconds": time.process_time() - start}


def start(folder: Path, images: int, batch: int) -> dict[str, float]:
    """A later start of a rank."""
    index, _ = opened(folder)
    index.fingerprint()
    plan = SamplePlan(index.select("train"), SampleSpec(batch * RANKS))
    return {"buckets": len(plan.order.rounds)}


class Samples(torch.utils.data.Dataset[dict[str, Any]]):
    """Samples with the places of their encodings, but no image."""

    def __init__(self, folder: Path, batch: int):
        index, self.lookup = opened(folder)
        self.plan = SamplePlan(index, SampleSpec(batch * RANKS))

    def __getitem__(self, n: int) -> dict[str, Any]:
        sample = self.plan[n]
        file, row = self.lookup.place(sample.entry.sha256)
        # A caption's place takes as long to find; that the lookup has none changes nothing.
        with contextlib.suppress(KeyError):
            self.lookup.place(hashlib.sha256(sample.caption.encode()).digest())
        return {**self.plan.conditions(n, sample), "caption": sample.caption, "file": file, "row": row}

    def __getitems__(self, positions: list[int]) -> list[dict[str, Any]]:
        before = self.used()
        planned = self.plan.read_ahead(positions)
        keys = [sample.entry.sha256 for sample in planned]
        keys += [hashlib.sha256(sample.caption.encode()).digest() for sample in planned]
        look_up(map(self.lookup.lookup, keys))
        items = [self[n] for n in positions]
        used = {name: (value - before[name]) / len(items) for name, value in self.used().items()}
        return [{**item, **used, "memory": anonymous()} for item in items]

    @staticmethod
    def used() -> dict[str, float]:
        """What this process has used so far."""
        reads = resource.getrusage(resource.RUSAGE_SELF).ru_majflt
        return {"cpu_seconds": time.process_time(), "seconds": time.perf_counter(), "reads": reads}


def worker(folder: Path, images: int, batch: int) -> dict[str, float]:
    """Batches of one rank of several in a loader process."""
    samples, used, memory = Samples(folder, batch), dict.fromkeys(Samples.used(), 0.0), 0.0
    positions = Positions(0, BATCHES, batch * RANKS, 1, 3, RANKS)
    for items in torch.utils.data.DataLoader(samples, batch_sampler=positions, num_workers=1):
        used = {name: value + float(items[name].sum()) for name, value in used.items()}
        memory = max(memory, float(items["memory"].max()))
    count = BATCHES * batch
    rates = {"samples_per_cpu_second": count / used["cpu_seconds"], "samples_per_second": count / used["seconds"]}
    return {**rates, "reads_per_sample": used["reads"] / count, "memory": memory}


def resume(folder: Path, images: int, batch: int) -> dict[str, float]:
    """The first batch of a process that continues within an epoch."""
    samples = Samples(folder, batch)
    step = samples.plan.order.first_step(1) * RESUMED_AT
    positions = Positions(int(step), int(step) + 1, batch * RANKS, 1, 3, RANKS)
    return {"samples": sum(len(samples.__getitems__(part)) for part in positions)}


PHASE = {"columns": columns, "start": start, "worker": worker, "resume": resume}


def anonymous() -> float:
    """Bytes that this process has for itself, without mapped files."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024.0 * int(line.split()[1])


class PeakMemory(threading.Thread):
    """The peak of `anonymous`, within its block, as a thread sees it 50 times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self._ended = anonymous(), threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.02):
            self.peak = max(self.peak, anonymous())

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


# ------------------------------------------------------------------------------------------------------------- output


def table(results: list[dict[str, Any]]) -> None:
    """Prints a column for each number of images, and the growth from the first to the last."""
    rows: list[tuple[str, tuple[str, ...], float]] = [("index, GB", ("bytes",), 1e9)]
    rows += [("derived columns, GB", ("bytes_derived",), 1e9)]
    rows += [(f"{phase}, s", (phase, "seconds"), 1) for phase in ("write", *PHASES)]
    rows += [(f"{phase}, CPU s", (phase, "cpu_seconds"), 1) for phase in PHASES]
    rows += [(f"{phase}, GB of memory", (phase, "memory"), 1e9) for phase in PHASES]
    rows += [("samples per CPU second of a worker", ("worker", "samples_per_cpu_second"), 1)]
    rows += [("samples per second of a worker", ("worker", "samples_per_second"), 1)]
    rows += [("reads of the disk per sample", ("worker", "reads_per_sample"), 1)]
    rows += [("fingerprint, CPU s", ("columns", "fingerprint_cpu_seconds"), 1)]
    print(f"{'images':35}" + "".join(f"{result['images']:>14,}" for result in results) + f"{'growth':>9}")
    for name, keys, unit in rows:
        values = [value_at(result, keys) / unit for result in results]
        growth = f"{values[-1] / values[0]:8.1f}×" if values[0] else ""
        print(f"{name:35}" + "".join(f"{value:14,.3f}" for value in values) + growth)


def value_at(result: Any, keys: tuple[str, ...]) -> float:
    for key in keys:
        result = result[key]
    return float(result)


def holds(result: dict[str, Any]) -> bool:
    """Whether all bounds hold; prints those that don't."""
    values = [(f"memory of {phase}, bytes", result[phase]["memory"], BOUNDS["memory"]) for phase in PHASES]
    values += [(f"seconds of {phase}", result[phase]["seconds"], BOUNDS["seconds"]) for phase in ("start", "resume")]
    for name in ("samples_per_cpu_second", "samples_per_second"):
        values += [(f"1 / {name}", 1 / result["worker"][name], 1 / BOUNDS["samples"])]
    exceeded = [f"{name}: {value:.4g} exceeds {bound:.4g}" for name, value, bound in values if value > bound]
    print("\n".join(f"{result['images']:,} images, {line}" for line in exceeded) or "all bounds hold")
    return not exceeded


if __name__ == "__main__":
    raise SystemExit(main())
