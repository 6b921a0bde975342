"""Columns that follow from an index: computed once, kept in a folder, memory-mapped by all processes of a machine."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ldm.utils.atomic_files import atomic_file, file_system_time
from ldm.utils.errors import UserError, first_line

UNUSED = 3600  # seconds after which no other run is about to open a folder


class ColumnStore:
    """Arrays and small values by name and by the settings that they depend on; without a folder, only in memory.

    Files are written atomically. A process that finds none computes it; `build` has the main process do so first.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._known: dict[str, Any] = {}

    def __getstate__(self) -> dict[str, Any]:  # a process that isn't forked maps the files itself
        return {**self.__dict__, "_known": {} if self.folder else self._known}

    def array(self, name: str, settings: object, compute: Callable[[], np.ndarray]) -> np.ndarray:
        """The array, read-only; it has at least one element."""
        return self._get(name, settings, ".npy", compute, _save, _map)

    def filled(
        self,
        name: str,
        settings: object,
        dtype: Any,
        shape: tuple[int, ...],
        fill: Callable[[np.ndarray], None],
    ) -> np.ndarray:
        """The array, which `fill` writes to its file; it need not fit into memory."""

        def write(path: Path, _: object) -> None:
            column = np.lib.format.open_memmap(path, "w+", np.dtype(dtype), shape)
            fill(column)
            column.flush()

        def compute() -> np.ndarray | None:
            if self.folder:
                return None
            column = np.empty(shape, dtype)
            fill(column)
            return column

        return self._get(name, settings, ".npy", compute, write, _map)

    def value(self, name: str, settings: object, compute: Callable[[], Any]) -> Any:
        """The value, which JSON can hold."""
        return self._get(name, settings, ".json", compute, _dump, lambda path: json.loads(path.read_text("utf-8")))

    def files(self) -> list[Path]:
        """The files of what this process has asked for."""
        return [self.folder / name for name in self._known] if self.folder else []

    def remove_older(self, stem: str) -> None:
        """Removes the folders next to this one that begin with `stem`: of what the files were before.

        Nothing where the folder can't be written.
        """
        assert self.folder
        others = [other for other in self.folder.parent.glob(f"{stem}-*") if other != self.folder and other.is_dir()]
        with suppress(OSError):
            now = file_system_time(self.folder.parent) if others else 0.0
            for other in others:
                if now - other.stat().st_mtime > UNUSED:
                    shutil.rmtree(other, ignore_errors=True)

    def _get(
        self,
        name: str,
        settings: object,
        suffix: str,
        compute: Callable[[], Any],
        write: Callable[[Path, Any], None],
        read: Callable[[Path], Any],
    ) -> Any:
        name = f"{name}-{hashlib.sha256(repr(settings).encode()).hexdigest()[:12]}{suffix}"
        if name not in self._known:
            if not self.folder:
                self._known[name] = compute()
                return self._known[name]
            path = self.folder / name
            if not path.exists():
                self.folder.mkdir(parents=True, exist_ok=True)
                with atomic_file(path) as tmp_path:
                    write(tmp_path, compute())
            try:
                self._known[name] = read(path)
            except (OSError, ValueError, EOFError) as error:  # all that numpy and json raise of a truncated file
                reason = f"data.cache_dir: can't read {path} ({first_line(error)})"
                raise UserError(f"{reason}; remove it, and the same command makes it anew") from None
        return self._known[name]


def _save(path: Path, array: np.ndarray) -> None:
    with path.open("wb") as file:
        np.save(file, array)


def _map(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r").view(np.ndarray)  # single elements of numpy's subclass take ten times as long


def _dump(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), "utf-8")
