"""inpaint.py on small models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError
from scripts import inpaint

Call = Callable[..., str]
ModelDir = Callable[..., str]
NoiseImage = Callable[..., Path]
ReadPixels = Callable[[Path], np.ndarray]
HEART = ("--prompt", "red heart")


@pytest.fixture
def write_mask(tmp_path: Path) -> Callable[..., Path]:
    """Writes a mask that is white in the middle, where pixels are generated; `inverted`, black there."""

    def write(width: int, height: int, inverted: bool = False) -> Path:
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 4 * 3, width // 3 :] = 255
        mask[0, 0] = 255
        Image.fromarray(255 - mask if inverted else mask).save(tmp_path / "mask.png")
        return tmp_path / "mask.png"

    return write


@pytest.mark.parametrize("conditions", [("text",), ("text", "inpaint")])
@pytest.mark.parametrize("size", [(16, 16), (19, 13)])
@pytest.mark.parametrize("options", [(), ("--strength", 0.5, "--invert")], ids=str)
def test_pixels_outside_the_mask_are_unchanged(
    conditions: tuple[str, ...],
    size: tuple[int, int],
    options: tuple[object, ...],
    call: Call,
    model_dir: ModelDir,
    noise_image: NoiseImage,
    write_mask: Callable[..., Path],
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    call(
        inpaint.main,
        "--model",
        model_dir(*conditions),
        *HEART,
        "--image",
        noise_image(*size),
        *options,
        "--count",
        2,
        "--mask",
        write_mask(*size, inverted="--invert" in options),
        "--out",
        tmp_path / "out",
    )
    inside = read_pixels(write_mask(*size)) > 127
    for path in (tmp_path / "out").glob("*.png"):
        assert np.array_equal(read_pixels(path)[~inside], read_pixels(noise_image(*size))[~inside])
        assert (read_pixels(path)[inside] != read_pixels(noise_image(*size))[inside]).mean() > 0.9


@pytest.mark.parametrize("conditions", [("text",), ("text", "inpaint")])
def test_a_low_strength_stays_near_the_input_inside_the_mask(
    conditions: tuple[str, ...],
    call: Call,
    model_dir: ModelDir,
    noise_image: NoiseImage,
    write_mask: Callable[..., Path],
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    for strength in (0, 0.17, 1):  # no step, one step of six, all
        call(
            inpaint.main,
            "--model",
            model_dir(*conditions),
            *HEART,
            "--image",
            noise_image(16),
            "--mask",
            write_mask(16, 16),
            "--strength",
            strength,
            "--steps",
            6,
            "--out",
            tmp_path / f"{strength}.png",
        )
    unchanged, low, full = (read_pixels(tmp_path / f"{strength}.png") for strength in (0, 0.17, 1))
    assert 0 < np.abs(low - unchanged).mean() < np.abs(full - unchanged).mean()


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 255), (0, 200, 0)])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_strokes_on_a_transparent_mask_are_generated_and_the_rest_is_unchanged(
    colour: tuple[int, int, int],
    invert: bool,
    mode: str,
    call: Call,
    model_dir: ModelDir,
    noise_image: NoiseImage,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    strokes = np.zeros((16, 16, 4), np.uint8)
    strokes[4:9, 4:9] = (*(255 - np.array(colour) if invert else colour), 255)
    strokes[12:, 12:] = (0, 0, 0, 0) if invert else (255, 255, 255, 0)  # an eraser leaves colours behind
    mask = Image.fromarray(strokes)
    (mask if mode == "RGBA" else mask.quantize()).save(tmp_path / "mask.png")
    call(
        inpaint.main,
        "--model",
        model_dir("text"),
        *HEART,
        "--image",
        noise_image(16),
        "--mask",
        tmp_path / "mask.png",
        *(["--invert"] if invert else []),
        "--steps",
        2,
        "--out",
        tmp_path / "a.png",
    )
    inside = strokes[..., 3] > 0
    assert np.array_equal(read_pixels(tmp_path / "a.png")[~inside], read_pixels(noise_image(16))[~inside])
    assert (read_pixels(tmp_path / "a.png")[inside] != read_pixels(noise_image(16))[inside]).mean() > 0.9


@pytest.mark.parametrize(
    ("mask", "options", "message"),
    [
        (np.eye(16, dtype=np.uint8), (), "--mask: its values are 0 and 1 of 255"),
        (np.eye(16, dtype=np.uint8), ("--invert",), "--mask: its values are 0 and 1 of 255"),
        (np.eye(16, dtype=np.uint16), (), "it generates nothing: its brightest value is 0"),
        (np.zeros((16, 16), np.uint8), (), "paint what to generate white, or invert"),
        (np.full((16, 16, 3), 100, np.uint8), (), "its brightest value is 100 of 255"),
        (np.full((16, 16), 255, np.uint8), ("--invert",), "it generates nothing"),
        (np.full((16, 16, 4), (255, 255, 255, 0), np.uint8), (), "it generates nothing"),
    ],
)
def test_a_mask_that_generates_nothing_is_refused(
    mask: np.ndarray,
    options: tuple[str, ...],
    message: str,
    refused: Callable[..., str],
    model_dir: ModelDir,
    noise_image: NoiseImage,
    tmp_path: Path,
) -> None:
    Image.fromarray(mask).save(tmp_path / "mask.png")
    inputs = ("--image", noise_image(16), "--mask", tmp_path / "mask.png")
    assert message in refused(
        inpaint.main, "--model", model_dir("text"), *HEART, *inputs, *options, "--out", tmp_path / "a.png"
    )
    assert not (tmp_path / "a.png").exists()


def test_masks_as_pil_image_and_as_tensor_give_the_same_image(model_dir: ModelDir, noise_image: NoiseImage) -> None:
    model, image = LatentDiffusion.load(model_dir("text"), "cpu"), Image.open(noise_image(16))
    strokes = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    strokes.paste((0, 0, 255, 255), (2, 2, 9, 9))
    tensor = torch.zeros(1, 3, 16, 16)
    tensor[:, 2, 2:9, 2:9] = 1
    images = [model("a", image=image, mask=mask, num_inference_steps=2)[0] for mask in (strokes, tensor)]
    assert images[0].tobytes() == images[1].tobytes() != image.tobytes()
    for mask, message in ((tensor * 255, "from 0 to 255"), (tensor * 0, "nothing"), (tensor * float("nan"), "nan")):
        with pytest.raises(UserError, match=message):
            model("a", image=image, mask=mask)


def test_image_and_mask_are_resized_to_the_size_option(
    call: Call, model_dir: ModelDir, noise_image: NoiseImage, write_mask: Callable[..., Path], tmp_path: Path
) -> None:
    inputs = ("--image", noise_image(90, 70), "--mask", write_mask(90, 70), "--size", "18x14")
    call(inpaint.main, "--model", model_dir("text"), *HEART, *inputs, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (18, 14)


@pytest.mark.parametrize("conditions", [("text",), ("text", "inpaint")])
def test_again_reproduces_an_image_bit_for_bit_from_the_same_inputs_only(
    conditions: tuple[str, ...],
    check_again: Callable[..., None],
    model_dir: ModelDir,
    noise_image: NoiseImage,
    write_mask: Callable[..., Path],
) -> None:
    check_again(inpaint.main, model_dir(*conditions), {"--image": noise_image(16), "--mask": write_mask(16, 16)})


@pytest.mark.parametrize(
    ("conditions", "arguments", "message"),
    [
        (("text",), ("--image", "a.png"), "--image, --mask: both are needed"),
        (("text",), ("--mask", "a.png"), "--image, --mask: both are needed"),
        (("text",), ("--image", "a.png", "--mask", "b.png"), "--mask: 8 × 8 pixels, but the image has 16 ×"),
        (("text",), ("--image", "a.png", "--mask", "no.png"), "--mask: no.png: it is none of"),
        (("text",), ("--image", "big.png", "--mask", "big.png"), "trained on 16; give --size 16"),
        (("text",), ("--image", "a.png", "--mask", "a.png", "--strength", -1), "--strength: -1.0; give 0 to 1"),
        (("text",), ("--image", "a.png", "--mask", "a.png", "--size", "0"), "--size: '0'; give 512, or 640x512"),
        (("text", "upscale"), ("--image", "a.png", "--mask", "a.png"), "enlarges images"),
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
    assert message in refused(inpaint.main, "--model", model_dir(*conditions), *HEART, *arguments)
    assert set(input_dir.iterdir()) == before
