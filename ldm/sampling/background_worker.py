"""Work that is done beside the steps of a GPU: on a thread and a stream of its own."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class BackgroundWorker(AbstractContextManager["BackgroundWorker"]):
    """`submit` returns at once on a GPU; on a CPU, whose cores are busy with the steps, when it is done.

    At the end of the block all of it is done.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._gpu = device.type == "cuda"

    def __enter__(self) -> BackgroundWorker:
        if self._gpu:
            self._thread = ThreadPoolExecutor(1)
            self._stream = torch.cuda.Stream(self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._gpu:
            self._thread.shutdown()

    def submit(self, work: Callable[..., Result], *arguments: Any) -> Future[Result]:
        """`work(*arguments)`, after all that the GPU has been asked for so far."""
        if self._gpu:
            submitted = torch.cuda.Event()
            submitted.record(torch.cuda.current_stream(self._device))
            return self._thread.submit(self._after, submitted, work, *arguments)
        done: Future[Result] = Future()
        done.set_result(work(*arguments))
        return done

    def _after(self, submitted: torch.cuda.Event, work: Callable[..., Result], *arguments: Any) -> Result:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(submitted)
            for argument in arguments:
                if isinstance(argument, torch.Tensor) and argument.is_cuda:
                    argument.record_stream(self._stream)  # its memory isn't used again before it has been read
            return work(*arguments)
