"""img2img.py, inpaint.py and upscale.py on small models with random weights."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.data.images import to_pil, to_tensor
from ldm.sampling import png_metadata
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError
from scripts import img2img, inpaint, txt2img, upscale

Call = Callable[..., str]
Saved = Callable[..., str]
Noisy = Callable[..., Path]
Pixels = Callable[[Path], np.ndarray]
EXACT = ("--precision", "no")
HEART = ("--prompt", "red heart")


@pytest.fixture
def hole(tmp_path: Path) -> Callable[..., Path]:
    """Writes a mask, white in its midst, where pictures are made; `inverted`, black there."""

    def write(width: int, height: int, inverted: bool = False) -> Path:
        mask = np.zeros((height, width), np.uint8)
        mask[height // 4 : height // 4 * 3, width // 3 :] = 255
        mask[0, 0] = 255
        Image.fromarray(255 - mask if inverted else mask).save(tmp_path / "mask.png")
        return tmp_path / "mask.png"

    return write


# ------------------------------------------------------------------------------------------------------ image to image


@pytest.mark.parametrize("conditions", [("text",), ()])
def test_strength_0_gives_what_the_autoencoder_rebuilds(
    conditions: tuple[str, ...], call: Call, saved: Saved, noisy: Noisy, pixels: Pixels, tmp_path: Path
) -> None:
    call(
        img2img.main,
        "--model",
        saved(*conditions),
        *(HEART if conditions else ()),
        "--image",
        noisy(16),
        "--strength",
        0,
        "--animate",
        tmp_path / "a.gif",
        "--out",
        tmp_path / "a.png",
    )
    vae = LatentDiffusion.load(saved(*conditions), "cpu").autoencoder
    (expected,) = to_pil(vae.decode(vae.encode(to_tensor(Image.open(noisy(16)))[None])))
    assert np.array_equal(pixels(tmp_path / "a.png"), np.asarray(expected))


@pytest.mark.parametrize("solver", ["ddim", "heun", "euler_a", "unipc"])
def test_strength_1_is_txt2img_and_less_lies_between(
    solver: str, call: Call, saved: Saved, noisy: Noisy, pixels: Pixels, tmp_path: Path
) -> None:
    model = ("--model", saved("text"), *HEART, "--seed", 3, "--solver", solver, "--steps", 6, *EXACT)
    call(txt2img.main, *model, "--out", tmp_path / "text.png")
    for share in (0, 0.17, 1):  # nothing, one step of six, all
        call(img2img.main, *model, "--image", noisy(16), "--strength", share, "--out", tmp_path / f"{share}.png")
    nothing, little, all_ = (pixels(tmp_path / f"{share}.png") for share in (0, 0.17, 1))
    assert np.abs(all_ - pixels(tmp_path / "text.png")).max() <= 1
    assert 0 < np.abs(little - nothing).mean() < np.abs(all_ - nothing).mean()


@pytest.mark.parametrize(
    ("given", "asked", "size"),
    [
        ((40, 20), (), (22, 12)),
        ((17, 17), (), (16, 16)),
        ((9, 300), (), (2, 92)),
        ((40, 20), ("--size", "12x18"), (12, 18)),
    ],
)
def test_a_picture_of_any_shape_is_brought_to_the_models_area(
    given: tuple[int, int],
    asked: tuple[str, ...],
    size: tuple[int, int],
    call: Call,
    saved: Saved,
    noisy: Noisy,
    tmp_path: Path,
) -> None:
    call(img2img.main, "--model", saved("text"), *HEART, "--image", noisy(*given), *asked, "--out", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == size


# ----------------------------------------------------------------------------------------------------------- inpainting


@pytest.mark.parametrize("conditions", [("text",), ("text", "inpaint")])
@pytest.mark.parametrize("size", [(16, 16), (19, 13)])
@pytest.mark.parametrize("more", [(), ("--strength", 0.5, "--invert")], ids=str)
def test_around_the_hole_the_picture_stays_as_it_was(
    conditions: tuple[str, ...],
    size: tuple[int, int],
    more: tuple[object, ...],
    call: Call,
    saved: Saved,
    noisy: Noisy,
    hole: Callable[..., Path],
    pixels: Pixels,
    tmp_path: Path,
) -> None:
    call(
        inpaint.main,
        "--model",
        saved(*conditions),
        *HEART,
        "--image",
        noisy(*size),
        *more,
        "--count",
        2,
        "--mask",
        hole(*size, inverted="--invert" in more),
        "--out",
        tmp_path / "out",
    )
    inside = pixels(hole(*size)) > 127
    for path in (tmp_path / "out").glob("*.png"):
        assert np.array_equal(pixels(path)[~inside], pixels(noisy(*size))[~inside])
        assert (pixels(path)[inside] != pixels(noisy(*size))[inside]).mean() > 0.9


@pytest.mark.parametrize("conditions", [("text",), ("text", "inpaint")])
def test_less_strength_keeps_more_of_what_is_in_the_hole(
    conditions: tuple[str, ...],
    call: Call,
    saved: Saved,
    noisy: Noisy,
    hole: Callable[..., Path],
    pixels: Pixels,
    tmp_path: Path,
) -> None:
    for share in (0, 0.17, 1):  # nothing, one step of six, all
        call(
            inpaint.main,
            "--model",
            saved(*conditions),
            *HEART,
            "--image",
            noisy(16),
            "--mask",
            hole(16, 16),
            "--strength",
            share,
            "--steps",
            6,
            "--out",
            tmp_path / f"{share}.png",
        )
    nothing, little, all_ = (pixels(tmp_path / f"{share}.png") for share in (0, 0.17, 1))
    assert 0 < np.abs(little - nothing).mean() < np.abs(all_ - nothing).mean()


@pytest.mark.parametrize("colour", [(255, 255, 255), (0, 0, 255), (0, 200, 0)])
@pytest.mark.parametrize("invert", [False, True])
@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_strokes_on_transparent_are_generated_and_the_rest_is_kept(
    colour: tuple[int, int, int],
    invert: bool,
    mode: str,
    call: Call,
    saved: Saved,
    noisy: Noisy,
    pixels: Pixels,
    tmp_path: Path,
) -> None:
    strokes = np.zeros((16, 16, 4), np.uint8)
    strokes[4:9, 4:9] = (*(255 - np.array(colour) if invert else colour), 255)
    strokes[12:, 12:] = (0, 0, 0, 0) if invert else (255, 255, 255, 0)  # an eraser leaves colours behind
    image = Image.fromarray(strokes)
    (image if mode == "RGBA" else image.quantize()).save(tmp_path / "mask.png")
    call(
        inpaint.main,
        "--model",
        saved("text"),
        *HEART,
        "--image",
        noisy(16),
        "--mask",
        tmp_path / "mask.png",
        *(["--invert"] if invert else []),
        "--steps",
        2,
        "--out",
        tmp_path / "a.png",
    )
    inside = strokes[..., 3] > 0
    assert np.array_equal(pixels(tmp_path / "a.png")[~inside], pixels(noisy(16))[~inside])
    assert (pixels(tmp_path / "a.png")[inside] != pixels(noisy(16))[inside]).mean() > 0.9


@pytest.mark.parametrize(
    ("mask", "more", "says"),
    [
        (np.eye(16, dtype=np.uint8), (), "its values are 0 and 1 of 255"),
        (np.eye(16, dtype=np.uint8), ("--invert",), "its values are 0 and 1 of 255"),
        (np.eye(16, dtype=np.uint16), (), "it generates nothing: its brightest value is 0"),
        (np.zeros((16, 16), np.uint8), (), "paint what to generate white, or invert"),
        (np.full((16, 16, 3), 100, np.uint8), (), "its brightest value is 100 of 255"),
        (np.full((16, 16), 255, np.uint8), ("--invert",), "it generates nothing"),
        (np.full((16, 16, 4), (255, 255, 255, 0), np.uint8), (), "it generates nothing"),
    ],
)
def test_a_mask_that_generates_nothing_is_refused(
    mask: np.ndarray, more: tuple[str, ...], says: str, call: Call, saved: Saved, noisy: Noisy, tmp_path: Path
) -> None:
    Image.fromarray(mask).save(tmp_path / "mask.png")
    assert says in refused(
        call,
        inpaint.main,
        "--model",
        saved("text"),
        *HEART,
        "--image",
        noisy(16),
        "--mask",
        tmp_path / "mask.png",
        *more,
        "--out",
        tmp_path / "a.png",
    )
    assert not (tmp_path / "a.png").exists()


def test_masks_of_python_are_read_alike(saved: Saved, noisy: Noisy) -> None:
    model, image = LatentDiffusion.load(saved("text"), "cpu"), Image.open(noisy(16))
    strokes = Image.new("RGBA", (16, 16), (255, 255, 255, 0))
    strokes.paste((0, 0, 255, 255), (2, 2, 9, 9))
    tensor = torch.zeros(1, 3, 16, 16)
    tensor[:, 2, 2:9, 2:9] = 1
    images = [model("a", image=image, mask=mask, num_inference_steps=2)[0] for mask in (strokes, tensor)]
    assert images[0].tobytes() == images[1].tobytes() != image.tobytes()
    for wrong, says in ((tensor * 255, "from 0 to 255"), (tensor * 0, "nothing"), (tensor * float("nan"), "nan")):
        with pytest.raises(UserError, match=says):
            model("a", image=image, mask=wrong)


def test_a_size_brings_picture_and_mask_to_it(
    call: Call, saved: Saved, noisy: Noisy, hole: Callable[..., Path], tmp_path: Path
) -> None:
    call(
        inpaint.main,
        "--model",
        saved("text"),
        *HEART,
        "--image",
        noisy(90, 70),
        "--mask",
        hole(90, 70),
        "--size",
        "18x14",
        "--out",
        tmp_path / "a.png",
    )
    with Image.open(tmp_path / "a.png") as opened:
        assert opened.size == (18, 14)


# ------------------------------------------------------------------------------------------------------------ upscaling


@pytest.mark.parametrize("size", [(8, 8), (7, 5), (21, 13), (30, 4)])
def test_an_enlarged_picture_has_the_models_factor_times_the_side(
    size: tuple[int, int], call: Call, saved: Saved, noisy: Noisy, pixels: Pixels, tmp_path: Path
) -> None:
    """The model knows squares of 8: larger ones are made in tiles."""
    call(
        upscale.main, "--model", saved("text", "upscale"), *HEART, "--image", noisy(*size), "--out", tmp_path / "a.png"
    )
    assert pixels(tmp_path / "a.png").shape == (2 * size[1], 2 * size[0], 3)
    assert pixels(tmp_path / "a.png").std() > 1


def test_noise_on_the_small_picture_matters(
    call: Call, saved: Saved, noisy: Noisy, pixels: Pixels, tmp_path: Path
) -> None:
    for level in (0, 300):
        call(
            upscale.main,
            "--model",
            saved("text", "upscale"),
            *HEART,
            "--image",
            noisy(8),
            "--noise-level",
            level,
            "--out",
            tmp_path / f"{level}.png",
        )
    assert np.abs(pixels(tmp_path / "0.png") - pixels(tmp_path / "300.png")).max() > 1


# ------------------------------------------------------------------------------------------------------ again, mistakes


MAINS = {
    "img2img": img2img.main,
    "inpaint": inpaint.main,
    "inpaint by a model of its own": inpaint.main,
    "upscale": upscale.main,
}
MODELS = {
    "img2img": ("text",),
    "inpaint": ("text",),
    "inpaint by a model of its own": ("text", "inpaint"),
    "upscale": ("text", "upscale"),
}


@pytest.mark.parametrize("name", MAINS)
def test_a_changed_picture_is_made_again_bit_for_bit_from_the_same_files_alone(
    name: str, call: Call, saved: Saved, noisy: Noisy, hole: Callable[..., Path], pixels: Pixels, tmp_path: Path
) -> None:
    files = {"--image": noisy(16)} | ({"--mask": hole(16, 16)} if name.startswith("inpaint") else {})
    given = [each for pair in files.items() for each in pair]
    call(
        MAINS[name],
        "--model",
        saved(*MODELS[name]),
        *HEART,
        "--count",
        5,
        "--batch",
        3,
        "--solver",
        "euler_a",
        *given,
        "--out",
        tmp_path / "all",
    )
    one, again = sorted((tmp_path / "all").glob("*.png"))[4], tmp_path / "again.png"
    call(MAINS[name], "--again", one, "--out", again)
    assert np.array_equal(pixels(again), pixels(one))
    assert png_metadata.read(again) == png_metadata.read(one)
    again.unlink()
    for option, path in files.items():
        kept = path.read_bytes()
        Image.new("RGB", (16, 16)).save(path)
        assert f"--again: {path} is not the input" in refused(call, MAINS[name], "--again", one, "--out", again)
        path.unlink()
        assert f"{option}: no file {path}" in refused(call, MAINS[name], "--again", one, "--out", again)
        (tmp_path / "moved.png").write_bytes(kept)
        call(MAINS[name], "--again", one, option, tmp_path / "moved.png", "--out", again)
        assert np.array_equal(pixels(again), pixels(one))
        again.unlink()
        path.write_bytes(kept)


def refused(call: Call, main: Callable[..., int], *arguments: object) -> str:
    """What a command says that can't be followed: one line."""
    said = call(main, *arguments, status=2)
    assert re.fullmatch(r"error: [^\n]+\n", said), said
    return said


