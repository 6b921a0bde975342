"""Checkpoints: a folder of safetensors and a JSON, written to a temporary folder and renamed; no pickle.

A part's tensors are a file, or, in a sharded checkpoint, a folder to which each process has written its shards. Either
is read by any number of processes.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from safetensors.torch import load_file

from ldm.distributed.consensus import gather_objects, wait_until_visible
from ldm.distributed.launch import on_main
from ldm.distributed.shard_files import Shards, write_shards
from ldm.utils.atomic_files import Tensors, atomic_folder, file_sha256, remove_unfinished
from ldm.utils.errors import UserError
from ldm.utils.safetensors_file import SavedTensors, open_tensors, read_tensors, write_safetensors

Content = TypeVar("Content")
DAMAGE = (OSError, ValueError, KeyError)  # what reading a damaged checkpoint raises


def write_checkpoint(folder: Path, parts: Mapping[str, SavedTensors | Shards], state: dict[str, Any]) -> None:
    """`parts` as `NAME.safetensors`, and `state.json`, which also holds their SHA-256.

    Shards, which all of their processes write, are `NAME/shard-00001-of-00008.safetensors`.
    """

    def write_state(tmp_path: Path, sums: dict[str, str]) -> None:
        (tmp_path / "state.json").write_text(json.dumps({**state, "sha256": sums}, indent=1))

    if shards := {name: part for name, part in sorted(parts.items()) if isinstance(part, Shards)}:
        write_shards(folder, shards, finish=write_state)
        return
    with atomic_folder(folder) as tmp_path:
        files = {f"{name}.safetensors": part for name, part in sorted(parts.items()) if not isinstance(part, Shards)}
        write_state(tmp_path, {name: write_safetensors(tmp_path / name, part) for name, part in files.items()})


def check_checkpoint(folder: Path, process: int = 0, processes: int = 1) -> None:
    """Reads a whole checkpoint, or the share of it that one of `processes` has to check.

    ValueError or OSError where a file is missing or not what was written.
    """
    sums = read_state(folder)["sha256"]
    for name in sorted(sums)[process::processes]:
        if file_sha256(folder / name) != sums[name]:
            raise ValueError(f"{name} is not what was written")


def open_checkpoint(folder: Path) -> tuple[dict[str, SavedTensors], dict[str, Any]]:
    """Parts and state of a checkpoint, which is not checked. Tensors are read from the disk as they are used."""
    state = read_state(folder)
    files = {path.stem: load_file(folder / path) for path in map(Path, state["sha256"]) if not path.parent.name}
    folders = {path.parent.name for path in map(Path, state["sha256"])} - {""}
    parts: dict[str, SavedTensors] = {**files, **{name: open_tensors(folder / name) for name in sorted(folders)}}
    if "adversary" in parts:  # the discriminator's name before 0.1.0
        parts["discriminator"] = parts.pop("adversary")
        parts["discriminator_optimizer"] = parts.pop("adversary_optimizer")
        state["groups"]["discriminator_optimizer"] = state["groups"].pop("adversary_optimizer")
    return parts, state


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Parts and state of a checkpoint, which is checked first; full tensors, also of a sharded one."""
    check_checkpoint(folder)
    parts, state = open_checkpoint(folder)
    return {name: read_tensors(part) for name, part in parts.items()}, state


def is_sharded(folder: Path) -> bool:
    """Whether processes have written their shards of a checkpoint's tensors."""
    return any("/" in name for name in read_state(folder)["sha256"])


def merge_shards(folder: Path, out: Path) -> None:
    """Writes a sharded checkpoint with full tensors: the bytes of a gathered one. One tensor at a time is in memory.

    UserError where it is damaged, or has no shards.
    """
    try:
        check_checkpoint(folder)
        parts, state = open_checkpoint(folder)
        sharded = is_sharded(folder)
    except DAMAGE as error:
        raise damaged(folder, error) from None
    if not sharded:
        raise UserError(f"{folder}: its tensors are not in shards; copy the folder")
    del state["sha256"]
    write_checkpoint(out, parts, state)
    check_checkpoint(out)


def read_state(folder: Path) -> dict[str, Any]:
    """`state.json` of a checkpoint."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text())
    if "contract" in state:  # its name before 0.1.0
        state["fingerprint"] = state.pop("contract")
    return state


def checkpoints(folder: Path) -> list[Path]:
    """Those of a stage's folder, oldest first."""
    numbered = {path.name.removeprefix("step-"): path for path in (folder / "checkpoints").glob("step-*")}
    return [numbered[name] for name in sorted(filter(str.isdigit, numbered), key=int)]


def steps_done(folder: Path) -> int:
    """The step of the last checkpoint in a stage's folder; 0 where there is none."""
    last = checkpoints(folder)[-1:]
    return int(last[0].name.removeprefix("step-")) if last else 0


def read_last(folder: Path, read: Callable[[Path], Content]) -> Content | None:
    """What `read` returns of the last checkpoint in a stage's folder, or None; UserError where that is damaged."""
    for checkpoint in checkpoints(folder)[-1:]:
        try:
            return read(checkpoint)
        except DAMAGE as error:
            raise damaged(checkpoint, error) from None
    return None


def damaged(checkpoint: Path, error: Exception) -> UserError:
    """The error to raise where a checkpoint can't be read."""
    return UserError(f"{checkpoint} is damaged ({error}); restore it from a copy, or remove it")


class CheckpointManager:
    """`FOLDER/checkpoints/step-000500` and so on, of which the last few are kept."""

    def __init__(self, folder: Path, total_limit: int):
        self.folder, self._total_limit = folder, total_limit
        self._damaged: list[Path] = []

    def write(self, step: int, parts: Mapping[str, SavedTensors | Shards], state: dict[str, Any]) -> None:
        """Writes a checkpoint whole or not at all; older ones go only after it stands."""
        write_checkpoint(self.folder / "checkpoints" / f"step-{step:06d}", parts, state)
        for old in checkpoints(self.folder)[: -self._total_limit] if PartialState().is_main_process else ():
            shutil.rmtree(old)

    def read_newest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, SavedTensors], dict[str, Any]] | None:
        """The newest sound checkpoint with its parts and state; damaged ones are named and passed over.

        All processes call it. One that a machine sees late is waited for. One process of each machine checks the files,
        or, of shards, each process its share; processes then read only what they load.
        """
        for folder in reversed(wait_until_visible(on_main(lambda: checkpoints(self.folder)), Path.is_dir, "run.dir")):
            if not (damages := list(filter(None, gather_objects(_damage(folder))))):
                return folder, *open_checkpoint(folder)
            say(f"{folder} is damaged ({damages[0]}); going back to the checkpoint before it, or else to step 0.")
            self._damaged.append(folder)
        return None

    def tidy_up(self) -> None:
        """Renames the damaged ones that were passed over, so that their steps can be written again.

        Removes what a killed process has left unfinished.
        """
        for folder in self._damaged:
            folder.replace(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
        self._damaged = []
        remove_unfinished(self.folder / "checkpoints")

    def last(self) -> Path | None:
        return next(reversed(checkpoints(self.folder)), None)


def _damage(folder: Path) -> str:
    """What is wrong with the files of a checkpoint that this process checks; empty where nothing is."""
    process = PartialState()
    try:
        if is_sharded(folder):
            check_checkpoint(folder, process.process_index, process.num_processes)
        elif process.is_local_main_process:
            check_checkpoint(folder)
    except DAMAGE as error:
        return str(error) or type(error).__name__
    return ""
