"""Stage one through the commands that users type: processes, kill -9, decoder only, other programs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from forked import ScriptProcess
from metrics_lines import MEASURED
from safetensors.torch import load_file
from tiny import TINY

from ldm.models import autoencoder
from ldm.models.convert import autoencoder as single_file
from ldm.training.checkpoint import read_checkpoint

pytestmark = pytest.mark.slow

GAN = [
    "stage1.gan.start=6",
    "stage1.gan.warmup=4",
    "stage1.gan.ramp=4",
    "stage1.gan.channels=16",
    "stage1.gan.layers=2",
    "stage1.learn_variance=true",
    "stage1.checkpoint_every=4",
    "stage1.steps=24",
    "run.log_every=1",
]


PARTS = {"model", "ema", "optimizer", "discriminator", "discriminator_optimizer"}  # of a checkpoint
Start = Callable[..., ScriptProcess]
Finish = Callable[[ScriptProcess], str]


def lines(folder: Path) -> list[dict[str, float]]:
    logged = map(json.loads, (folder / "stage1/metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in logged]


def checkpoint(folder: Path) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    newest = max((folder / "stage1/checkpoints").glob("step-*"))
    return read_checkpoint(newest)


@pytest.fixture
def few(three_shapes: Callable[[list[str]], Path]) -> tuple[str, str]:
    """Overrides: a data set of few images, some of which are held out."""
    return f"data.source={three_shapes([f'image {i}' for i in range(33)])}", "data.val_fraction=0.3"


@pytest.mark.drill
@pytest.mark.parametrize("model", ["kl", "vq"])
def test_two_processes_equal_a_single_one_with_the_discriminator_on(
    launch: Start, finish: Finish, few: tuple[str, str], tmp_path: Path, model: str
) -> None:
    for name, count in (("two", 2), ("single", 1)):
        finish(launch("tests/end_to_end/exactly.py", count, tmp_path / name / model, model, *few, processes=count))
    if model == "vq":
        assert "codes_revived" in lines(tmp_path / "single/vq")[2]
    (single, _), (two_processes, _) = (checkpoint(tmp_path / name / model) for name in ("single", "two"))
    assert single.keys() == two_processes.keys() == PARTS
    for part, tensors in single.items():
        for name, tensor in tensors.items():
            # Adam divides by the gradient's size, so where that is tiny rounding counts more than elsewhere
            actual = two_processes[part][name]
            torch.testing.assert_close(actual, tensor, rtol=1e-9, atol=1e-10, msg=f"{part} {name}")
    for a, b in zip(lines(tmp_path / "single" / model), lines(tmp_path / "two" / model), strict=True):
        assert b == pytest.approx(a, rel=1e-6)  # the log adds up in float32
    names = {name for line in lines(tmp_path / "two" / model) for name in line}
    assert names >= {"generator", "adaptive_weight", "r1", "discriminator", "logvar"}
    facts = [
        json.loads((tmp_path / name / model / "autoencoder/latents.json").read_text()) for name in ("single", "two")
    ]
    assert facts[1]["raw_std"] == pytest.approx(facts[0]["raw_std"], rel=1e-6)
    assert facts[1]["latents"]["values_per_channel"] == facts[0]["latents"]["values_per_channel"]
    assert facts[1]["held_out"]["psnr"] == pytest.approx(facts[0]["held_out"]["psnr"], rel=1e-6)


@pytest.mark.drill  # kill -9 in each stage: tests/end_to_end/test_two_stages.py
def test_both_networks_survive_kill_9(
    train: Callable[..., str],
    launch: Start,
    wait_for: Callable[[Path, ScriptProcess], None],
    few: tuple[str, str],
    tmp_path: Path,
) -> None:
    arguments = ["--stage", "1", *GAN, *few]
    train(tmp_path / "uninterrupted", *arguments)
    folder = tmp_path / "killed"
    for step in (8, 16):  # the discriminator has just begun; the autoencoder gets its gradients
        process = launch("train_ldm.py", *TINY, f"run.dir={folder}", *arguments)
        wait_for(folder / f"stage1/checkpoints/step-{step:06d}", process)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
    assert "stage1: continuing from step" in train(folder, *arguments)
    (expected, state), (parts, resumed) = checkpoint(tmp_path / "uninterrupted"), checkpoint(folder)
    assert expected.keys() == PARTS
    for part, tensors in expected.items():
        assert all(torch.equal(tensor, parts[part][name]) for name, tensor in tensors.items()), part
    assert {**resumed, "metrics_bytes": 0} == {**state, "metrics_bytes": 0}  # speeds have more digits or fewer
    assert lines(folder) == lines(tmp_path / "uninterrupted")
    weights = [
        load_file(run / "autoencoder/diffusion_pytorch_model.safetensors")
        for run in (tmp_path / "uninterrupted", folder)
    ]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_training_only_the_decoder_leaves_the_encoders_bytes_and_improves_images(
    train: Callable[..., str], tiny_run: Path, tmp_path: Path
) -> None:
    start = tiny_run / "autoencoder"
    overrides = (f"stage1.init_from={start}", "stage1.train=decoder", "stage1.steps=20")
    train(tmp_path, "--stage", "1", *overrides, f"data.cache_dir={tiny_run / 'cache'}")
    before, after = (
        load_file(name / "diffusion_pytorch_model.safetensors") for name in (start, tmp_path / "autoencoder")
    )
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        encoder = name.startswith(("encoder.", "quant_conv."))
        assert (tensor.numpy().tobytes() == after[name].numpy().tobytes()) == encoder, name
    facts = [json.loads((folder / "latents.json").read_text()) for folder in (start, tmp_path / "autoencoder")]
    assert facts[1]["held_out"]["psnr"] > facts[0]["held_out"]["psnr"]
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    latents = [autoencoder.load(folder).encode(x) for folder in (start, tmp_path / "autoencoder")]
    assert torch.equal(*latents)


@pytest.mark.drill
def test_a_trained_autoencoder_is_trained_further(train: Callable[..., str], tiny_run: Path, tmp_path: Path) -> None:
    start = tiny_run / "autoencoder"
    train(tmp_path, "--stage", "1", f"stage1.init_from={start}", f"data.cache_dir={tiny_run / 'cache'}")
    facts = [json.loads((folder / "latents.json").read_text()) for folder in (start, tmp_path / "autoencoder")]
    assert facts[1]["held_out"]["psnr"] > facts[0]["held_out"]["psnr"] + 0.5
    np.testing.assert_allclose(facts[1]["latents"]["std"], 1, atol=1e-3)
    np.testing.assert_allclose(facts[1]["latents"]["mean"], 0, atol=1e-3)


def test_plain_diffusers_decodes_the_same_image(tiny_run: Path, tmp_path: Path) -> None:
    trained = autoencoder.load(tiny_run / "autoencoder")
    plain = AutoencoderKL.from_pretrained(tiny_run / "autoencoder")
    single_file.write(trained.vae, tmp_path / "vae.safetensors")
    reloaded = autoencoder.load(tmp_path / "vae.safetensors")
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = plain.encode(x).latent_dist.mean * plain.config.scaling_factor
        pixels = plain.decode(latents / plain.config.scaling_factor).sample
    for vae in (trained, reloaded):
        assert torch.equal(vae.encode(x), latents)
        assert torch.equal(vae.decode(latents), pixels)


def test_a_run_leaves_figures_and_images_of_each_interval(tiny_run: Path) -> None:
    measured = [line for line in lines(tiny_run) if "held_out_psnr" in line]
    assert [line["step"] for line in measured] == [40]
    assert (tiny_run / "stage1/samples/step-000040.png").exists()
    assert (tiny_run / "stage1/latents.png").exists()
    facts = json.loads((tiny_run / "autoencoder/latents.json").read_text())
    np.testing.assert_allclose(facts["latents"]["std"], 1, atol=1e-3)
