"""Checkpoints are written while a training goes on: same bytes, in order, errors raised, whole after a kill."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Event

import pytest
import torch
from accelerate import PartialState
from forked import ScriptProcess

from ldm.training import checkpoint_writer
from ldm.training.checkpoint import CheckpointManager, checkpoints, read_checkpoint, write_checkpoint
from ldm.training.checkpoint_writer import CheckpointWriter, Parts
from ldm.utils.errors import UserError


@pytest.fixture
def writer() -> Iterator[CheckpointWriter]:
    PartialState(cpu=True)
    made = CheckpointWriter()
    yield made
    made.close()


def parts_of(value: float) -> Parts:
    weight = torch.full((4, 3, 2, 2), float(value)).to(memory_format=torch.channels_last)
    return {
        "model": {"weight": torch.nn.Parameter(weight), "half": torch.full((3,), value, dtype=torch.bfloat16)},
        "optimizer": {"0.step": torch.tensor(float(value)), "0.state1": torch.arange(9, dtype=torch.uint8)},
    }


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_the_bytes_are_those_of_a_write_at_once_in_new_and_in_reused_memory(
    tmp_path: Path, writer: CheckpointWriter
) -> None:
    for step in (1, 2):
        write_checkpoint(tmp_path / f"at-once-{step}", parts_of(step), {"step": step})
        writer.start(
            parts_of(step), lambda copies, n=step: write_checkpoint(tmp_path / f"copy-{n}", copies, {"step": n})
        )
        writer.wait()
        assert files(tmp_path / f"copy-{step}") == files(tmp_path / f"at-once-{step}")


def test_later_changes_of_the_tensors_are_not_written(tmp_path: Path, writer: CheckpointWriter) -> None:
    go, parts = Event(), parts_of(1)

    def write(copies: Parts) -> None:
        assert go.wait(60)
        write_checkpoint(tmp_path / "c", copies, {})

    writer.start(parts, write)
    for tensors in parts.values():
        for tensor in tensors.values():
            tensor.detach().zero_()
    go.set()
    writer.wait()
    loaded, _ = read_checkpoint(tmp_path / "c")
    for part, tensors in parts_of(1).items():
        assert all(torch.equal(loaded[part][name], tensor) for name, tensor in tensors.items())


def test_an_error_is_raised_once_and_the_checkpoint_before_stands(tmp_path: Path, writer: CheckpointWriter) -> None:
    manager = CheckpointManager(tmp_path, 1)
    writer.start(parts_of(1), lambda copies: manager.write(1, copies, {"step": 1}))
    writer.wait()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        writer.start(parts_of(2), lambda copies: manager.write(2, copies, {"step": 2}))
        end = time.monotonic() + 60
        while not writer.failed:
            assert time.monotonic() < end
            time.sleep(0.001)
        with pytest.raises(UserError, match=r"can't write .*step-000002: File too large; make room"):
            writer.wait()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not writer.failed
    writer.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000001"]
    assert read_checkpoint(checkpoints(tmp_path)[0])[1]["step"] == 1


def test_without_memory_for_a_copy_tensors_are_written_from_where_they_are(
    tmp_path: Path, writer: CheckpointWriter, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The rule is half of the free memory."""
    parts = parts_of(1)
    size = sum(tensor.nbytes for tensors in parts.values() for tensor in tensors.values())
    for available, copied in ((2 * size - 1, False), (2 * size - 2, False), (2 * size, True)):
        monkeypatch.setattr(checkpoint_writer, "available_memory", lambda available=available: available)
        written: list[Parts] = []
        writer.start(parts, written.append)
        assert copied or written == [parts]  # before `start` returns
        writer.wait()
        assert (written[0]["model"]["weight"] is not parts["model"]["weight"]) == copied
    assert capsys.readouterr().err.count("training waits while checkpoints are written") == 1


def test_closing_waits_for_a_write_and_prints_its_error(writer: CheckpointWriter, capsys: pytest.CaptureFixture[str]):
    def write(_: Parts) -> None:
        time.sleep(0.1)
        raise UserError("can't write it")

    writer.start(parts_of(1), write)
    writer.close()
    assert capsys.readouterr().err == "can't write it\n"
    writer.close()


def test_a_process_that_ends_at_once_does_not_wait_for_a_write(writer: CheckpointWriter) -> None:
    go, finished = Event(), Event()

    def write(_: Parts) -> None:
        go.wait(60)
        finished.set()

    writer.start(parts_of(1), write)
    writer.close(abandon=True)
    assert not finished.is_set()
    go.set()
    assert finished.wait(60)


@pytest.mark.slow
def test_kill_9_at_20_random_moments_of_writing_leaves_the_newest_checkpoint_whole(
    launch: Callable[..., ScriptProcess], finish: Callable[[ScriptProcess], str], tmp_path: Path
) -> None:
    output = finish(launch("tests/ldm/training/killed_writes.py", tmp_path, 20))
    assert 0 < int(output.splitlines()[-1]) <= 20
