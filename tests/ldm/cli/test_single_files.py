"""txt2img.py on single files in the layouts of Stable Diffusion 1, 2 and XL."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from ldm.cli import export
from ldm.sampling.loop import initial_noise
from ldm.sampling.pipeline import LatentDiffusion
from scripts import txt2img


def pixels(call: Callable[..., str], out: Path, *options: object) -> np.ndarray:
    call(txt2img.main, "--prompt", "owl", "--seed", 5, "--precision", "no", "--steps", 3, *options, "--out", out)
    return np.asarray(Image.open(out)).astype(int)


@pytest.mark.parametrize("layout", [pytest.param("sd1", marks=pytest.mark.drill), "sd2", "sdxl"])
def test_folder_and_file_make_the_images_of_diffusers_in_three_sizes_and_again_remakes_them(
    layout: str, pipeline_dirs: dict[str, Path], call: Callable[..., str], tmp_path: Path
) -> None:
    folder, file = pipeline_dirs[layout], tmp_path / "model.safetensors"
    call(export.main, folder, "--to", "single-file", "--out", file)
    pipe = DiffusionPipeline.from_pretrained(folder)
    models = [LatentDiffusion.load(folder, "cpu"), LatentDiffusion.load(file, "cpu", str(folder))]
    for width, height in ((16, 16), (32, 16), (24, 40)):
        options = {"negative_prompt": "blue", "num_inference_steps": 3, "guidance_scale": 3.0}
        noise = initial_noise((4, height // 2, width // 2), [5])
        (expected,) = pipe("owl", width=width, height=height, latents=noise, **options).images
        assert expected.size == (width, height)
        assert np.std(expected) > 1
        for model in models:
            (image,) = model("owl", seed=5, size=(width, height), **options)
            assert np.abs(np.subtract(image, expected, dtype=int)).max() <= 1
    image = pixels(call, tmp_path / "file.png", "--model", file, "--base", folder)
    call(txt2img.main, "--again", tmp_path / "file.png", "--out", tmp_path / "again.png")
    assert np.array_equal(np.asarray(Image.open(tmp_path / "again.png")), image)


@pytest.fixture(scope="module")
def sd1_file(pipeline_dirs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("sd1") / "model.safetensors"
    export.write_single_file(LatentDiffusion.load(pipeline_dirs["sd1"], "cpu"), file)
    return file


@pytest.mark.parametrize(
    ("change", "base", "reason"),
    [
        ({"model.diffusion_model.out.2.bias": None}, "sd1", "it lacks weights"),
        ({"first_stage_model.encoder.conv_in.bias": None}, "sd1", "it lacks weights"),
        ({"model.diffusion_model.": None}, "sd1", "give a whole checkpoint of Stable Diffusion 1, 2 or XL"),
        ({}, "sdxl", "is it of the same family"),
        ({}, None, "give --base, a diffusers folder of the same family"),
    ],
)
def test_another_file_or_base_is_refused_in_a_line(
    change: dict[str, None],
    base: str | None,
    reason: str,
    sd1_file: Path,
    pipeline_dirs: dict[str, Path],
    call: Callable[..., str],
    tmp_path: Path,
) -> None:
    tensors = load_file(sd1_file)
    kept = {name: t for name, t in tensors.items() if not any(name.startswith(prefix) for prefix in change)}
    save_file(kept or {"a": torch.zeros(1)}, tmp_path / "changed.safetensors")
    arguments = ["--base", pipeline_dirs[base]] if base else []
    output = call(
        txt2img.main,
        "--model",
        tmp_path / "changed.safetensors",
        *arguments,
        "--prompt",
        "a",
        "--out",
        tmp_path / "out",
        status=2,
    )
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert reason in line


def test_a_base_of_a_folder_is_refused(
    pipeline_dirs: dict[str, Path], call: Callable[..., str], tmp_path: Path
) -> None:
    folder = pipeline_dirs["sd1"]
    arguments = ("--model", folder, "--base", folder, "--prompt", "a", "--out", tmp_path / "out")
    assert "--base: has no effect on" in call(txt2img.main, *arguments, status=2)
