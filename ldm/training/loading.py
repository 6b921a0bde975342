"""What a process computes in each accumulation step: the data loader of a training run."""

from __future__ import annotations

import socket
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from accelerate import Accelerator, PartialState
from tqdm import tqdm

from ldm.config.schema import Training
from ldm.data import read_ahead
from ldm.data.sampler import Positions
from ldm.data.stream import Stream

Batch = TypeVar("Batch")

SLOW = 60.0  # seconds after which a line says that a batch is late


def load_batches(
    dataset: torch.utils.data.Dataset[Any] | Stream,
    training: Training,
    step: int,
    accumulation_steps: int,
    accelerator: Accelerator,
    workers: int,
    prefetch_factor: int,
    stream_positions: dict[str, Any],
) -> Iterable[Any]:
    """This process's batches from optimizer step `step` on, so many a step; a stream continues at its positions."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    pin_memory = accelerator.device.type == "cuda"  # or copies to the GPU would wait for what it computes
    if isinstance(dataset, Stream):
        return dataset.batches(training, step, rank, processes, workers, stream_positions, pin_memory)
    positions = Positions(step, training.steps, training.batch, accumulation_steps, rank, processes)
    return read_ahead.data_loader(dataset, positions, workers, prefetch_factor, pin_memory)


def report_slow(batches: Iterable[Batch], name: str, seconds: float = SLOW) -> Iterator[Batch]:
    """The batches; of one that takes more than so many seconds, a line says so at once, and another that it came.

    A network folder that hangs raises no error: reading waits until it responds.
    """
    process = f"{name}: process {PartialState().process_index}, on {socket.gethostname()},"
    began: float | None = None  # when the wait that goes on began
    ended = threading.Event()

    def watch() -> None:
        reported = None
        while not ended.wait(seconds / 4):
            start = began
            if start is not None and start != reported and time.monotonic() - start > seconds:
                reported = start
                slow = f"{process} has waited {seconds:.0f} s for data; training goes on when it comes."
                tqdm.write(f"{slow} See that the storage of images and cache responds.", file=sys.stderr)

    threading.Thread(target=watch, name="slow data", daemon=True).start()
    items = iter(batches)
    try:
        while True:
            began = start = time.monotonic()
            try:
                item = next(items)
            except StopIteration:
                return
            finally:
                began = None
            waited = time.monotonic() - start
            if waited > seconds:
                tqdm.write(f"{process} has data again, after {waited:.0f} s.", file=sys.stderr)
            yield item
    finally:
        ended.set()
