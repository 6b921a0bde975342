"""Batches that are read ahead: the order of the sampler, whatever reading takes."""

from __future__ import annotations

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import pytest
import torch
from of_config import cached, indexed
from torch.utils.data import DataLoader, Dataset

from ldm.config import loader
from ldm.config.schema import Stage1Config
from ldm.data import encoding_store, read_ahead
from ldm.data.sampler import Order, Positions
from ldm.models import autoencoder
from ldm.utils.errors import UserError
from ldm.utils.rng import generator

Item = dict[str, Any]
BATCH, STEPS = 3, 10


class Squares(Dataset[Item]):
    """Items that take up to 5 ms to read, as their positions say; `read` is called with each position."""

    def __init__(self, read: Callable[[int], Any] = lambda n: None):
        self.read = read

    def __getitem__(self, n: int) -> Item:
        with read_ahead.waiting_for_storage():
            time.sleep(float(generator(0, "seconds", n).random()) * 0.005)
            read = self.read(n)
        return {"position": torch.tensor(n), "square": torch.tensor(n * n), "read": str(read)}


def positions(first: int = 0, rank: int = 0, processes: int = 1) -> Positions:
    return Positions(first, STEPS, BATCH * processes, 1, rank, processes)


@pytest.mark.parametrize(("workers", "prefetch_factor"), [(0, 2), (1, 1), (1, 5), (3, 2), (4, 9)])
def test_batches_are_those_of_torchs_loader_in_its_order(workers: int, prefetch_factor: int) -> None:
    expected = list(DataLoader(Squares(), batch_sampler=positions(2, 1, 2)))
    batches = list(read_ahead.data_loader(Squares(), positions(2, 1, 2), workers, prefetch_factor))
    assert len(batches) == len(expected) == 8
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys() and batch["read"] == other["read"]
        assert torch.equal(batch["position"], other["position"]) and torch.equal(batch["square"], other["square"])


@pytest.mark.parametrize(("prefetch_factor", "finished"), [(4, "False"), (5, "True")])
def test_as_many_batches_as_asked_for_are_read_while_one_item_is_late(prefetch_factor: int, finished: str) -> None:
    later: Event = multiprocessing.get_context("fork").Event()

    def read(n: int) -> bool | None:
        if n == 3 * BATCH:  # of the fourth batch
            later.set()
        return later.wait(5 if finished == "True" else 0.3) if n == 0 else None

    batches = read_ahead.data_loader(Squares(read), positions(), 1, prefetch_factor)
    assert next(iter(batches))["read"] == [finished, "None", "None"]


def test_an_items_error_comes_in_its_batchs_turn() -> None:
    def read(n: int) -> None:
        if n == 2 * BATCH:
            raise UserError("a.png: it can't be read")

    batches = iter(read_ahead.data_loader(Squares(read), positions(), 2, 4))
    assert [next(batches)["position"].tolist() for _ in range(2)] == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(UserError, match=r"a\.png: it can't be read"):
        next(batches)
    batches._shutdown_workers()


class Counting(Dataset[Item]):
    """Items that say how many threads compute at once, and how many had begun when one had read."""

    def __init__(self) -> None:
        self.begun = self.computing = 0

    def __getitem__(self, n: int) -> Item:
        self.begun += 1
        with read_ahead.waiting_for_storage():
            end = time.monotonic() + 20
            while self.begun < 12 and time.monotonic() < end:
                time.sleep(0.001)
            begun = self.begun
        self.computing += 1
        time.sleep(0.001)  # another thread could compute
        computing = self.computing
        self.computing -= 1
        return {"begun": begun, "computing": computing}


def test_items_are_read_at_once_and_computed_one_after_another() -> None:
    (batch,) = read_ahead.data_loader(Counting(), Positions(0, 1, 12, 1, 0, 1), 1, 2)
    assert batch["begun"].tolist() == [12] * 12
    assert batch["computing"].tolist() == [1] * 12


@pytest.fixture
def hasty_switches() -> Any:
    """Threads take turns every few operations."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_threads_get_the_samples_of_their_positions(hasty_switches: None) -> None:
    def order() -> Order:
        return Order([1.0] * 20, seed=1, batch=2, buckets=[(1, 1)] * 11 + [(1, 2)] * 9)

    alone = order()
    expected, shared = [alone[n] for n in range(600)], order()
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(shared.__getitem__, range(600))) == expected


# --------------------------------------------------------------------------------------------------------------- cache


@pytest.fixture
def store(root: Path, three_shapes: Callable[[list[str]], Path]) -> encoding_store.EncodingStore:
    """The latents of twelve images in as many files."""
    folder = three_shapes([f"image {i}" for i in range(12)])
    overrides = [f"run.dir={folder.parent / 'run'}", f"data.source={folder}", "data.size=16", "data.buckets=null"]
    config = loader.load(root / "configs/tiny.yaml", overrides)
    torch.manual_seed(0)
    shape = Stage1Config(channels=(16, 16), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False)
    vae = autoencoder.Autoencoder(autoencoder.build(shape, 16))
    (store,) = cached(indexed(config), config, vae, None, per_file=1).latents.values()
    return store


def keys_of(store: encoding_store.EncodingStore) -> list[bytes]:
    return [key.ljust(32, b"\0") for key in store.keys.tolist()]  # numpy strips NULs from the end


def test_threads_read_entries_of_more_files_than_may_be_open(
    store: encoding_store.EncodingStore, hasty_switches: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = keys_of(store)
    expected = [store[key]["mean"] for key in keys]
    store._open.clear()
    monkeypatch.setattr(encoding_store, "MAX_OPEN", 1)
    with ThreadPoolExecutor(8) as threads:
        entries = list(threads.map(store.__getitem__, keys * 20))
    assert all(torch.equal(entry["mean"], expected[i % len(keys)]) for i, entry in enumerate(entries))
    assert len(store._open) <= 8 < len(store.files)


def test_the_files_opened_last_stay_open(store: encoding_store.EncodingStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding_store, "MAX_OPEN", 3)
    opened = []
    for key in keys_of(store):
        store[key]
        opened.append(store.lookup.place(key)[0])
        assert list(store._open) == opened[-3:]


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(path.read_bytes()[:-10]), lambda path: path.unlink()])
def test_a_file_of_the_cache_that_is_damaged_after_the_start_is_one_line(
    store: encoding_store.EncodingStore, damage: Callable[[Path], Any]
) -> None:
    key = next(key for key in keys_of(store) if store.lookup.place(key)[0] == 0)
    damage(store.files[0])
    with pytest.raises(UserError, match=r"^data\.cache_dir: can't read .*\.safetensors \(.+\); start") as caught:
        store[key]
    assert "\n" not in str(caught.value)
