"""Checkpoints in shards: written by all processes or not at all, read by any number of them, merged bit for bit."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from accelerate import PartialState
from forked import ScriptProcess, of_accelerate
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ldm.cli import export
from ldm.distributed import shard_files
from ldm.training import checkpoint_writer
from ldm.training.checkpoint import CheckpointManager, checkpoints, is_sharded, read_checkpoint, write_checkpoint
from ldm.training.checkpoint_writer import CheckpointWriter, Parts
from ldm.training.ema import read_snapshots, weighted_sum
from ldm.utils.errors import UserError
from ldm.utils.safetensors_file import open_tensors, write_safetensors, write_shard

pytestmark = pytest.mark.slow
SCRIPT = "tests/ldm/training/fsdp_optimizer.py"
Train = Callable[..., None]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def rows(n: int, processes: int) -> list[tuple[int, int]]:
    """Those of each process: FSDP's division."""
    size = -(-n // processes)
    return [(min(n, i * size), min(n, (i + 1) * size)) for i in range(processes)]


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "matrix": torch.randn(7, 3),
        "few rows": torch.randn(2, 2, 3).bfloat16(),
        "codes": torch.arange(10, dtype=torch.uint8),
        "step": torch.tensor(5, dtype=torch.int64),
    }


def write_in_shards(folder: Path, tensors: dict[str, torch.Tensor], processes: int) -> None:
    folder.mkdir()
    for i in range(processes):
        shards, offsets = {}, {}
        for name, tensor in tensors.items():
            start, stop = rows(len(tensor), processes)[i] if tensor.ndim else (0, 0)
            if start < stop or (not i and not tensor.ndim):
                shards[name] = tensor[start:stop] if tensor.ndim else tensor
                offsets[name] = [start, *[0] * (tensor.ndim - 1)] if tensor.ndim else []
        write_shard(folder, i, processes, shards, offsets, {"facts": "kept"})


