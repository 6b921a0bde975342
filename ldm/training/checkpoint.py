"""Checkpoints: a folder of safetensors and a JSON, written to a temporary folder and renamed; no pickle."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from accelerate import PartialState
from safetensors.torch import load_file

from ldm.distributed.consensus import gather_objects, wait_until_visible
from ldm.distributed.launch import on_main
from ldm.utils.atomic_files import Tensors, atomic_folder, file_sha256, remove_unfinished
from ldm.utils.errors import UserError
from ldm.utils.safetensors_file import write_safetensors

Content = TypeVar("Content")
DAMAGE = (OSError, ValueError, KeyError)  # what reading a damaged checkpoint raises


def write_checkpoint(folder: Path, parts: dict[str, Tensors], state: dict[str, Any]) -> None:
    """`parts` as `NAME.safetensors`, and `state.json`, which also holds their SHA-256."""
    with atomic_folder(folder) as tmp_path:
        files = {f"{name}.safetensors": tensors for name, tensors in sorted(parts.items())}
        sums = {name: write_safetensors(tmp_path / name, tensors) for name, tensors in files.items()}
        (tmp_path / "state.json").write_text(json.dumps({**state, "sha256": sums}, indent=1))


def check_checkpoint(folder: Path) -> None:
    """Reads a whole checkpoint; ValueError or OSError where a file is missing or not what was written."""
    for name, expected in read_state(folder)["sha256"].items():
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{name} is not what was written")


def read_checkpoint(folder: Path, check: bool = True) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Parts and state of a checkpoint, which is checked first. Tensors are read from the disk as they are used."""
    if check:
        check_checkpoint(folder)
    state = read_state(folder)
    parts = {Path(name).stem: load_file(folder / name) for name in state["sha256"]}
    if "adversary" in parts:  # the discriminator's name before 0.1.0
        parts["discriminator"] = parts.pop("adversary")
        parts["discriminator_optimizer"] = parts.pop("adversary_optimizer")
        state["groups"]["discriminator_optimizer"] = state["groups"].pop("adversary_optimizer")
    return parts, state


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
            raise UserError(f"{checkpoint} is damaged ({error}); restore it from a copy, or remove it") from None
    return None


class CheckpointManager:
    """`FOLDER/checkpoints/step-000500` and so on, of which the last few are kept."""

    def __init__(self, folder: Path, total_limit: int):
        self.folder, self._total_limit = folder, total_limit
        self._damaged: list[Path] = []

    def write(self, step: int, parts: dict[str, Tensors], state: dict[str, Any]) -> None:
        """Writes a checkpoint whole or not at all; older ones go only after it stands."""
        write_checkpoint(self.folder / "checkpoints" / f"step-{step:06d}", parts, state)
        for old in checkpoints(self.folder)[: -self._total_limit]:
            shutil.rmtree(old)

    def read_newest(self, say: Callable[[str], None]) -> tuple[Path, dict[str, Tensors], dict[str, Any]] | None:
        """The newest sound checkpoint with its parts and state; damaged ones are named and passed over.

        All processes call it. One that a machine sees late is waited for. A process of each machine checks the files;
        the others then read only what they load.
        """
        for folder in reversed(wait_until_visible(on_main(lambda: checkpoints(self.folder)), Path.is_dir, "run.dir")):
            damage = ""
            if PartialState().is_local_main_process:
                try:
                    check_checkpoint(folder)
                except DAMAGE as error:
                    damage = str(error) or type(error).__name__
            if not (damages := list(filter(None, gather_objects(damage)))):
                return folder, *read_checkpoint(folder, check=False)
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
