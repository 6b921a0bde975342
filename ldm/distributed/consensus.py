"""Agreement of a run's processes, so that none continues alone, or waits for one that has failed."""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import gather_object

from ldm.utils.errors import DISK_FULL, UserError, cant_write

Result = TypeVar("Result")

# Seconds between checks for a file, 77 in all: a machine may cache the listing of a network folder for 60.
WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 21.0, 25.0)
SILENT_WAITS = 3  # before a line says what is waited for


def gather_objects(value: Result, group: dist.ProcessGroup | None = None) -> list[Result]:
    """The value of each process, by rank, on all processes.

    In a thread, processes need a `group` of their own: the default one is the training's.
    """
    if group is None:
        return list(gather_object([value]))
    values: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group)
    return values


def on_all(action: Callable[[], Result], group: dist.ProcessGroup | None = None) -> Result:
    """Runs `action` on every process and returns its result; a UserError or full disk of one is raised on all."""
    results, message = [], ""
    try:
        results = [action()]
    except UserError as error:
        message = str(error)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        message = f"can't write {error.filename or 'a file'}: {cant_write(error)}"
    if messages := list(filter(None, gather_objects(message, group))):
        raise UserError(messages[0])
    return results[0]


def wait_until_visible(
    files: Sequence[Path], is_visible: Callable[[Path], bool], key: str = "data.cache_dir"
) -> list[Path]:
    """Waits until every process sees the files, and returns those that exist.

    A file that no process sees was removed. A wait of more than a second prints a line. UserError, on all processes,
    naming the folder's `key`, where one still does not see a file after `WAITS` that another sees.
    """
    pending = list(files)
    for number, wait in enumerate((*WAITS, None)):
        unseen = [file for file in pending if not is_visible(file)]
        reports = gather_objects((socket.gethostname(), unseen))
        removed = set(reports[0][1]).intersection(*(unseen_there for _, unseen_there in reports))
        lacking = [
            (file, rank, host)
            for rank, (host, unseen_there) in enumerate(reports)
            for file in set(unseen_there) - removed
        ]
        if not lacking:
            return [file for file in files if file not in removed]
        hidden_somewhere = set[Path]().union(*(unseen_there for _, unseen_there in reports))
        pending = [file for file in pending if file in hidden_somewhere]  # also by who saw it: it may be removed since
        file, rank, host = min(lacking)
        hidden = f"process {rank}, on {host}, can't see {file}, which another process sees"
        if number == SILENT_WAITS and PartialState().is_main_process:
            print(f"{key}: {hidden}; waiting for it, {sum(WAITS):.0f} s at most", file=sys.stderr, flush=True)
        if wait:
            time.sleep(wait)
            for folder in {file.parent for file in pending}:
                with suppress(OSError):
                    os.scandir(folder).close()  # opening a folder has NFS ask its server again
    raise UserError(f"{key}: {hidden}; give a folder on a file system that all machines share")
