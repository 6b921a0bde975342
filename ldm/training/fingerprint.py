"""What a checkpoint was trained on, and what a run is refused for when it changed: data, autoencoder, latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ldm.config.loader import differences
from ldm.data.sampler import ORDER
from ldm.distributed.consensus import gather_objects
from ldm.training.checkpoint import read_last, read_state
from ldm.utils.errors import UserError

Fingerprint = dict[str, Any]


def check_same_on_all_processes(stage: str, fingerprint: Fingerprint) -> None:
    """UserError, on all processes, where one has other images or latents than the main one."""
    main, *others = gather_objects(fingerprint)
    for rank, other in enumerate(others, 1):
        if changed := "; ".join(differences(main, other)):
            raise UserError(
                f"{stage}: process {rank} has other images, captions or latents than process 0 ({changed}); "
                "put data and autoencoder on a file system that all machines share"
            )


def check_same(checkpoint: Path, stored: Fingerprint, fingerprint: Fingerprint) -> None:
    """UserError where a checkpoint to continue from was trained on other images or latents."""
    if stored != fingerprint:
        changed = "; ".join(differences(stored, fingerprint))
        raise UserError(
            f"{checkpoint}: its images, captions or latents were others ({changed}); "
            "give back those that it was trained with, or train in a new folder"
        )


def check_finished(stage_dir: Path, fingerprint: Fingerprint) -> None:
    """UserError where the finished stage in `stage_dir` was trained on other images, or with other latents."""
    stored = read_last(stage_dir, lambda checkpoint: read_state(checkpoint)["fingerprint"])
    if stored is None:
        return
    if changed := [name for name, value in fingerprint.items() if stored.get(name) != value]:
        raise UserError(
            f"{stage_dir.parent} is finished, but its {' and '.join(changed)} changed since; "
            "give another run.dir, or --fresh to train in a new one"
        )


def order_changed(state: dict[str, Any]) -> str:
    """A line where a checkpoint's run ordered images otherwise than this version does; empty where it did not."""
    if state.get("order", 1) == ORDER or state["places"]:  # a stream's order has not changed
        return ""
    return (
        "the version that began this run ordered images differently; until the current epoch ends, some images may "
        "come a second time and others not at all."
    )
