"""What a process computes in each accumulation step: the data loader of a training run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator

from ldm.config.schema import Training
from ldm.data.sampler import Positions
from ldm.data.stream import Stream
from ldm.distributed.launch import leave_signals_to_parent


def load_batches(
    dataset: torch.utils.data.Dataset[Any] | Stream,
    training: Training,
    step: int,
    accumulation_steps: int,
    accelerator: Accelerator,
    workers: int,
    stream_positions: dict[str, Any],
) -> Iterable[Any]:
    """This process's batches from optimizer step `step` on, so many a step; a stream continues at its positions."""
    rank, processes = accelerator.process_index, accelerator.num_processes
    pin_memory = accelerator.device.type == "cuda"  # or copies to the GPU would wait for what it computes
    if isinstance(dataset, Stream):
        return dataset.batches(training, step, rank, processes, workers, stream_positions, pin_memory)
    return torch.utils.data.DataLoader(
        dataset,
        batch_sampler=Positions(step, training.steps, training.batch, accumulation_steps, rank, processes),
        num_workers=workers,
        pin_memory=pin_memory,
        worker_init_fn=leave_signals_to_parent,
    )
