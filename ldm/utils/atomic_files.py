"""Files and folders that stand whole or not at all, and checkpoints made of them: safetensors and JSON, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

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


def write_checkpoint(folder: Path, parts: dict[str, Tensors], state: dict[str, Any]) -> None:
    """`parts` as `NAME.safetensors`, and `state.json`, which also holds their SHA-256."""
    with whole_folder(folder) as tmp_path:
        for name, tensors in parts.items():
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors"
            )
        sums = {path.name: _sha256(path) for path in sorted(tmp_path.iterdir())}
        (tmp_path / "state.json").write_text(json.dumps({**state, "sha256": sums}, indent=1))


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Parts and state of a checkpoint; ValueError or OSError where a file is missing or not what was written."""
    state = json.loads((folder / "state.json").read_text())
    for name, expected in state["sha256"].items():
        if _sha256(folder / name) != expected:
            raise ValueError(f"{name} is not what was written")
    return {Path(name).stem: load_file(folder / name) for name in state["sha256"]}, state


def checkpoints(folder: Path) -> list[Path]:
    """Those of a stage's folder, oldest first."""
    numbered = {path.name.removeprefix("step-"): path for path in (folder / "checkpoints").glob("step-*")}
    return [numbered[name] for name in sorted(filter(str.isdigit, numbered), key=int)]


def flatten_optimizer(state: dict[str, Any]) -> tuple[Tensors, list[dict[str, Any]]]:
    """An optimiser's `state_dict()` as named tensors (`3.exp_avg`) and plain groups; whole numbers become int64."""
    tensors: Tensors = {}

    def put(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, each in value.items():
                put(f"{name}.{key}", each)
        else:
            tensors[name] = value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.int64)

    for i, entry in state["state"].items():
        put(str(i), entry)
    return tensors, state["param_groups"]


def unflatten_optimizer(tensors: Tensors, groups: list[dict[str, Any]]) -> dict[str, Any]:
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, *path, key = name.split(".")
        entry = state.setdefault(int(index), {})
        for part in path:
            entry = entry.setdefault(part, {})
        entry[key] = int(value) if value.dtype == torch.int64 and not value.ndim else value
    return {"state": state, "param_groups": groups}


def tensors_sha256(tensors: Tensors, *more: object) -> str:
    """SHA-256 over names and bytes of tensors, and over `more` as text."""
    digest = hashlib.sha256(repr(more).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Waits until the file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
