"""FSDP as people launch it: both stages, killed, taken up by one process, opened by plain diffusers."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.pipeline import LatentDiffusion

pytestmark = pytest.mark.slow

LAUNCH = (
    "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp.yaml", "--num_processes", "2",
    "--main_process_port", "0", "train_ldm.py", "--config", "configs/tiny.yaml",
)  # fmt: skip
PLAIN = """
import sys, torch; from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
given = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(5)}
pipe("red heart", **given).images[0].save(sys.argv[2])
"""


def test_a_sharded_run_is_killed_goes_on_in_one_process_and_opens_in_plain_diffusers(
    train: Callable[..., str],
    launch: Callable[..., subprocess.Popen[str]],
    finish: Callable[[subprocess.Popen[str]], str],
    wait_for: Callable[[Path, subprocess.Popen[str]], None],
    kill_one: Callable[[subprocess.Popen[str], int], str],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    cache = f"data.cache_dir={tiny_run / 'cache'}"
    process = launch(*LAUNCH, f"run.dir={folder}", cache)
    wait_for(folder / "stage2/checkpoints/step-000030", process)
    output = kill_one(process, 0)
    assert "another process of this run has ended" in output
    assert "[rank1]: Traceback" not in output
    assert "stage2: continuing from step" in train(folder, cache)
    for name in ("stage1/samples/step-000040.png", "stage2/samples/step-000020.png", "samples.png", "README.md"):
        assert (folder / name).exists(), name
    first = [json.loads((run / "stage1/metrics.jsonl").read_text().splitlines()[0]) for run in (tiny_run, folder)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-3)
    losses = [json.loads(line).get("loss") for line in (folder / "stage2/metrics.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss][-1] < losses[0]
    finish(launch("-c", PLAIN, folder / "pipeline", tmp_path / "theirs.png"))
    theirs = Image.open(tmp_path / "theirs.png")
    ours = LatentDiffusion.load(folder / "pipeline", "cpu")("red heart", seed=5, steps=3, guidance=3.0)[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1