@pytest.mark.parametrize(
    ("script", "conditions", "arguments", "says"),
    [
        (img2img, ("text",), (), "--image: none given"),
        (img2img, ("text",), ("--image", "none.png"), "--image: no file none.png"),
        (img2img, ("text",), ("--image", "no.png"), "--image: no.png: it is none of"),
        (img2img, ("text",), ("--image", "a.png", "--strength", 2), "strength: 2.0; give 0 to 1"),
        (img2img, ("text",), ("--image", "a.png", "--size", 15), "size: 15x15; this model makes"),
        (img2img, ("text",), ("--image", "a.png", "--solver", "lcm", "--spacing", "linspace"), "lcm has its own"),
        (img2img, ("text", "inpaint"), ("--image", "a.png"), "completes images; give a text-to-image model"),
        (img2img, ("text", "upscale"), ("--image", "a.png"), "enlarges images; give a text-to-image model"),
        (inpaint, ("text",), ("--image", "a.png"), "--image, --mask: both are needed"),
        (inpaint, ("text",), ("--mask", "a.png"), "--image, --mask: both are needed"),
        (inpaint, ("text",), ("--image", "a.png", "--mask", "b.png"), "--mask: 8 × 8 pixels, but the image has 16 ×"),
        (inpaint, ("text",), ("--image", "a.png", "--mask", "no.png"), "--mask: no.png: it is none of"),
        (inpaint, ("text",), ("--image", "big.png", "--mask", "big.png"), "trained on 16; give --size 16"),
        (inpaint, ("text",), ("--image", "a.png", "--mask", "a.png", "--strength", -1), "strength: -1.0; give 0 to 1"),
        (
            inpaint,
            ("text",),
            ("--image", "a.png", "--mask", "a.png", "--size", "0"),
            "--size: '0'; give 512, or 640x512",
        ),
        (inpaint, ("text", "upscale"), ("--image", "a.png", "--mask", "a.png"), "enlarges images"),
        (upscale, ("text",), ("--image", "a.png"), "does not enlarge; train one"),
        (upscale, ("text", "upscale"), (), "--image: none given; name the small image"),
        (upscale, ("text", "upscale"), ("--image", "a.png", "--noise-level", 350), "--noise-level: 350; give 0 to 349"),
        (upscale, ("text", "upscale"), ("--image", "a.png", "--size", 16), "unrecognized arguments: --size"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    script: object,
    conditions: tuple[str, ...],
    arguments: tuple[object, ...],
    says: str,
    call: Call,
    saved: Saved,
    noisy: Noisy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    noisy(16, name="a.png"), noisy(8, name="b.png"), noisy(65, name="big.png")
    (tmp_path / "no.png").write_text("no picture")
    before = set(tmp_path.iterdir())
    assert says in refused(call, script.main, "--model", saved(*conditions), *HEART, *arguments)
    assert set(tmp_path.iterdir()) == before
