"""Runs that are killed again and again, at random moments, end with the bits of uninterrupted ones."""

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

pytestmark = [pytest.mark.slow, pytest.mark.drill]
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
    launch: Callable[..., Any],
    finish: Callable[..., str],
    three_shapes: Callable[[list[str]], Path],
    words: Path,
    tmp_path: Path,
) -> Callable[..., tuple[list[Path], list[str]]]:
    """Returns the finished runs' folders, the uninterrupted one first, and how each killed start ended."""

    def kill_runs(worlds: str, signals: str, kills: int, *more: str) -> tuple[list[Path], list[str]]:
        images = three_shapes([f"drawing number {i}" for i in range(40)])
        overrides = (*FAST, f"data.source={images}", f"text.model={words}", *more)
        output = finish(launch("tests/end_to_end/drill.py", tmp_path, worlds, signals, kills, *overrides))
        ends = output.splitlines()[-1].split()
        runs = sorted(path.parent for path in tmp_path.glob("*/pipeline"))
        return sorted(runs, key=lambda run: run.name != "uninterrupted"), [
            " ".join(ends[i : i + 4]) for i in range(0, len(ends), 4)
        ]

    return kill_runs


def metrics(folder: Path, stage: str) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / stage / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def test_killing_or_terminating_two_processes_three_times_changes_no_bit(
    drill: Callable[..., tuple[list[Path], list[str]]],
) -> None:
    (uninterrupted, *drilled), ends = drill("2", "KILL,TERM", 3)
    assert len(ends) >= 3
    assert all(end.endswith("-9/-9") for end in ends if " KILL " in end), ends
    assert drilled
    for run in drilled:
        assert_same(uninterrupted, run)


@pytest.mark.parametrize("world", ["1", "2"])
def test_kill_9_at_ten_random_moments_changes_no_bit(
    drill: Callable[..., tuple[list[Path], list[str]]], world: str
) -> None:
    (uninterrupted, *drilled), kills = drill(world, "KILL", 10)
    assert len(kills) >= 10
    assert all(kill.endswith("/".join(["-9"] * int(world))) for kill in kills), kills
    assert drilled
    for run in drilled:
        assert_same(uninterrupted, run)


def test_sigterm_at_five_random_moments_saves_and_changes_no_bit(
    drill: Callable[..., tuple[list[Path], list[str]]],
) -> None:
    (uninterrupted, *drilled), ends = drill("1", "TERM", 5)
    assert any(end.endswith(" 143") for end in ends), ends  # in training; elsewhere it ends the process, -15
    assert "stopped and saved at step" in (uninterrupted.parent / "drilled.0.txt").read_text()
    for run in drilled:
        assert_same(uninterrupted, run)


def test_another_number_of_processes_at_every_start_gives_the_same_weights_within_rounding(
    drill: Callable[..., tuple[list[Path], list[str]]],
) -> None:
    (uninterrupted, *drilled), kills = drill("1,2", "KILL", 4, "run.precision=no")
    assert {kill[0] for kill in kills} == {"1", "2"}
    for run in drilled:
        for stage in ("stage1", "stage2"):
            for line, expected in zip(metrics(run, stage), metrics(uninterrupted, stage), strict=True):
                assert line == pytest.approx(expected, rel=2e-2, abs=1e-5)
        weights, expected_weights = (
            torch.cat([tensor.flatten() for tensor in load_file(last / "ema.safetensors").values()])
            for last in (checkpoints(folder / "stage2")[-1] for folder in (run, uninterrupted))
        )
        assert (weights - expected_weights).norm() < 1e-3 * expected_weights.norm()


def test_eight_processes_of_which_one_dies_and_then_five_train_on_the_samples_of_a_single_process(
    launch: Callable[..., Any],
    finish: Callable[..., str],
    wait_for: Callable[..., None],
    kill_one: Callable[..., str],
    tiny_run: Path,
    words: Path,
    tmp_path: Path,
) -> None:
    shared = (
        f"text.model={words}",
        f"data.cache_dir={tiny_run / 'cache'}",
        f"stage1.pretrained={tiny_run / 'autoencoder'}",
        "stage2.batch=40",
        "stage2.steps=24",
        "stage2.checkpoint_every=4",
        "run.precision=no",
        "run.log_every=1",
        "sample.prompts=[]",
    )
    record = "tests/end_to_end/record_inputs.py"
    finish(launch(record, 1, tmp_path / "one", *shared))
    eight = launch(record, 8, tmp_path / "many", *shared, processes=8)
    wait_for(tmp_path / "many/stage2/checkpoints/step-000004", eight)
    kill_one(eight, 5)  # which asserts that the others end
    assert not (tmp_path / "many/pipeline").exists()
    output = finish(launch(record, 5, tmp_path / "many", *shared, processes=5))
    assert (resumed := int(output.split("stage2: continuing from step ")[1].split()[0])) >= 4
    expected, of_ranks = (
        [load_file(tmp_path / name / f"rank-{rank}.safetensors") for rank in range(world)]
        for name, world in (("one", 1), ("many", 5))
    )
    inputs = torch.cat([of_rank["x_t"] for of_rank in of_ranks], 1)
    assert torch.equal(inputs, expected[0]["x_t"][resumed:])  # noisy latents, step by step
    assert all(torch.equal(of_rank["weights"], of_ranks[0]["weights"]) for of_rank in of_ranks)
    curves = [
        [(line["step"], line["loss"]) for line in metrics(tmp_path / name, "stage2") if "loss" in line]
        for name in ("many", "one")
    ]
    assert [step for step, _ in curves[0]] == [*range(1, 25)]
    assert [loss for _, loss in curves[0]] == pytest.approx([loss for _, loss in curves[1]], rel=1e-3)


def assert_same(uninterrupted: Path, run: Path) -> None:
    """Every tensor of the last checkpoints and of what was exported, and every metric."""
    folders = [checkpoints(uninterrupted / stage)[-1] for stage in ("stage1", "stage2")]
    folders += [uninterrupted / name for name in ("autoencoder", "pipeline", "stage2/ema")]
    files = [path for folder in folders for path in folder.rglob("*.safetensors")]
    # model, average, optimizer, twice; a second average; autoencoder; U-Net, autoencoder, text; snapshots
    assert len(files) == 3 + 4 + 1 + 3 + 2 * 3
    for path in files:
        tensors, expected = load_file(run / path.relative_to(uninterrupted)), load_file(path)
        assert tensors.keys() == expected.keys()
        assert all(tensors[name].equal(expected[name]) for name in expected), path
    for stage in ("stage1", "stage2"):
        assert metrics(run, stage) == metrics(uninterrupted, stage)