@pytest.mark.parametrize("writers", [1, 2, 3, 9])
def test_shards_of_any_number_of_processes_are_read_by_any_other(
    tmp_path: Path, tensors: dict[str, torch.Tensor], writers: int
) -> None:
    write_in_shards(tmp_path / "shards", tensors, writers)
    saved = open_tensors(tmp_path / "shards")
    assert saved.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (saved[name].shape, saved[name].dtype) == (tensor.shape, tensor.dtype)
        assert torch.equal(saved[name].read(), tensor)
        for readers in (1, 2, 4, 10) if tensor.ndim else ():
            for start, stop in rows(len(tensor), readers):
                rest = tensor.shape[1:]
                assert torch.equal(
                    saved[name].read([start, *[0] * len(rest)], [stop - start, *rest]), tensor[start:stop]
                )
    write_safetensors(tmp_path / "merged.safetensors", saved)
    write_safetensors(tmp_path / "full.safetensors", tensors)
    assert (tmp_path / "merged.safetensors").read_bytes() == (tmp_path / "full.safetensors").read_bytes()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torchs_reader_of_distributed_checkpoints_reads_our_shards(
    tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    write_in_shards(tmp_path / "shards", tensors, 3)
    loaded = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    dcp.load(loaded, storage_reader=HuggingFaceStorageReader(str(tmp_path / "shards")), no_dist=True)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


def test_a_missing_shard_is_an_error(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    write_in_shards(tmp_path / "shards", tensors, 3)
    (tmp_path / "shards/shard-00003-of-00003.safetensors").unlink()
    with pytest.raises(ValueError, match="shards lacks files"):
        open_tensors(tmp_path / "shards")


@pytest.fixture
def train_in_shards(
    launch: Callable[..., ScriptProcess], finish: Callable[[ScriptProcess], str], root: Path
) -> Callable[..., None]:
    """Trains in so many processes under FSDP, with sharded checkpoints."""
    fsdp = of_accelerate(root / "configs/accelerate/fsdp.yaml") | {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}

    def train(processes: int, *arguments: object) -> None:
        finish(launch(SCRIPT, *arguments, processes=processes, more=fsdp))

    return train


def test_merged_shards_have_the_bytes_of_the_gathered_checkpoint(
    train_in_shards: Train, call: Callable[..., str], tmp_path: Path
) -> None:
    """Also those of snapshots, and of a checkpoint that a single process continues from."""
    run, gathered = tmp_path / "run", tmp_path / "gathered"
    train_in_shards(2, run, "adamw", 3, gathered)
    (folder,) = checkpoints(run / "stage2")
    names = {
        f"{part}/shard-0000{i}-of-00002.safetensors"
        for part in ("model", "ema", "ema-0.1", "optimizer")
        for i in (1, 2)
    }
    assert files(folder).keys() == {"state.json", *names}
    output = call(export.main, run, "--to", "checkpoint", "--out", tmp_path / "merged")
    assert output.startswith(f"wrote    {tmp_path / 'merged'}: ")
    assert files(tmp_path / "merged") == files(gathered)
    parts, _ = read_checkpoint(folder)
    snapshots = read_snapshots(run / "stage2/ema")
    assert [(snapshot.step, snapshot.width) for snapshot in snapshots] == [(3, 0.05), (3, 0.1)]
    for snapshot, part in zip(snapshots, ("ema", "ema-0.1"), strict=True):
        torch.testing.assert_close(weighted_sum([snapshot.path], [1.0]), parts[part], rtol=0, atol=0)
    train_in_shards(1, run, "adamw", 3, tmp_path / "resumed")
    assert files(tmp_path / "resumed") == files(gathered)


@pytest.mark.drill
@pytest.mark.parametrize("optimizer", ["adamw", "lion", "schedulefree"])
def test_a_sharded_run_resumed_by_another_number_of_processes_has_the_same_state(
    train_in_shards: Train, tmp_path: Path, optimizer: str
) -> None:
    train_in_shards(2, tmp_path / "run", optimizer, 3, tmp_path / "gathered")
    for processes in (1, 2, 3):
        shutil.copytree(tmp_path / "run", tmp_path / f"run-{processes}")
        train_in_shards(processes, tmp_path / f"run-{processes}", optimizer, 3, tmp_path / f"gathered-{processes}")
        assert files(tmp_path / f"gathered-{processes}") == files(tmp_path / "gathered")
    train_in_shards(2, tmp_path / "run", optimizer, 6, tmp_path / "resumed")
    train_in_shards(2, tmp_path / "uninterrupted", optimizer, 6, tmp_path / "expected")
    resumed, expected = files(tmp_path / "resumed"), files(tmp_path / "expected")
    for name in expected.keys() - {"state.json"}:
        assert resumed[name] == expected[name]


def test_a_write_that_fails_or_is_killed_in_one_process_leaves_the_previous_checkpoint(
    launch: Callable[..., ScriptProcess],
    wait_for: Callable[[Path, ScriptProcess], None],
    kill: Callable[[ScriptProcess], None],
    tmp_path: Path,
) -> None:
    """See `shard_writes.py`."""
    sharded = {"FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT"}
    process = launch("tests/ldm/training/shard_writes.py", tmp_path, processes=2, more=sharded)
    wait_for(tmp_path / "writing", process)
    kill(process)
    errors = {str((tmp_path / f"error-{rank}").readlink()) for rank in (0, 1)}
    assert len(errors) == 1 and "File too large; make room" in errors.pop()
    unfinished = tmp_path / "checkpoints/.step-000004.writing"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-000003", unfinished.name}
    assert (unfinished / "model").exists()
    PartialState(cpu=True)
    manager = CheckpointManager(tmp_path, 1)
    newest = manager.read_newest(lambda line: pytest.fail(line))
    assert newest and newest[0].name == "step-000003"
    assert (newest[1]["model"]["weight"].read() == 3).all() and newest[1]["model"]["scalar"].read() == 3
    manager.tidy_up()
    assert not unfinished.exists()


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1)
    PartialState(cpu=True)
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture
def parts(process_group: None) -> Parts:
    weight = distribute_tensor(torch.arange(12.0).reshape(4, 3), init_device_mesh("cpu", (1,)), [Shard(0)])
    return {"model": {"weight": weight}, "ema": {"weight": weight}}


def write(parts: Parts, folder: Path) -> None:
    writer = CheckpointWriter()
    writer.start(parts, lambda copies: write_checkpoint(folder, copies, {"step": 7}))
    writer.wait()


@pytest.mark.parametrize(
    ("state_dict_type", "available", "sharded"),
    [("SHARDED_STATE_DICT", 1e9, True), ("FULL_STATE_DICT", 0, False), ("", 2 * 96, False), ("", 2 * 96 - 1, True)],
)
def test_shards_are_written_as_set_or_where_full_copies_take_more_than_half_of_the_free_memory(
    parts: Parts,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    state_dict_type: str,
    available: int,
    sharded: bool,
) -> None:
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", state_dict_type)
    monkeypatch.setattr(checkpoint_writer, "available_memory", lambda: available)
    write(parts, tmp_path / "c")
    assert is_sharded(tmp_path / "c") == sharded
    assert ("in shards" in capsys.readouterr().err) == (sharded and not state_dict_type)
    assert torch.equal(read_checkpoint(tmp_path / "c")[0]["model"]["weight"], torch.arange(12.0).reshape(4, 3))


def test_a_damaged_shard_is_named_and_an_unsharded_checkpoint_is_not_merged(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[..., str]
) -> None:
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    write(parts, tmp_path / "run/stage2/checkpoints/step-000007")
    shard = tmp_path / "run/stage2/checkpoints/step-000007/ema/shard-00001-of-00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    lines: list[str] = []
    assert CheckpointManager(tmp_path / "run/stage2", 1).read_newest(lines.append) is None
    assert "step-000007 is damaged (ema/shard-00001-of-00001.safetensors is not what was written)" in lines[0]
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    write(parts, tmp_path / "full")
    dist.destroy_process_group()
    out = ("--to", "checkpoint", "--out", tmp_path / "out")
    for name, message in (("run", "is damaged"), ("full", "not in shards"), ("none", "no checkpoint")):
        output = call(export.main, tmp_path / name, *out, status=2)
        assert message in output and output.count("\n") == 1
    output = call(export.main, tmp_path / "run", *out, "--precision", "fp16", status=2)
    assert "--precision: has no effect with --to checkpoint" in output


def test_a_process_that_does_not_see_the_folder_or_fails_to_write_is_one_line_on_all(
    parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "SHARDED_STATE_DICT")
    unseen = tmp_path / "another machine"
    with monkeypatch.context() as patched:
        patched.setattr(shard_files, "atomic_folder", lambda folder: nullcontext(unseen))
        with pytest.raises(
            UserError, match=r"^run\.dir: process 0, on \S+, doesn't see .*another machine; give a folder"
        ):
            write(parts, tmp_path / "c")
    stale = OSError(errno.ESTALE, "Stale file handle")
    monkeypatch.setattr(shard_files, "write_shard", Mock(side_effect=stale))
    with pytest.raises(UserError, match=r"^can't write .*c: .*Stale file handle.*; the previous version is kept$"):
        write(parts, tmp_path / "c")
