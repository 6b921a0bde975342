"""upscale.py on small models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scripts import upscale

Call = Callable[..., str]
ModelDir = Callable[..., str]
NoiseImage = Callable[..., Path]
ReadPixels = Callable[[Path], np.ndarray]
HEART = ("--prompt", "red heart")


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (21, 13), (30, 4)])
def test_each_side_is_enlarged_by_the_models_factor(
    size: tuple[int, int],
    call: Call,
    model_dir: ModelDir,
    noise_image: NoiseImage,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    """The model was built for inputs of 8 × 8 pixels: larger ones are upscaled in tiles."""
    model = ("--model", model_dir("text", "upscale"), *HEART)
    call(upscale.main, *model, "--image", noise_image(*size), "--out", tmp_path / "a.png")
    assert read_pixels(tmp_path / "a.png").shape == (2 * size[1], 2 * size[0], 3)
    assert read_pixels(tmp_path / "a.png").std() > 1


def test_the_noise_level_changes_the_result(
    call: Call, model_dir: ModelDir, noise_image: NoiseImage, read_pixels: ReadPixels, tmp_path: Path
) -> None:
    model = ("--model", model_dir("text", "upscale"), *HEART)
    for level in (0, 300):
        out = tmp_path / f"{level}.png"
        call(upscale.main, *model, "--image", noise_image(8), "--noise-level", level, "--out", out)
    assert np.abs(read_pixels(tmp_path / "0.png") - read_pixels(tmp_path / "300.png")).max() > 1


def test_again_reproduces_an_image_bit_for_bit_from_the_same_input_only(
    check_again: Callable[..., None], model_dir: ModelDir, noise_image: NoiseImage
) -> None:
    check_again(upscale.main, model_dir("text", "upscale"), {"--image": noise_image(16)})


@pytest.mark.parametrize(
    ("conditions", "arguments", "message"),
    [
        (("text",), ("--image", "a.png"), "does not enlarge; train one"),
        (("text", "upscale"), (), "--image: none given; name the small image"),
        (("text", "upscale"), ("--image", "a.png", "--noise-level", 350), "--noise-level: 350; give 0 to 349"),
        (("text", "upscale"), ("--image", "a.png", "--size", 16), "unrecognized arguments: --size"),
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
    assert message in refused(upscale.main, "--model", model_dir(*conditions), *HEART, *arguments)
    assert set(input_dir.iterdir()) == before
