"""FSDP and DeepSpeed as people launch them: killed, taken up by one process, opened by plain diffusers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from ldm.sampling.pipeline import LatentDiffusion

pytestmark = pytest.mark.slow

Start = Callable[..., subprocess.Popen[str]]
Finish = Callable[[subprocess.Popen[str]], str]
Wait = Callable[[Path, subprocess.Popen[str]], None]


def two(kind: str) -> list[str]:
    """The arguments of Python that start two processes as accelerate's configuration says."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"configs/accelerate/{kind}.yaml"]
    script = ["train_ldm.py", "--config", "configs/tiny.yaml"]
    return [*launcher, "--num_processes", "2", "--main_process_port", "0", *script]


PLAIN = """
import sys, torch; from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
given = {"num_inference_steps": 3, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(5)}
pipe("red heart", **given).images[0].save(sys.argv[2])
"""


def test_a_sharded_run_is_killed_goes_on_in_one_process_and_opens_in_plain_diffusers(
    train: Callable[..., str],
    launch: Start,
    finish: Finish,
    wait_for: Wait,
    kill_one: Callable[[subprocess.Popen[str], int], str],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    folder = tmp_path / "run"
    cache = f"data.cache_dir={tiny_run / 'cache'}"
    process = launch(*two("fsdp"), f"run.dir={folder}", cache)
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
    ours = LatentDiffusion.load(folder / "pipeline", "cpu")(
        "red heart", seed=5, num_inference_steps=3, guidance_scale=3.0
    )[0]
    assert np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_deepspeed_trains_as_one_process_does_and_goes_on_with_or_without_it(
    train: Callable[..., str],
    launch: Start,
    finish: Finish,
    wait_for: Wait,
    kill: Callable[[subprocess.Popen[str]], None],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("deepspeed")
    more = [
        f"data.cache_dir={tiny_run / 'cache'}", f"stage1.pretrained={tiny_run / 'autoencoder'}", "run.precision=no",
        "stage2.steps=20", "stage2.device_batch=4",
    ]  # fmt: skip
    one, zero = tmp_path / "one", tmp_path / "zero"
    train(one, *more)
    process = launch(*two("deepspeed-zero2"), f"run.dir={zero}", *more)
    wait_for(zero / "stage2/checkpoints/step-000010", process)
    kill(process)
    shutil.copytree(zero, tmp_path / "zero then one")
    finish(launch(*two("deepspeed-zero2"), f"run.dir={zero}", *more))
    assert "stage2: continuing from step 10" in train(tmp_path / "zero then one", *more)
    whole, *others = (
        load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors")
        for folder in (one, zero, tmp_path / "zero then one")
    )
    for other in others:
        for name, tensor in whole.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=1e-4)
