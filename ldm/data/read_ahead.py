"""The batches of a data set, read ahead by threads, so that a slow read holds up no other: a network's tail latency.

The threads of a loader process take turns to compute, so that it needs one core, and only wait for storage together.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, default_collate, get_worker_info

from ldm.distributed.launch import DataLoader

Item = dict[str, Any]

THREADS = 16  # of a loader process: items that it reads at once
FINISHED = 2  # batches of a loader process that wait in shared memory, at most
_turn: threading.Lock | None = None  # which the thread holds that computes; none in other processes


@contextmanager
def waiting_for_storage() -> Iterator[None]:
    """Around a read: another thread of a loader process computes meanwhile."""
    if not (turn := _turn):
        yield
        return
    turn.release()
    try:
        yield
    finally:
        turn.acquire()


def data_loader(
    dataset: Dataset[Item], batches: Sampler[list[int]], workers: int, prefetch_factor: int, pin_memory: bool = False
) -> torch.utils.data.DataLoader[Item]:
    """The batches in the sampler's order, by `workers` processes, each of which reads `prefetch_factor` ahead.

    Without workers, a batch is read when it is asked for.
    """
    if not workers:
        return torch.utils.data.DataLoader(dataset, batch_sampler=batches, pin_memory=pin_memory)
    finished = min(FINISHED, prefetch_factor)
    return DataLoader(
        _ReadAhead(dataset, batches, prefetch_factor - finished),
        batch_size=None,
        num_workers=workers,
        prefetch_factor=finished,
        pin_memory=pin_memory,
    )


def start_reading(dataset: Dataset[Item], positions: Sequence[int]) -> None:
    """Has the system read at once what a batch's items are looked up in, where the data set knows."""
    if read_ahead := getattr(dataset, "read_ahead", None):
        read_ahead(positions)


class _ReadAhead(IterableDataset[Item]):
    """A loader process's share of the batches, every n-th of n processes; the items of `ahead` more are being read."""

    def __init__(self, dataset: Dataset[Item], batches: Sampler[list[int]], ahead: int):
        self.dataset, self.batches, self.ahead = dataset, batches, ahead

    def __iter__(self) -> Iterator[Item]:
        global _turn  # of this process, which does nothing else
        worker, _turn = get_worker_info(), threading.Lock()
        assert worker, "without workers, batches are not read ahead"
        pending: deque[list[Future[Item]]] = deque()
        threads = ThreadPoolExecutor(THREADS)
        try:
            for numbers in itertools.islice(self.batches, worker.id, None, worker.num_workers):
                with _turn:
                    start_reading(self.dataset, numbers)
                pending.append([threads.submit(self._item, n) for n in numbers])
                if len(pending) > self.ahead:
                    yield _collated(pending.popleft())
            while pending:
                yield _collated(pending.popleft())
        finally:
            threads.shutdown(wait=False, cancel_futures=True)

    def _item(self, n: int) -> Item:
        assert _turn
        with _turn:
            return self.dataset[n]


def _collated(items: list[Future[Item]]) -> Item:
    return default_collate([item.result() for item in items])  # type: ignore[no-any-return]
