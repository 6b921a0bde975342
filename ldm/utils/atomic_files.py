"""Files and folders that stand whole or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from ldm.utils.errors import UserError, cant_write

Tensors = dict[str, torch.Tensor]


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path to write to; what was written becomes `path` at the end, and nothing does after an error.

    UserError where there is no room, or may not be written.
    """
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        with _writing(path):
            yield beside
            sync(beside)
            beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """The same for a folder, which exists when it is given; an older one goes only when the new one is written."""
    beside, old = folder.with_name(f".{folder.name}.writing"), folder.with_name(f".{folder.name}.old")
    try:
        with _writing(folder):
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            for path in (*beside.rglob("*"), beside):
                sync(path)
            shutil.rmtree(old, ignore_errors=True)
            if folder.exists():
                folder.replace(old)
            beside.replace(folder)
            sync(folder.parent)
            shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Says in a line where and why writing failed."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not (reason := cant_write(error)):
            raise
        raise UserError(f"can't write {path}: {reason}; what stood before is kept") from None


def tensors_sha256(tensors: Tensors, *more: object) -> str:
    """SHA-256 over names and bytes of tensors, and over `more` as text."""
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
