"""Checkpoints: a folder of safetensors and a JSON, written to a temporary folder and renamed; no pickle."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file, save_file

from ldm.utils.atomic_files import Tensors, atomic_folder, file_sha256
from ldm.utils.errors import UserError

Content = TypeVar("Content")
DAMAGE = (OSError, ValueError, KeyError)  # what reading a damaged checkpoint raises


def write_checkpoint(folder: Path, parts: dict[str, Tensors], state: dict[str, Any]) -> None:
    """`parts` as `NAME.safetensors`, and `state.json`, which also holds their SHA-256."""
    with atomic_folder(folder) as tmp_path:
        for name, tensors in parts.items():
            save_file(
                {key: value.detach().contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors"
            )
        sums = {path.name: file_sha256(path) for path in sorted(tmp_path.iterdir())}
        (tmp_path / "state.json").write_text(json.dumps({**state, "sha256": sums}, indent=1))


def read_checkpoint(folder: Path) -> tuple[dict[str, Tensors], dict[str, Any]]:
    """Parts and state of a checkpoint; ValueError or OSError where a file is missing or not what was written."""
    state = read_state(folder)
    for name, expected in state["sha256"].items():
        if file_sha256(folder / name) != expected:
            raise ValueError(f"{name} is not what was written")
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
        """The newest sound checkpoint with its parts and state; damaged ones are named and passed over."""
        for folder in reversed(checkpoints(self.folder)):
            try:
                return folder, *read_checkpoint(folder)
            except DAMAGE as error:
                say(f"{folder} is damaged ({error}); going back to the checkpoint before it, or else to step 0.")
                self._damaged.append(folder)
        return None

    def set_damaged_aside(self) -> None:
        """Renames the damaged ones that were passed over, so that their steps can be written again."""
        for folder in self._damaged:
            folder.replace(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
        self._damaged = []

    def last(self) -> Path | None:
        return next(reversed(checkpoints(self.folder)), None)
