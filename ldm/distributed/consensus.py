"""What the processes of a run agree on, so that none goes on by itself or waits for one that has given up."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

from accelerate.utils import gather_object

from ldm.utils.errors import FULL, UserError, cant_write

Result = TypeVar("Result")

# Seconds between looks for a file, 77 in all: a machine may go on for 60 with the listing of a folder that it has.
WAITS = (0.1, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0, 21.0, 25.0)


def gathered(value: Result) -> list[Result]:
    """The value of each process, in their order, on all of them."""
    return list(gather_object([value]))


def on_all(action: Callable[[], Result]) -> Result:
    """What `action` gives on this process; UserError on all of them where one can't do it, or has no room to write."""
    results, mistake = [], ""
    try:
        results = [action()]
    except UserError as error:
        mistake = str(error)
    except OSError as error:
        if error.errno not in FULL:
            raise
        mistake = f"can't write {error.filename or 'a file'}: {cant_write(error)}"
    if mistakes := list(filter(None, gathered(mistake))):
        raise UserError(mistakes[0])
    return results[0]


def seen_by_all(files: Sequence[Path], sees: Callable[[Path], bool]) -> list[Path]:
    """Those of the files that are there, once every process sees them, as `sees` tells.

    What no process sees was removed. UserError, on all, where one goes on not seeing what another does.
    """
    unseen = list(files)
    for wait in (*WAITS, None):
        unseen = [file for file in unseen if not sees(file)]
        looks = gathered((socket.gethostname(), unseen))
        removed = set(looks[0][1]).intersection(*(missed for _, missed in looks))
        lacking = [(file, rank, host) for rank, (host, missed) in enumerate(looks) for file in set(missed) - removed]
        if not lacking:
            return [file for file in files if file not in removed]
        if wait:
            time.sleep(wait)
            for folder in {file.parent for file in unseen}:
                with suppress(OSError):
                    os.scandir(folder).close()  # NFS asks its server anew when a folder is opened
    file, rank, host = min(lacking)
    raise UserError(
        f"data.cache_dir: process {rank}, on {host}, can't see {file}, which another process sees; "
        "give a folder on a file system that all machines share"
    )
