"""`CheckpointWriter`: writes a training's tensors while it goes on.

The training waits only for a copy of the tensors in host memory, which a thread then writes. The memory is kept for the
next copy. Sharded tensors are gathered by the main process, or copied and written in shards by all processes.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from threading import Thread

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from ldm.distributed.consensus import on_all
from ldm.distributed.launch import TIMEOUT, on_main
from ldm.distributed.shard_files import Shards, local_shards
from ldm.distributed.sharding import full_tensor, state_dict_type
from ldm.utils.atomic_files import Tensors
from ldm.utils.errors import UserError
from ldm.utils.host_memory import available_memory

Parts = dict[str, Tensors]
Copies = Mapping[str, Tensors | Shards]
Write = Callable[[Copies], None]

WAITS = "training waits while checkpoints are written"
IN_SHARDS = "checkpoints are written in shards, which `ldm-export CHECKPOINT --to checkpoint --out FOLDER` merges"
FREE_SHARE = 0.5  # of the free host memory, which copies may take; the rest is the training's


class CheckpointWriter:
    """One write at a time: the main process writes full tensors, or all processes write their shards.

    accelerate's `fsdp_state_dict_type` says which, of sharded tensors. Where it is not set, they are written in shards
    if full copies would take more than half of the free host memory; a line says so, once.

    Where copies of other tensors, or of shards, would take so much, tensors are written from where they are instead,
    one after the other, and the training waits; a line says so too.
    """

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, str], torch.Tensor] = {}  # by part and name
        self._written: Future[None] | None = None  # of the write that nothing has waited for yet
        self._reported: set[str] = set()
        self._group: dist.ProcessGroup | None = None  # for the threads, in which processes agree on shards

    @property
    def writing(self) -> bool:
        """Whether a write goes on."""
        return bool(self._written and not self._written.done())

    @property
    def failed(self) -> bool:
        """Whether the last write has failed, which `wait` would raise."""
        return bool(self._written and self._written.done() and self._written.exception())

    def start(self, parts: Parts, write: Write) -> None:
        """Waits for the last write, copies tensors, and calls `write` with the copies in a thread.

        All processes call it. Full tensors are written by the main process; in shards, by all.
        """
        self.wait()
        sharded = any(isinstance(tensor, DTensor) for tensors in parts.values() for tensor in tensors.values())
        in_shards = sharded and on_main(lambda: self._in_shards(parts))
        write_copies: Callable[[Parts], None] = write
        if in_shards:
            parts, write_copies = self._own_shards(parts, write)
        writes, gathers = in_shards or PartialState().is_main_process, sharded and not in_shards
        copying = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if in_shards else 1  # processes of this machine
        if gathers or (writes and self._has_room(parts, WAITS, copying)):
            copies = self._copy(parts, writes)
            if writes:
                self._written = Future()
                atexit.register(self.close)  # an error of the training must not end a write
                # A daemon, so that a process that is to end at once doesn't wait for it.
                Thread(target=_run, args=(self._written, write_copies, copies), name="checkpoint", daemon=True).start()
        elif writes:
            written: Future[None] = Future()
            _run(written, write_copies, parts)
            self._written = written

    def _in_shards(self, parts: Parts) -> bool:
        """Whether sharded tensors are to be written in shards."""
        kind = state_dict_type()
        return kind == "sharded" or (not kind and not self._has_room(parts, IN_SHARDS))

    def _own_shards(self, parts: Parts, write: Write) -> tuple[Parts, Callable[[Parts], None]]:
        """This process's shards of tensors, and a function that calls `write` with copies of these as `Shards`."""
        group = self._group or dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup)  # of all processes
        self._group = group
        shards = {part: local_shards(tensors, group) for part, tensors in parts.items()}

        def write_shards(copies: Parts) -> None:
            write({part: shards[part]._replace(tensors=tensors) for part, tensors in copies.items()})

        return {part: own.tensors for part, own in shards.items()}, write_shards

    def wait(self) -> None:
        """Waits for the last write; UserError, on all processes, where it has failed. All processes call it."""
        on_all(self._wait)

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

    def _has_room(self, parts: Parts, otherwise: str, processes: int = 1) -> bool:
        """Whether there is host memory for the copies, in each of `processes`, that have none yet; else a line."""
        lacking = processes * sum(
            tensor.nbytes
            for part, tensors in parts.items()
            for name, tensor in tensors.items()
            if not self._fits((part, name), tensor)
        )
        if lacking <= FREE_SHARE * (available := available_memory()):
            return True
        if otherwise not in self._reported and PartialState().is_main_process:
            print(
                f"A copy of the checkpoint takes {lacking / 1e9:.1f} GB, more than half of the free main memory "
                f"({available / 1e9:.1f} GB); {otherwise}.",
                file=sys.stderr,
                flush=True,
            )
        self._reported.add(otherwise)
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
