"""What is read ahead of a memory-mapped file: the pages of the elements, and of what they refer to."""

from __future__ import annotations

import ctypes
import hashlib
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from of_config import images_of, indexed
from torch.utils.data import Dataset

from ldm.config import loader
from ldm.data import page_cache, read_ahead
from ldm.data.cache import Cache
from ldm.data.column_store import ColumnStore
from ldm.data.crops import Crop
from ldm.data.draws import with_draws
from ldm.data.index_file import map_for_single_rows, write_batches
from ldm.data.index_schema import SCHEMA
from ldm.data.key_lookup import KeyLookup
from ldm.data.page_cache import MappedArray, address
from ldm.data.sampler import Order, Positions


@pytest.fixture
def advised(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """The numbers of the pages that the system is to read, as long as the test runs."""
    pages: set[int] = set()

    def advise(address: int, length: int, advice: int) -> int:
        assert address % mmap.PAGESIZE == 0 and length == mmap.PAGESIZE and advice == mmap.MADV_WILLNEED
        pages.add(address // mmap.PAGESIZE)
        return 0

    monkeypatch.setattr(page_cache, "_madvise", lambda: advise)
    return pages


def pages_of(address: int, size: int) -> set[int]:
    return {(address + byte) // mmap.PAGESIZE for byte in range(size)}


def pages_of_text(array: pa.Array, text: str) -> set[int]:
    """Where the array has a text that no earlier one contains."""
    buffer, content = array.buffers()[2], text.encode()
    return pages_of(buffer.address + buffer.to_pybytes().index(content), len(content))


@pytest.mark.parametrize("dtype", ["u1", "u4", "S32"])
def test_an_address_is_that_of_the_element(dtype: str) -> None:
    values = np.array([5, 6, 7, 8], dtype)
    assert ctypes.string_at(address(values, 2), values.itemsize) == values[2:3].tobytes()


def test_lookups_advance_together(advised: set[int]) -> None:
    """Each turn reads what all need; what ends early waits for none."""
    seen: list[set[int]] = []

    def lookup(turns: int) -> page_cache.Lookup[None]:
        for turn in range(turns):
            yield [mmap.PAGESIZE * (100 * turns + turn)]
            seen.append(set(advised))

    page_cache.look_up(map(lookup, (2, 0, 3)))
    assert seen[0] == seen[1] == {200, 300}  # both were asked for before either was read
    assert advised == {200, 201, 300, 301, 302}


def test_the_pages_of_a_row_are_those_of_its_values(tmp_path: Path, advised: set[int]) -> None:
    captions = [[f"caption {j} of image {i}, " + "x" * (i % 700) for j in range(i % 3)] for i in range(5000)]
    rows = [
        {"captions": texts, "sha256": bytes([i % 256] * 32), "width": i, "label": None if i % 2 else f"class {i}"}
        for i, texts in enumerate(captions)
    ]
    write_batches(tmp_path / "index.arrow", [pa.RecordBatch.from_pylist(rows, SCHEMA)])
    (batch,) = map_for_single_rows(tmp_path / "index.arrow")
    for i in (0, 77, 4996, 4999):
        advised.clear()
        columns = [MappedArray(batch[name]) for name in ("captions", "sha256", "width", "label", "dropout")]
        page_cache.look_up([column.row(i) for column in columns])  # the last column has only nulls
        needed = set().union(*(pages_of_text(batch["captions"].values, text) for text in captions[i]))
        needed |= pages_of_text(batch["label"], f"class {i}") if i % 2 == 0 else set()
        for name, size in (("width", 4), ("sha256", 32)):
            needed |= pages_of(batch[name].buffers()[1].address + size * i, size)
        assert needed <= advised
        assert len(advised) <= len(needed) + 9  # of offsets and validity


@pytest.mark.parametrize(
    "kinds", [{}, {"weights": [1.0, 2.5] * 20}, {"repeats": [1, 3] * 20}, {"prior": np.arange(40) % 5 == 0}]
)
def test_a_lookup_finds_what_the_order_has(kinds: dict[str, Any]) -> None:
    order = Order(**{"weights": [1.0] * 40, "seed": 0, "batch": 4, "buckets": [i % 3 for i in range(40)], **kinds})

    def compared(n: int) -> page_cache.Lookup[None]:
        assert (yield from order.lookup(n)) == order[n]

    page_cache.look_up(map(compared, range(100)))


def test_lookups_end_where_the_system_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page_cache, "_madvise", lambda: None)
    order = Order([1.0] * 40, 0)
    page_cache.look_up(map(order.lookup, range(100)))


def test_the_system_takes_the_advice(tmp_path: Path) -> None:
    np.save(tmp_path / "values.npy", np.arange(10**5))
    values = np.load(tmp_path / "values.npy", mmap_mode="r").view(np.ndarray)
    call = page_cache._madvise()
    assert call
    assert call(values.ctypes.data // mmap.PAGESIZE * mmap.PAGESIZE, mmap.PAGESIZE, mmap.MADV_WILLNEED) == 0
    assert values[-1] == 99_999


def test_the_pages_of_a_key_are_where_it_is_found(tmp_path: Path, advised: set[int]) -> None:
    keys = np.random.default_rng(0).integers(0, 256, (20_000, 32), np.uint8).view("S32").ravel()
    lookup = KeyLookup(ColumnStore(tmp_path), (), [Path("a")], lambda file: keys)
    for i in range(0, 20_000, 999):
        advised.clear()
        page_cache.look_up([lookup.lookup(bytes(keys[i].ljust(32, b"\0")))])
        at = int(np.flatnonzero(lookup.keys == keys[i])[0])
        assert lookup.place(bytes(keys[i].ljust(32, b"\0"))) == (0, i)
        for values in (lookup.keys, lookup._order):
            assert pages_of(values.ctypes.data + values.itemsize * at, values.itemsize) <= advised


def test_reading_ahead_changes_no_sample(
    root: Path, tmp_path: Path, three_shapes: Callable[[list[str]], Path], advised: set[int]
) -> None:
    folder = three_shapes([f"image {i}\nanother {i}" for i in range(22)])
    keys = [f"data.source.path={folder}", "data.source.lines=true", "data.size=16", "data.buckets={step: 8}"]
    config = loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}", *keys, "data.flip=true"])
    ahead, plain = (images_of(indexed(config), config, 4).plan for _ in range(2))
    assert ahead.read_ahead(range(8, 12)) == [plain[n] for n in range(8, 12)]
    assert advised
    assert [ahead[n] for n in range(8, 16)] == [plain[n] for n in range(8, 16)]
    assert not ahead._ahead  # a sample is kept until it is asked for


class Announced(Dataset[dict[str, Any]]):
    """Items that say whether a loader process has announced their batch."""

    def __init__(self) -> None:
        self.ahead: list[int] = []

    def read_ahead(self, positions: Sequence[int]) -> None:
        self.ahead += positions

    def __getitem__(self, n: int) -> dict[str, Any]:
        return {"position": n, "announced": n in self.ahead}


def test_a_loader_process_announces_a_batch_before_it_reads_it() -> None:
    dataset = with_draws(Announced(), lambda n, item: {"drawn": n})
    assert isinstance(dataset, Dataset)
    (batch,) = read_ahead.data_loader(dataset, Positions(0, 1, 8, 1, 0, 1), 1, 2)
    assert batch["position"].tolist() == batch["drawn"].tolist() == [*range(8)] and bool(batch["announced"].all())


def test_a_cache_looks_up_the_keys_of_images_and_captions() -> None:
    asked: list[Any] = []

    def store(name: str) -> Any:
        def lookup(key: bytes) -> page_cache.Lookup[None]:
            asked.append((name, key))
            yield []

        return SimpleNamespace(lookup=SimpleNamespace(lookup=lookup))

    cache = Cache({(8, 8): store("small"), (16, 8): store("wide")}, {}, store("text"), [(-1, False)])
    cache.read_ahead([(Crop((16, 8)), b"a" * 32, "a cat"), (Crop((8, 8)), b"b" * 32, "a dog")])
    captions = [("text", hashlib.sha256(caption).digest()) for caption in (b"a cat", b"a dog")]
    assert asked == [("wide", b"a" * 32), ("small", b"b" * 32), *captions]
