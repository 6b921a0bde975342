"""txt2img.py --upscaler on small models with random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.sampling import png_metadata
from ldm.sampling.cascade import Cascade
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import Interpolation, LatentDiffusion
from ldm.sampling.request import SamplingRequest
from scripts import txt2img, upscale

Call = Callable[..., str]
ModelDir = Callable[..., str]
PROMPTS = ("--prompt", "red heart", "a cat", "an owl")
EXACT = ("--precision", "no")


def png_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


def test_a_cascade_equals_its_two_commands_one_after_the_other(call: Call, model_dir: ModelDir, tmp_path: Path) -> None:
    base, upscaler = ("--model", model_dir("text")), model_dir("text", "upscale")
    options = ("--batch", 1, "--negative", "blue", "--size", "20x12", "--steps", 4, *EXACT)
    of_upscaler = ("--upscaler-noise-level", 70, "--upscaler-steps", 2, "--upscaler-guidance", 3)
    call(txt2img.main, *base, *PROMPTS, *options, "--upscaler", upscaler, *of_upscaler, "--out", tmp_path / "cascade")
    call(txt2img.main, *base, *PROMPTS, *options, "--out", tmp_path / "small")
    for number, (small, enlarged) in enumerate(
        zip(png_files(tmp_path / "small"), png_files(tmp_path / "cascade"), strict=True)
    ):
        model = ("--model", upscaler, "--prompt", PROMPTS[1 + number], "--seed", number, "--negative", "blue", *EXACT)
        options = ("--noise-level", 70, "--steps", 2, "--guidance", 3)
        call(upscale.main, *model, *options, "--image", small, "--out", tmp_path / "again.png")
        with Image.open(tmp_path / "again.png") as expected, Image.open(enlarged) as image:
            assert image.size == (40, 24)
            assert image.tobytes() == expected.tobytes()


def test_again_reproduces_an_image_of_a_cascade_bit_for_bit(call: Call, model_dir: ModelDir, tmp_path: Path) -> None:
    models = ("--model", model_dir("text"), "--upscaler", model_dir("text", "upscale"))
    call(txt2img.main, *models, *PROMPTS, "--batch", 2, "--between", 1, "--out", tmp_path / "all")
    original = png_files(tmp_path / "all")[3]
    call(txt2img.main, "--again", original, "--out", tmp_path / "again.png")
    with Image.open(tmp_path / "again.png") as again, Image.open(original) as image:
        assert again.tobytes() == image.tobytes()
    recipe = png_metadata.read(original)
    assert png_metadata.read(tmp_path / "again.png") == recipe
    assert [recipe[f"upscaler_{name}"] for name in ("steps", "guidance", "noise_level")] == [3, 2.0, 20]


def test_batches_do_not_change_which_image_is_enlarged(random_model: Callable[..., LatentDiffusion]) -> None:
    """Up to rounding, whose order depends on the batch."""
    options = Sampling(noise_level=5, guidance_scale=[1.0, 2.0, 3.0])
    cascade = Cascade(random_model("text"), random_model("text", "upscale"), options)
    toward = Interpolation(["a cat", "a cat", "an owl"], [7, 8, 9], [0.0, 0.5, 0.9])
    request = SamplingRequest(["red heart"], count=3, toward=toward)
    together, steps = cascade.generate(request), list[int]()
    apart = cascade.generate(request, batch=2, callback=lambda step: steps.append(step.total))
    assert [np.abs(np.subtract(a, b, dtype=int)).max() <= 1 for a, b in zip(together, apart, strict=True)] == [True] * 3
    assert len(steps) == 2 * (3 + 3)
    assert np.abs(np.subtract(together[0], together[2], dtype=int)).mean() > 3


@pytest.mark.parametrize(
    ("base", "upscaler", "options", "message"),
    [
        ("text", "text", (), "--upscaler: it enlarges no images; give one trained with"),
        ("", "text,upscale", ("--count", 2), "--upscaler: it reads text, and the first model none"),
        ("text", "", ("--upscaler-steps", 3), "--upscaler-steps: is for an upscaler, and there is none"),
        ("text", "text,upscale", ("--upscaler-noise-level", 350), "--upscaler-noise-level: 350; give 0 to 349"),
        ("text", "text,upscale", ("--upscaler-steps", 2000), "--upscaler-steps: 2000; "),
        ("text", "text,upscale", ("--animate", "a.gif"), "--animate: shows the steps of one model"),
        ("text", "", ("--upscaler", "runs/typo"), "--upscaler: can't load a pipeline from 'runs/typo'"),
        ("text,upscale", "text,upscale", (), "needs an image; use upscale.py"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(
    base: str,
    upscaler: str,
    options: tuple[object, ...],
    message: str,
    refused: Callable[..., str],
    model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    prompt = ("--prompt", "red heart") if "text" in base else ()
    second = ("--upscaler", model_dir(*upscaler.split(","))) if upscaler else ()
    model = model_dir(*filter(None, base.split(",")))
    assert message in refused(txt2img.main, "--model", model, *prompt, *second, *options)
    assert not list(tmp_path.iterdir())
