"""A folder in which one process at a time trains: a lock on a file in it, which ends with the process, also by kill -9.

The lock is POSIX's (`lockf`): forked processes, such as a data loader's, don't inherit it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ldm.utils.errors import UserError

FILE = ".lock"
PATIENCE = 1.0  # seconds, as `is_locked` of another process takes the lock for a moment
_held: dict[Path, int] = {}  # file descriptors; closing any of a file would release its lock


def lock(key: str, folder: Path) -> None:
    """Locks a folder for this process, which may have it already; `release_locks` and the process's end release it.

    UserError, naming the `key`, where another process has it. Where the file can't be made, or the file system has no
    locks, nothing is locked.
    """
    file = folder.resolve() / FILE
    if file in _held:
        return
    with suppress(OSError):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        _held[file] = descriptor
        end = time.monotonic() + PATIENCE
        while not _acquired(descriptor):
            if time.monotonic() > end:
                os.close(_held.pop(file))
                busy = f"another process trains in {folder}"
                raise UserError(f"{key}: {busy}; wait until it ends, or give another folder")
            time.sleep(PATIENCE / 10)


@contextmanager
def release_locks() -> Iterator[None]:
    """Releases, at the end of its block, the locks that were taken in it."""
    before = set(_held)
    try:
        yield
    finally:
        for file in _held.keys() - before:
            os.close(_held.pop(file))


def is_locked(folder: Path) -> bool:
    """Whether another process has the folder's lock."""
    file = folder.resolve() / FILE
    if file in _held:
        return False
    try:
        descriptor = os.open(file, os.O_RDWR)
    except OSError:
        return False
    try:
        return not _acquired(descriptor)
    except OSError:
        return False
    finally:
        os.close(descriptor)  # which releases it


def _acquired(descriptor: int) -> bool:
    """Whether the lock could be taken; OSError where the file system has none."""
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True
