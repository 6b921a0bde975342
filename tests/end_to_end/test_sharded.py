"""FSDP as people launch it: both stages, killed, taken up by one process, opened by plain diffusers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow

LAUNCH = (
    "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp.yaml", "--num_processes", "2",
    "--main_process_port", "0", "train_ldm.py", "--config", "configs/tiny.yaml",
)  # fmt: skip
PLAIN = """
import sys, torch; from diffusers import DiffusionPipeline
for folder, name in zip(sys.argv[1::2], sys.argv[2::2]):
    pipe = DiffusionPipeline.from_pretrained(folder)
    given = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(5)}
    torch.save(torch.from_numpy(pipe("red heart", output_type="np", **given).images), name)
"""


def test_a_sharded_run_is_killed_goes_on_in_one_process_and_opens_in_plain_diffusers(
    train: Callable[..., str],
    launch: Callable[..., subprocess.Popen[str]],
    finish: Callable[[subprocess.Popen[str]], str],
    wait_for: Callable[[Path, subprocess.Popen[str]], None],
    kill: Callable[[subprocess.Popen[str]], None],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    cache = f"data.cache_dir={tiny_run / 'cache'}"
    process = launch(*LAUNCH, f"run.dir={folder}", cache)
    wait_for(folder / "stage2/checkpoints/step-000030", process)
    kill(process)
    assert "stage2: continuing from step" in train(folder, cache)
    for name in ("stage1/samples/step-000040.png", "stage2/samples/step-000020.png", "samples.png", "README.md"):
        assert (folder / name).exists(), name
    losses = [
        [
            line["loss"]
            for line in map(json.loads, (run / "stage2/metrics.jsonl").read_text().splitlines())
            if "loss" in line
        ]
        for run in (tiny_run, folder)
    ]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # bf16, and two halves of a batch
    pictures = [tmp_path / name for name in ("whole.pt", "sharded.pt")]
    finish(launch("-c", PLAIN, tiny_run / "pipeline", pictures[0], folder / "pipeline", pictures[1]))
    one, two = (torch.load(path, weights_only=True) for path in pictures)
    print("difference", (one - two).abs().mean(), (one - two).abs().max())
    assert (one - two).abs().mean() < 0.02
