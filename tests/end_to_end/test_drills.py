"""Runs that are killed, over and over, at moments that nobody chose, end as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from metrics_lines import MEASURED
from safetensors.torch import load_file

from ldm.training.checkpoint import checkpoints

pytestmark = pytest.mark.slow
FAST = (
    "stage1.steps=12",
    "stage2.steps=12",
    "stage1.checkpoint_every=2",
    "stage2.checkpoint_every=2",
    "sample.every=6",
    "stage2.evaluate_every=6",
    "stage1.evaluate_every=6",
    "run.log_every=3",
    "data.val_fraction=0.2",
    "stage2.device_batch=4",
    "stage2.ema_widths=[0.05, 0.1]",
    "stage2.ema_snapshot_every=4",
)


@pytest.fixture
def drill(
    launch: Callable[..., Any], finish: Callable[..., str], three_shapes: Callable[[list[str]], Path], tmp_path: Path
) -> Callable[..., tuple[list[Path], list[str]]]:
    """The finished runs' folders, the undisturbed one first, and how each start that was killed ended."""

    def given(worlds: str, signals: str, kills: int, *more: str) -> tuple[list[Path], list[str]]:
        source = f"data.source={three_shapes([f'drawing number {i}' for i in range(40)])}"
        said = finish(launch("tests/end_to_end/drill.py", tmp_path, worlds, signals, kills, *FAST, source, *more))
        words = said.splitlines()[-1].split()
        runs = sorted(path.parent for path in tmp_path.glob("*/pipeline"))
        return sorted(runs, key=lambda run: run.name != "whole"), [
            " ".join(words[i : i + 4]) for i in range(0, len(words), 4)
        ]

    return given


def metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def test_two_processes_killed_or_terminated_four_times_change_no_bit(
    drill: Callable[..., tuple[list[Path], list[str]]],
) -> None:
    (whole, *drilled), ends = drill("2", "KILL,TERM", 4)
    assert len(ends) >= 4
    assert all(end.endswith("-9/-9") for end in ends if " KILL " in end), ends
    assert drilled
    for run in drilled:
        same(whole, run)


@pytest.mark.drill
@pytest.mark.parametrize("world", ["1", "2"])
def test_kill_9_at_ten_random_moments_changes_no_bit(
    drill: Callable[..., tuple[list[Path], list[str]]], world: str
) -> None:
    (whole, *drilled), kills = drill(world, "KILL", 10)
    assert len(kills) >= 10
    assert all(kill.endswith("/".join(["-9"] * int(world))) for kill in kills), kills
    assert drilled
    for run in drilled:
        same(whole, run)


@pytest.mark.drill
def test_sigterm_at_five_random_moments_saves_and_changes_no_bit(
    drill: Callable[..., tuple[list[Path], list[str]]],
) -> None:
    (whole, *drilled), ends = drill("1", "TERM", 5)
    assert any(end.endswith(" 143") for end in ends), ends  # in training; elsewhere it ends the process, -15
    assert "stopped and saved at step" in (whole.parent / "drilled.0.txt").read_text()
    for run in drilled:
        same(whole, run)


@pytest.mark.drill
def test_another_number_of_processes_at_every_start_gives_the_same_weights_within_rounding(
    drill: Callable[..., tuple[list[Path], list[str]]],
) -> None:
    (whole, *drilled), kills = drill("1,2", "KILL", 4, "run.precision=no")
    assert {kill[0] for kill in kills} == {"1", "2"}
    for run in drilled:
        for stage in ("stage1", "stage2"):
            for ours, theirs in zip(metrics(run, stage), metrics(whole, stage), strict=True):
                assert ours == pytest.approx(theirs, rel=2e-2, abs=1e-5)
        ours, theirs = (
            torch.cat([tensor.flatten() for tensor in load_file(last / "ema.safetensors").values()])
            for last in (checkpoints(folder / "stage2")[-1] for folder in (run, whole))
        )
        assert (ours - theirs).norm() < 1e-3 * theirs.norm()


def same(whole: Path, run: Path) -> None:
    """Every tensor of the last checkpoints and of what was exported, and every metric."""
    folders = [checkpoints(whole / "stage1")[-1], checkpoints(whole / "stage2")[-1], whole / "autoencoder"]
    folders += [whole / "pipeline", whole / "stage2/ema"]
    files = [path for folder in folders for path in folder.rglob("*.safetensors")]
    # model, average, optimiser, twice; a second average; autoencoder; U-Net, autoencoder, text; snapshots
    assert len(files) == 3 + 4 + 1 + 3 + 2 * 3
    for path in files:
        ours, theirs = load_file(run / path.relative_to(whole)), load_file(path)
        assert ours.keys() == theirs.keys()
        assert all(ours[name].equal(theirs[name]) for name in theirs), path
    for stage in ("stage1", "stage2"):
        assert metrics(run, stage) == metrics(whole, stage)
