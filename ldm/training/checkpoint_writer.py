"""`CheckpointWriter`: writes a training's tensors while it goes on.

The training waits only for a copy of the tensors in host memory, which a thread then writes. The memory is kept for the
next copy.
"""

from __future__ import annotations

import atexit
import sys
from collections.abc import Callable
from concurrent.futures import Future
from threading import Thread

import torch
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from ldm.distributed.launch import on_main
from ldm.distributed.sharding import full_tensor
from ldm.utils.atomic_files import Tensors
from ldm.utils.errors import UserError
from ldm.utils.host_memory import available_memory

Parts = dict[str, Tensors]

FREE_SHARE = 0.5  # of the free host memory, which copies may take; the rest is the training's


class CheckpointWriter:
    """Writes on the main process, one write at a time.

    Where copies would take more than half of the free host memory, tensors are written from where they are instead, one
    after the other, and the training waits; a line says so, once. Sharded tensors are gathered, so always copied.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}  # by part and name
        self._written: Future[None] | None = None  # of the write that nothing has waited for yet
        self._reported = False

    @property
    def writing(self) -> bool:
        """Whether a write goes on."""
        return bool(self._written and not self._written.done())

    @property
    def failed(self) -> bool:
        """Whether the last write has failed, which `wait` would raise."""
        return bool(self._written and self._written.done() and self._written.exception())

    def start(self, parts: Parts, write: Callable[[Parts], None]) -> None:
        """Waits for the last write, copies tensors, and calls `write` with the copies in a thread.

        All processes call it; `write` gets full tensors where they are sharded.
        """
        self.wait()
        sharded = any(isinstance(tensor, DTensor) for tensors in parts.values() for tensor in tensors.values())
        is_main = PartialState().is_main_process
        if sharded or (is_main and self._has_room(parts)):
            copies = self._copy(parts, is_main)
            if is_main:
                self._written = Future()
                atexit.register(self.close)  # an error of the training must not end a write
                # A daemon, so that a process that is to end at once doesn't wait for it.
                Thread(target=_run, args=(self._written, write, copies), name="checkpoint", daemon=True).start()
        elif is_main:
            written: Future[None] = Future()
            _run(written, write, parts)
            self._written = written

    def wait(self) -> None:
        """Waits for the last write; UserError, on all processes, where it has failed. All processes call it."""
        on_main(self._wait)

    def _wait(self) -> None:
        try:
            if self._written:
                self._written.result()
        finally:
            self._written = None
            atexit.unregister(self.close)

    def close(self, abandon: bool = False) -> None:
        """Waits for the last write, unless it is abandoned; prints its error. Frees the copies' memory.

        A process calls it by itself.
        """
        if abandon:
            self._written = None
        try:
            self._wait()
        except UserError as error:
            print(error, file=sys.stderr, flush=True)
        self._buffers = {}

    def _has_room(self, parts: Parts) -> bool:
        """Whether there is host memory for the copies that have none yet; prints a line where there is not."""
        lacking = sum(
            tensor.nbytes
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
            if not self._fits((part, name), tensor)
        )
        if lacking <= FREE_SHARE * (available := available_memory()):
            return True
        if not self._reported:
            print(
                f"A copy of the checkpoint takes {lacking / 1e9:.1f} GB, more than half of the free main memory "
                f"({available / 1e9:.1f} GB); training waits while checkpoints are written.",
                file=sys.stderr,
                flush=True,
            )
        self._reported = True
        return False

    def _fits(self, key: tuple[str, str], tensor: torch.Tensor) -> bool:
        buffer = self._buffers.get(key)
        return buffer is not None and (buffer.shape, buffer.dtype) == (tensor.shape, tensor.dtype)

    @torch.no_grad()
    def _copy(self, parts: Parts, is_main: bool) -> Parts:
        """Full tensors in host memory, on the main process; those of a GPU are copied together."""
        copies: Parts = {}
        for part, tensors in parts.items():
            copies[part] = {}
            for name, tensor in tensors.items():
                full, key = full_tensor(tensor), (part, name)
                if not is_main:
                    continue
                if not self._fits(key, full):
                    self._buffers[key] = torch.empty(full.shape, dtype=full.dtype, pin_memory=full.is_cuda)
                copies[part][name] = self._buffers[key].copy_(full, non_blocking=full.is_cuda)
        if torch.cuda.is_initialized():
            torch.cuda.current_stream().synchronize()
        return copies


def _run(written: Future[None], write: Callable[[Parts], None], parts: Parts) -> None:
    try:
        write(parts)
    except Exception as error:  # which `wait` raises
        written.set_exception(error)
    else:
        written.set_result(None)
