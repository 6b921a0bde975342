"""Work that runs alongside the steps of a GPU, on its own thread and CUDA stream."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


class BackgroundWorker(AbstractContextManager["BackgroundWorker"]):
    """Runs submitted work.

    On a GPU `submit` returns at once; on a CPU, whose cores the steps use, it returns when the work is done. The end of
    the `with` block waits for all of it.
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
        """Runs `work(*arguments)` after everything that is queued on the GPU so far."""
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
                    argument.record_stream(self._stream)  # keeps its memory until this stream has read it
            return work(*arguments)
