"""txt2img.py, img2img.py and inpaint.py on SDXL pipelines that diffusers builds and saves, against its own images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image
from sdxl import sdxl

from ldm.sampling.loop import initial_noise
from ldm.sampling.pipeline import LatentDiffusion
from scripts import img2img, inpaint, txt2img


@pytest.fixture(scope="module")
def sdxl_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdxl")
    sdxl(folder).save_pretrained(folder / "base")
    return folder / "base"


def txt2img_pixels(call: Callable[..., str], folder: Path, out: Path, *options: object) -> np.ndarray:
    call(txt2img.main, "--model", folder, "--seed", 5, "--precision", "no", "--steps", 4, *options, "--out", out)
    return np.asarray(Image.open(out)).astype(int)


@pytest.mark.parametrize("negative", [None, "blue"])
def test_sdxl_equals_diffusers(negative: str | None, sdxl_dir: Path, call: Callable[..., str], tmp_path: Path) -> None:
    width, height = 24, 40
    options = ["--prompt", "red heart", "--guidance", 3, "--size", f"{width}x{height}"]
    options += ["--negative", negative] if negative else []
    image = txt2img_pixels(call, sdxl_dir, tmp_path / "a.png", *options)
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_dir, add_watermarker=False)
    expected = pipe(
        "red heart",
        negative_prompt=negative,
        num_inference_steps=4,
        guidance_scale=3.0,
        width=width,
        height=height,
        latents=initial_noise((4, height // 2, width // 2), [5]),
    ).images[0]
    assert image.std() > 1
    assert np.abs(image - np.asarray(expected)).max() <= 1


def test_without_zeros_for_the_empty_prompt_its_encoding_is_the_unconditional_one(
    call: Callable[..., str], tmp_path: Path
) -> None:
    pipe = sdxl(tmp_path, force_zeros_for_empty_prompt=False)
    pipe.save_pretrained(tmp_path / "base")
    image = txt2img_pixels(call, tmp_path / "base", tmp_path / "a.png", "--prompt", "owl", "--guidance", 3)
    noise = initial_noise((4, 8, 8), [5])
    expected = pipe("owl", num_inference_steps=4, guidance_scale=3.0, width=16, height=16, latents=noise).images[0]
    assert np.abs(image - np.asarray(expected)).max() <= 1


def test_what_save_writes_is_an_sdxl_pipeline_of_the_same_weights(sdxl_dir: Path, tmp_path: Path) -> None:
    LatentDiffusion.load(sdxl_dir, "cpu").save(tmp_path / "saved")
    first, second = (StableDiffusionXLPipeline.from_pretrained(path) for path in (sdxl_dir, tmp_path / "saved"))
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        tensors = getattr(second, part).state_dict()
        assert all(torch.equal(tensor, tensors[name]) for name, tensor in getattr(first, part).state_dict().items())
    assert first.config["force_zeros_for_empty_prompt"] is second.config["force_zeros_for_empty_prompt"] is True


@pytest.mark.parametrize("part", ["text_encoder", "text_encoder_2"])
def test_a_pipeline_without_one_of_its_encoders_is_refused(
    part: str, sdxl_dir: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_dir, **{part: None})
    pipe.save_pretrained(tmp_path / "half")
    output = call(txt2img.main, "--model", tmp_path / "half", "--prompt", "a", "--out", tmp_path / "out", status=2)
    assert f"lacks its {part}; SDXL has two text encoders" in output
    assert output.count("\n") == 1


def test_a_refiner_is_refused_as_a_base_model(sdxl_dir: Path, call: Callable[..., str], tmp_path: Path) -> None:
    pipe = StableDiffusionXLPipeline.from_pretrained(sdxl_dir)
    parts = {name: part for name, part in pipe.components.items() if name != "text_encoder"}
    refiner = StableDiffusionXLImg2ImgPipeline(**parts, text_encoder=None, requires_aesthetics_score=True)
    refiner.save_pretrained(tmp_path / "refiner")
    output = call(txt2img.main, "--model", tmp_path / "refiner", "--prompt", "a", "--out", tmp_path / "out", status=2)
    assert "is a refiner, which finishes the images of another model; give the base model" in output


def test_img2img_and_inpaint_take_sdxl(sdxl_dir: Path, call: Callable[..., str], tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(tmp_path / "input.png")
    mask = np.zeros((16, 16), np.uint8)
    mask[4:10, 4:10] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    model = ("--model", sdxl_dir, "--prompt", "owl", "--seed", 5, "--precision", "no", "--steps", 4)
    source = ("--image", tmp_path / "input.png")
    call(txt2img.main, *model, "--out", tmp_path / "text.png")
    call(img2img.main, *model, *source, "--strength", 1, "--out", tmp_path / "changed.png")
    call(inpaint.main, *model, *source, "--mask", tmp_path / "mask.png", "--out", tmp_path / "completed.png")
    original, generated, changed, completed = (
        np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB")).astype(int)
        for name in ("input", "text", "changed", "completed")
    )
    assert np.abs(changed - generated).max() <= 1  # of an image at strength 1 nothing is left
    assert np.array_equal(completed[mask == 0], original[mask == 0])
    assert not np.array_equal(completed[mask > 0], original[mask > 0])
