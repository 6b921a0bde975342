"""A super-resolution run is measured by enlarging held-out images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import train_ldm
from ldm.evaluation.enlarging import compare_enlarging
from ldm.evaluation.reconstruction import reconstruction
from ldm.models.autoencoder import Autoencoder
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from scripts import evaluate


def test_the_upscaler_and_bicubic_enlarging_get_the_same_small_images(
    random_model: Callable[..., LatentDiffusion],
) -> None:
    model, generator = random_model("text", "upscale"), torch.Generator().manual_seed(0)
    real, prompts = 2 * torch.rand(5, 3, 16, 16, generator=generator) - 1, ["red heart", "a cat", "owl", "fox", "sun"]
    metrics, images = compare_enlarging(model, real, prompts, 7, Sampling(noise_level=30))
    small = F.avg_pool2d(real, 2)
    assert torch.equal(images["small"], small)
    bicubic = F.interpolate(small, scale_factor=2, mode="bicubic")
    assert {name: metrics["bicubic"][name] for name in ("psnr", "ssim")} == reconstruction([(real, bicubic)])
    expected = model(prompts, seed=7, image=small, noise_level=30)
    for image, pixels in zip(expected, images["upscaler"], strict=True):
        rounded = (pixels.permute(1, 2, 0) * 127.5 + 127.5).round().numpy()
        assert np.abs(np.asarray(image, int) - rounded).max() <= 1
    assert metrics["upscaler"]["psnr"] == pytest.approx(reconstruction([(real, images["upscaler"])])["psnr"])


@pytest.mark.slow
@pytest.mark.usefixtures("two_noise_levels")
def test_a_run_keeps_its_figures_and_shows_its_images(
    root: Path,
    tmp_path: Path,
    small: list[str],
    vae: Autoencoder,
    call: Callable[..., str],
    random_model: Callable[..., LatentDiffusion],
) -> None:
    text_model = tmp_path / "text"
    random_model("text").save(text_model)
    run = tmp_path / "run"
    vae.save(tmp_path / "vae")
    keys = ["stage2.conditions=[text, upscale]", f"stage1.pretrained={tmp_path / 'vae'}", "stage2.steps=1"]
    call(train_ldm.main, "--config", root / "configs/tiny.yaml", *small, f"run.dir={run}", *keys)
    output = call(evaluate.main, run, "--count", 9)
    assert "9 held-out images, shrunk to 8 px\nbicubic    psnr " in output
    figures = json.loads((run / "evaluation.json").read_text())
    assert all(figures[name].keys() >= {"psnr", "ssim"} for name in ("bicubic", "upscaler"))
    assert "upscaler psnr" in (run / "README.md").read_text()
    assert Image.open(run / "enlarged.png").width > 4 * 128
    assert "measures a super-resolution model" in call(evaluate.main, run, "--model", text_model, status=2)
    before = (run / "evaluation.json").read_bytes()
    assert "upscaler" in call(evaluate.main, run, "--count", 9, "--noise-level", 100, "--sheet", tmp_path / "sheet.png")
    assert (run / "evaluation.json").read_bytes() == before
    assert (tmp_path / "sheet.png").exists()
