"""FSDP and DeepSpeed as users launch them: killed, resumed by a single process, opened by plain diffusers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from forked import ScriptProcess, of_accelerate
from safetensors.torch import load_file
from tiny import TINY

from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.checkpoint import checkpoints, is_sharded

pytestmark = pytest.mark.slow

Start = Callable[..., ScriptProcess]
Finish = Callable[[ScriptProcess], str]
Wait = Callable[[Path, ScriptProcess], None]


ZERO = (
    "-m",
    "accelerate.commands.launch",
    "--config_file",
    "configs/accelerate/deepspeed-zero2.yaml",
    "--num_processes",
    "2",
    "--main_process_port",
    "0",
    "train_ldm.py",
    *TINY,
)


@pytest.mark.drill
@pytest.mark.parametrize("state_dict_type", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_a_killed_sharded_run_resumes_in_a_single_process_and_opens_in_plain_diffusers(
    train: Callable[..., str],
    launch: Start,
    wait_for: Wait,
    kill_one: Callable[[ScriptProcess, int], str],
    root: Path,
    tiny_run: Path,
    tmp_path: Path,
    state_dict_type: str,
) -> None:
    folder = tmp_path / "run"
    more = [f"data.cache_dir={tiny_run / 'cache'}", "stage1.steps=10", "stage2.steps=20", "sample.every=10"]
    command = ["train_ldm.py", *TINY, f"run.dir={folder}", *more]
    fsdp = of_accelerate(root / "configs/accelerate/fsdp.yaml") | {"FSDP_STATE_DICT_TYPE": state_dict_type}
    process = launch(*command, processes=2, more=fsdp)
    wait_for(folder / "stage2/checkpoints/step-000010", process)
    output = kill_one(process, 0)
    assert is_sharded(checkpoints(folder / "stage2")[-1]) == (state_dict_type == "SHARDED_STATE_DICT")
    assert "another process of this run has ended" in output
    assert "[rank1]: Traceback" not in output
    assert "stage2: continuing from step" in train(folder, *more)
    for name in ("stage1/samples/step-000010.png", "stage2/samples/step-000010.png", "samples.png", "README.md"):
        assert (folder / name).exists(), name
    first = [json.loads((run / "stage1/metrics.jsonl").read_text().splitlines()[0]) for run in (tiny_run, folder)]
    assert first[1]["loss"] == pytest.approx(first[0]["loss"], rel=1e-3)
    losses = [json.loads(line).get("loss") for line in (folder / "stage2/metrics.jsonl").read_text().splitlines()]
    assert [loss for loss in losses if loss][-1] < losses[0]
    pipe = DiffusionPipeline.from_pretrained(folder / "pipeline")
    options = {"num_inference_steps": 3, "guidance_scale": 3.0}
    expected = pipe("red heart", generator=torch.Generator().manual_seed(5), **options).images[0]
    image = LatentDiffusion.load(folder / "pipeline", "cpu")("red heart", seed=5, **options)[0]
    assert np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int)).max() <= 1


@pytest.mark.drill
def test_an_adapter_under_fsdp_has_the_losses_and_the_weights_of_a_single_process(
    train: Callable[..., str], launch: Start, finish: Finish, root: Path, tiny_run: Path, tmp_path: Path
) -> None:
    pipeline = tiny_run / "pipeline"
    more = [f"{key}={pipeline}" for key in ("stage1.pretrained", "text.model", "stage2.init_from")]
    more += [f"data.cache_dir={tiny_run / 'cache'}", "stage2.steps=6", "run.log_every=1", "run.precision=no"]
    more += ["finetune.kind=lora", "finetune.rank=4", "finetune.targets=all", "finetune.text_encoder=true"]
    single, sharded = tmp_path / "single", tmp_path / "sharded"
    train(single, *more)
    command = ["train_ldm.py", *TINY, f"run.dir={sharded}", *more]
    finish(launch(*command, processes=2, more=of_accelerate(root / "configs/accelerate/fsdp.yaml")))
    lines = [map(json.loads, (run / "stage2/metrics.jsonl").read_text().splitlines()) for run in (single, sharded)]
    expected, losses = ([line["loss"] for line in of_run if "loss" in line] for of_run in lines)
    assert len(losses) == 6
    assert losses == pytest.approx(expected, rel=1e-4)
    weights, other = (load_file(run / "lora/pytorch_lora_weights.safetensors") for run in (single, sharded))
    assert weights.keys() == other.keys() and any(name.startswith("text_encoder.") for name in weights)
    for name, tensor in weights.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-2, atol=1e-4)


def test_deepspeed_trains_as_a_single_process_does_and_resumes_with_or_without_it(
    train: Callable[..., str],
    launch_python: Start,
    finish: Finish,
    wait_for: Wait,
    kill: Callable[[ScriptProcess], None],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    pytest.importorskip("deepspeed")
    more = [
        f"data.cache_dir={tiny_run / 'cache'}",
        f"stage1.pretrained={tiny_run / 'autoencoder'}",
        "run.precision=no",
        "stage2.steps=20",
        "stage2.device_batch=4",
    ]
    single, zero = tmp_path / "single", tmp_path / "zero"
    train(single, *more)
    process = launch_python(*ZERO, f"run.dir={zero}", *more)
    wait_for(zero / "stage2/checkpoints/step-000010", process)
    kill(process)
    shutil.copytree(zero, tmp_path / "zero then single")
    finish(launch_python(*ZERO, f"run.dir={zero}", *more))
    assert "stage2: continuing from step 10" in train(tmp_path / "zero then single", *more)
    expected, *resumed = (
        load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors")
        for folder in (single, zero, tmp_path / "zero then single")
    )
    for weights in resumed:
        for name, tensor in expected.items():
            torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-4)
