"""Tensors written in shards: each process writes its own, and their folder stands once all have, or not at all."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

import torch.distributed as dist
from accelerate import PartialState
from torch.distributed.tensor import DTensor

from ldm.distributed.consensus import gather_objects, on_all
from ldm.distributed.sharding import to_local
from ldm.utils.atomic_files import Tensors, atomic_folder, sync, tmp_folder, writing_errors
from ldm.utils.errors import UserError, first_line
from ldm.utils.safetensors_file import write_shard

Finish = Callable[[Path, dict[str, str]], None]  # called with the folder and the SHA-256 of its files by name


class Shards(NamedTuple):
    """What this process writes of sharded tensors: its shards by name, and where each begins in the full tensor."""

    tensors: Tensors
    offsets: dict[str, tuple[int, ...]]
    group: dist.ProcessGroup
    """The processes that have the other shards."""


def local_shards(tensors: Tensors, group: dist.ProcessGroup) -> Shards:
    """This process's shards, in the same memory. Tensors that are not sharded are the main process's."""
    shards = Shards({}, {}, group)
    for name, tensor in tensors.items():
        if isinstance(tensor, DTensor):
            (block,) = tensor.__create_chunk_list__()
            offsets, written = tuple(block.offsets), block.sizes.numel() and not _is_replica(tensor)
        else:
            offsets, written = (0,) * tensor.ndim, PartialState().is_main_process
        if written:
            shards.tensors[name], shards.offsets[name] = to_local(tensor), offsets
    return shards


def _is_replica(tensor: DTensor) -> bool:
    """Whether another process before this one has the same shard."""
    coordinate = list[int](tensor.device_mesh.get_coordinate() or ())
    return any(at for at, placement in zip(coordinate, tensor.placements, strict=True) if placement.is_replicate())


@contextmanager
def _any_error(folder: Path) -> Iterator[None]:
    """Turns an error of the file system into a UserError, for which the other processes don't wait in vain."""
    try:
        with writing_errors(folder):
            yield
    except OSError as error:
        raise UserError(f"can't write {folder}: {first_line(error)}; the previous version is kept") from None


def write_shards(
    folder: Path, parts: dict[str, Shards], metadata: dict[str, str] | None = None, finish: Finish | None = None
) -> None:
    """Writes each process's shards to the folders `PART` of a folder, which the main process then renames.

    Before, it calls `finish`. All processes of the shards' group call this; UserError on all of them where one can't
    write, and an older folder is kept.
    """
    group = next(iter(parts.values())).group
    rank, count = dist.get_rank(group), dist.get_world_size(group)
    sums: dict[str, str] = {}
    with ExitStack() as stack:

        def begin() -> Path:
            return tmp_folder(folder) if rank else stack.enter_context(atomic_folder(folder))

        def write() -> None:
            if not tmp_path.is_dir():
                raise UserError(
                    f"run.dir: process {rank}, on {socket.gethostname()}, doesn't see {tmp_path}; give a folder on a "
                    "file system that all machines share"
                )
            with _any_error(folder):
                for part, shards in parts.items():
                    (tmp_path / part).mkdir(exist_ok=True)
                    name, digest = write_shard(tmp_path / part, rank, count, shards.tensors, shards.offsets, metadata)
                    sync(tmp_path / part / name)
                    sums[(Path(part) / name).as_posix()] = digest

        def end() -> None:
            with _any_error(folder):
                if finish and not rank:
                    finish(tmp_path, all_sums)
                stack.close()

        tmp_path = on_all(begin, group)
        on_all(write, group)
        all_sums = dict(sorted(item for own in gather_objects(sums, group) for item in own.items()))
        on_all(end, group)
