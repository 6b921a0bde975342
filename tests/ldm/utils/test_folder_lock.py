"""One process at a time trains in a folder."""

from __future__ import annotations

import errno
import fcntl
from pathlib import Path

import pytest
from lock_holder import holder

from ldm.utils import folder_lock
from ldm.utils.errors import UserError
from ldm.utils.folder_lock import is_locked, lock, release_locks


def test_a_second_process_is_refused_until_the_first_one_is_killed(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "PATIENCE", 0.1)
    with holder(root, tmp_path) as process, release_locks():
        assert is_locked(tmp_path)
        with pytest.raises(UserError, match=f"^run.dir: another process trains in {tmp_path}; wait until it ends, or"):
            lock("run.dir", tmp_path)
        process.kill()
        process.wait()
        assert not is_locked(tmp_path)  # although the child lives on
        lock("run.dir", tmp_path)
        lock("run.dir", tmp_path)
        assert not is_locked(tmp_path), "this process has it"


def test_locks_of_a_block_are_released_at_its_end(root: Path, tmp_path: Path) -> None:
    with release_locks():
        lock("run.dir", tmp_path)
    with holder(root, tmp_path):
        assert is_locked(tmp_path)


def test_a_file_system_without_locks_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    with release_locks():
        lock("run.dir", tmp_path)
        lock("run.dir", tmp_path / "missing")
    assert not is_locked(tmp_path) and not is_locked(tmp_path / "missing")
