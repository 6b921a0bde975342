"""Files and folders that are written completely or not at all, and checksums."""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ldm.utils.errors import UserError, cant_write

Tensors = dict[str, torch.Tensor]
WRITING = ".writing"  # the end of a temporary folder's name


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """A temporary path to write to, which is moved to `path` at the end, unless there was an error.

    UserError where the disk is full, or the folder may not be written.
    """
    tmp_path = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with writing_errors(path):
            yield tmp_path
            sync(tmp_path)
            tmp_path.replace(path)
    finally:
        tmp_path.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which is created. An older one is deleted only when the new one is complete."""
    tmp_path, old = tmp_folder(folder), folder.with_name(f".{folder.name}.old")
    try:
        with writing_errors(folder):
            shutil.rmtree(tmp_path, ignore_errors=True)
            tmp_path.mkdir(parents=True)
            yield tmp_path
            for path in (*tmp_path.rglob("*"), tmp_path):
                sync(path)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.replace(old)
            tmp_path.replace(folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(tmp_path, ignore_errors=True)


def tmp_folder(folder: Path) -> Path:
    """Where `atomic_folder` writes."""
    return folder.with_name(f".{folder.name}{WRITING}")


def remove_unfinished(parent: Path) -> None:
    """Removes the temporary folders that killed processes have left in a folder."""
    for folder in parent.glob(f".*{WRITING}"):
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing_errors(path: Path) -> Iterator[None]:
    """Turns an error of writing a file or folder into a UserError of one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not (reason := cant_write(error)):
            raise
        raise UserError(f"can't write {path}: {reason}; the previous version is kept") from None


def tensors_sha256(tensors: Tensors, *more: object) -> str:
    """SHA-256 of the names and bytes of tensors, and of the representation of `more`."""
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_system_time(folder: Path) -> float:
    """Now, by the clock that gives a folder's files their times: a file server's may differ from this machine's."""
    with tempfile.TemporaryFile(dir=folder) as file:
        return os.fstat(file.fileno()).st_mtime


def sync(path: Path) -> None:
    """Waits until the file or folder is on the disk (fsync)."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
