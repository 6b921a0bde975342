"""img2img.py on small models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.data.images import to_pil, to_tensor
from ldm.sampling.pipeline import LatentDiffusion
from scripts import img2img, txt2img

Call = Callable[..., str]
ModelDir = Callable[..., str]
NoiseImage = Callable[..., Path]
ReadPixels = Callable[[Path], np.ndarray]
EXACT = ("--precision", "no")
HEART = ("--prompt", "red heart")


@pytest.mark.parametrize("conditions", [("text",), ()])
def test_strength_0_returns_the_autoencoders_reconstruction(
    conditions: tuple[str, ...],
    call: Call,
    model_dir: ModelDir,
    noise_image: NoiseImage,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    call(
        img2img.main,
        "--model",
        model_dir(*conditions),
        *(HEART if conditions else ()),
        "--image",
        noise_image(16),
        "--strength",
        0,
        "--animate",
        tmp_path / "a.gif",
        "--out",
        tmp_path / "a.png",
    )
    vae = LatentDiffusion.load(model_dir(*conditions), "cpu").autoencoder
    (expected,) = to_pil(vae.decode(vae.encode(to_tensor(Image.open(noise_image(16)))[None])))
    assert np.array_equal(read_pixels(tmp_path / "a.png"), np.asarray(expected))


@pytest.mark.parametrize("solver", ["ddim", "heun", "euler_a", "unipc"])
def test_strength_1_equals_txt2img_and_a_low_strength_stays_near_the_input(
    solver: str,
    call: Call,
    model_dir: ModelDir,
    noise_image: NoiseImage,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    model = ("--model", model_dir("text"), *HEART, "--seed", 3, "--solver", solver, "--steps", 6, *EXACT)
    call(txt2img.main, *model, "--out", tmp_path / "text.png")
    for strength in (0, 0.17, 1):  # no step, one step of six, all
        out = tmp_path / f"{strength}.png"
        call(img2img.main, *model, "--image", noise_image(16), "--strength", strength, "--out", out)
    unchanged, low, full = (read_pixels(tmp_path / f"{strength}.png") for strength in (0, 0.17, 1))
    assert np.abs(full - read_pixels(tmp_path / "text.png")).max() <= 1
    assert 0 < np.abs(low - unchanged).mean() < np.abs(full - unchanged).mean()


@pytest.mark.parametrize(
    ("input_size", "options", "size"),
    [
        ((40, 20), (), (22, 12)),
        ((17, 17), (), (16, 16)),
        ((9, 300), (), (2, 92)),
        ((40, 20), ("--size", "12x18"), (12, 18)),
    ],
)
def test_an_image_of_any_shape_is_resized_to_the_models_area(
    input_size: tuple[int, int],
    options: tuple[str, ...],
    size: tuple[int, int],
    call: Call,
    model_dir: ModelDir,
    noise_image: NoiseImage,
    tmp_path: Path,
) -> None:
    model = ("--model", model_dir("text"), *HEART)
    call(img2img.main, *model, "--image", noise_image(*input_size), *options, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == size


def test_again_reproduces_an_image_bit_for_bit_from_the_same_input_only(
    check_again: Callable[..., None], model_dir: ModelDir, noise_image: NoiseImage
) -> None:
    check_again(img2img.main, model_dir("text"), {"--image": noise_image(16)})


@pytest.mark.parametrize(
    ("conditions", "arguments", "message"),
    [
        (("text",), (), "--image: none given"),
        (("text",), ("--image", "none.png"), "--image: no file none.png"),
        (("text",), ("--image", "no.png"), "--image: no.png: it is none of"),
        (("text",), ("--image", "a.png", "--strength", 2), "--strength: 2.0; give 0 to 1"),
        (("text",), ("--image", "a.png", "--size", 15), "size: 15x15; this model makes"),
        (("text",), ("--image", "a.png", "--solver", "lcm", "--spacing", "linspace"), "--spacing: lcm has its own"),
        (("text", "inpaint"), ("--image", "a.png"), "completes images; give a text-to-image model"),
        (("text", "upscale"), ("--image", "a.png"), "enlarges images; give a text-to-image model"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(
    conditions: tuple[str, ...],
    arguments: tuple[object, ...],
    message: str,
    refused: Callable[..., str],
    model_dir: ModelDir,
    input_dir: Path,
) -> None:
    before = set(input_dir.iterdir())
    assert message in refused(img2img.main, "--model", model_dir(*conditions), *HEART, *arguments)
    assert set(input_dir.iterdir()) == before
