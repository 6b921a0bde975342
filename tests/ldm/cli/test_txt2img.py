"""txt2img.py, and what all scripts that generate images share, on small models with random weights."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ScriptProcess
from PIL import Image, PngImagePlugin

from ldm.config.schema import ClassifierConfig
from ldm.diffusion.process import DiffusionProcess
from ldm.models.classifier import NoisyClassifier
from ldm.sampling import png_metadata
from ldm.sampling.pipeline import LatentDiffusion
from scripts import img2img, txt2img

Call = Callable[..., str]
ModelDir = Callable[..., str]
ReadPixels = Callable[[Path], np.ndarray]
EXACT = ("--precision", "no")


def png_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


# ------------------------------------------------------------------------------------------------- metadata and --again


@pytest.mark.parametrize(
    "options",
    [
        (),
        EXACT,
        ("--precision", "bf16", "--guidance", "1"),
        ("--solver", "euler_a"),
        ("--solver", "ddpm", "--steps", "4"),
        ("--solver", "ddim", "--eta", "1", "--negative", "blue"),
    ],
    ids=" ".join,
)
def test_again_reproduces_an_image_of_a_batch_bit_for_bit(
    options: tuple[str, ...], call: Call, model_dir: ModelDir, read_pixels: ReadPixels, tmp_path: Path
) -> None:
    prompts = ["red heart", "a cat"]
    call(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        *prompts,
        "--count",
        4,
        "--batch",
        3,
        *options,
        "--out",
        tmp_path / "all",
    )
    for number in (4, 7):  # in the middle of a batch, and in the last batch, which has two images
        original, again = png_files(tmp_path / "all")[number], tmp_path / f"{number}.png"
        call(txt2img.main, "--again", original, "--out", again)
        assert np.array_equal(read_pixels(again), read_pixels(original))
        assert png_metadata.read(again) == png_metadata.read(original)
    assert png_metadata.read(original)["row"] == [1, 2]
    assert read_pixels(original).std() > 5


def test_again_reproduces_an_interpolated_image_bit_for_bit(
    call: Call, model_dir: ModelDir, read_pixels: ReadPixels, tmp_path: Path
) -> None:
    call(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        "red heart",
        "a cat",
        "--between",
        3,
        "--batch",
        3,
        "--out",
        tmp_path / "all",
    )
    original = png_files(tmp_path / "all")[2]
    call(txt2img.main, "--again", original, "--out", tmp_path / "again.png")
    assert np.array_equal(read_pixels(tmp_path / "again.png"), read_pixels(original))
    assert png_metadata.read(original)["toward"] == ["a cat", 1, 0.5]


def test_again_reproduces_an_image_whose_recipe_has_options_without_effect(
    call: Call, model_dir: ModelDir, read_pixels: ReadPixels, tmp_path: Path
) -> None:
    """Such options are refused, but they once were not, and they changed nothing."""
    original, older = tmp_path / "original.png", tmp_path / "older.png"
    call(txt2img.main, "--model", model_dir(), "--out", original)
    recipe = png_metadata.read(original) | {"eta": 0.5, "negative": "blue", "classifier_scale": 3.0}
    png_metadata.save(Image.open(original), older, recipe)
    call(txt2img.main, "--again", older, "--out", tmp_path / "again.png")
    assert np.array_equal(read_pixels(tmp_path / "again.png"), read_pixels(original))
    assert png_metadata.read(tmp_path / "again.png") == recipe


def test_again_reproduces_a_truncated_prompt_and_can_animate_it(
    call: Call, model_dir: ModelDir, tmp_path: Path
) -> None:
    long = "a red heart " * 20
    call(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        long,
        "--count",
        3,
        "--cut-prompts",
        "--out",
        tmp_path / "all",
    )
    original = png_files(tmp_path / "all")[1]
    call(txt2img.main, "--again", original, "--out", tmp_path / "a.png", "--animate", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as animation, Image.open(tmp_path / "a.png") as image:
        assert animation.width < 2 * 128  # a single image, not its batch
        assert image.tobytes() == Image.open(original).tobytes()


def test_a_png_records_how_it_was_generated(call: Call, model_dir: ModelDir, tmp_path: Path) -> None:
    output = call(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        "ein Herz ♥",
        "--seed",
        7,
        "--solver",
        "dpm++",
        "--out",
        tmp_path / "a.png",
    )
    assert f"wrote {tmp_path / 'a.png'}" in output
    with Image.open(tmp_path / "a.png") as image:
        metadata = json.loads(image.info["ldm"])
    expected = {
        "version": 1,
        "script": "txt2img.py",
        "prompt": "ein Herz ♥",
        "label": None,
        "seed": 7,
        "toward": None,
        "steps": 3,
        "guidance": 2.0,
        "solver": "dpm++",
        "model": model_dir("text"),
        "size": None,
        "row": [0, 1],
        "torch": torch.__version__,
        "device": "cpu",
    }
    assert {name: metadata[name] for name in expected} == expected
    assert metadata["precision"] in ("no", "bf16")  # auto is resolved


def test_file_numbers_continue_in_a_folder_and_nothing_is_overwritten(
    call: Call, model_dir: ModelDir, tmp_path: Path
) -> None:
    def generate() -> list[Path]:
        call(txt2img.main, "--model", model_dir(), "--steps", 1, "--out", tmp_path / "new/out", "--count", 2)
        return png_files(tmp_path / "new/out")

    first = {path: path.read_bytes() for path in generate()}
    assert [path.name for path in first] == ["00000-seed-0.png", "00001-seed-1.png"]
    (tmp_path / "new/out/123456-seed-0.png").write_bytes(b"mine")
    paths = generate()
    assert [path.name for path in paths[2:]] == ["123456-seed-0.png", "123457-seed-0.png", "123458-seed-1.png"]
    assert paths[2].read_bytes() == b"mine"
    assert all(path.read_bytes() == data for path, data in first.items())


@pytest.mark.parametrize("prompt", ["𠀀" * 90, "♥ !", "../../a\\b", "x" * 300])
def test_any_prompt_gives_a_valid_file_name(prompt: str, call: Call, model_dir: ModelDir, tmp_path: Path) -> None:
    call(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        prompt,
        "--steps",
        1,
        "--cut-prompts",
        "--out",
        tmp_path / "out",
    )
    (path,) = png_files(tmp_path / "out")
    assert path.name.startswith("00000-")
    assert png_metadata.read(path)["prompt"] == prompt


def test_a_grid_shows_all_images(call: Call, model_dir: ModelDir, tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        call(
            txt2img.main,
            "--model",
            model_dir("class"),
            "--label",
            "cat",
            "dog",
            "--count",
            2,
            "--steps",
            1,
            "--out",
            tmp_path / "out",
            "--grid",
            tmp_path / f"grid.{suffix}",
        )
        with Image.open(tmp_path / f"grid.{suffix}") as grid:
            assert grid.width > 4 * 128
            assert grid.format == {"jpg": "JPEG"}.get(suffix, suffix.upper())


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_has_a_frame_per_step_of_the_first_batch_and_holds_the_last(
    suffix: str, call: Call, model_dir: ModelDir, tmp_path: Path
) -> None:
    animation = tmp_path / f"animation.{suffix}"
    call(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        "a",
        "b",
        "c",
        "--batch",
        2,
        "--steps",
        4,
        "--out",
        tmp_path / "out",
        "--animate",
        animation,
    )
    with Image.open(animation) as frames:
        assert 2 * 128 < frames.width < 3 * 128
        durations = []
        for i in range(frames.n_frames):
            frames.seek(i)
            frames.load()
            durations.append(frames.info["duration"])
    assert sum(durations) == 4 * 80 + 1500  # identical frames may be merged
    assert len(durations) >= 4


def test_an_mp4_has_the_same_length(call: Call, model_dir: ModelDir, tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    call(txt2img.main, "--model", model_dir(), "--out", tmp_path / "a.png", "--animate", tmp_path / "a.mp4")
    frames, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))
    assert frames == 3 + round(1500 / 80)
    assert seconds == pytest.approx(frames * 0.08, abs=0.05)


# -------------------------------------------------------------------------------------------- seeds, prompts and labels


def test_a_seed_gives_the_same_image_in_any_batch_and_order(
    call: Call, model_dir: ModelDir, read_pixels: ReadPixels, tmp_path: Path
) -> None:
    def generate(name: str, *options: object) -> list[np.ndarray]:
        call(txt2img.main, "--model", model_dir("text"), "--solver", "euler_a", *options, "--out", tmp_path / name)
        return [read_pixels(path) for path in png_files(tmp_path / name)]

    prompts = ("--prompt", "red heart", "a cat", "owl", "--seed", 3)
    together = generate("together", *prompts)
    for size in (1, 2):
        assert np.abs(np.subtract(generate(f"by {size}", *prompts, "--batch", size), together)).max() <= 1
    alone = generate("alone", "--prompt", "owl", "--seed", 5)[0]
    assert np.abs(alone - together[2]).max() <= 1
    assert np.abs(generate("other", "--prompt", "owl", "--seed", 6)[0] - alone).max() > 1


@pytest.mark.slow
def test_two_processes_generate_the_same_images_as_a_single_process(
    launch: Callable[..., ScriptProcess],
    finish: Callable[[ScriptProcess], str],
    call: Call,
    model_dir: ModelDir,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    model = ("--model", model_dir("text"), "--solver", "euler_a", "--batch", "2")
    (tmp_path / "prompts.txt").write_text("red heart\na cat\nowl\n")
    prompts = ("--prompts", tmp_path / "prompts.txt")
    several = launch(
        "scripts/txt2img.py",
        *model,
        *prompts,
        "--out",
        tmp_path / "several",
        "--grid",
        tmp_path / "grid.png",
        "--animate",
        tmp_path / "animation.gif",
        processes=2,
    )
    call(txt2img.main, *model, *prompts, "--out", tmp_path / "alone")
    assert f"3 images in {tmp_path / 'several'}" in finish(several)
    again = launch(
        "scripts/txt2img.py", "--again", png_files(tmp_path / "several")[2], "--out", tmp_path / "again", processes=2
    )
    expected = png_files(tmp_path / "alone")
    assert [path.name for path in png_files(tmp_path / "several")] == [path.name for path in expected]
    for path in expected:
        assert np.abs(read_pixels(tmp_path / "several" / path.name) - read_pixels(path)).max() <= 1
    assert (tmp_path / "grid.png").exists() and (tmp_path / "animation.gif").exists()
    finish(again)  # a single image for two processes
    (reproduced,) = png_files(tmp_path / "again")
    assert np.array_equal(read_pixels(reproduced), read_pixels(png_files(tmp_path / "several")[2]))


@pytest.mark.parametrize("source", ["file", "standard input"])
def test_prompts_come_from_a_file_or_standard_input(
    source: str, call: Call, model_dir: ModelDir, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "red heart\r\n\n  a cat \n"
    (tmp_path / "prompts.txt").write_text("\ufeff" + lines, "utf-8")  # Windows' byte order mark
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    call(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        "owl",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
        "--prompts",
        tmp_path / "prompts.txt" if source == "file" else "-",
    )
    records = [png_metadata.read(path) for path in png_files(tmp_path / "out")]
    assert [(record["prompt"], record["seed"]) for record in records] == [("owl", 0), ("red heart", 1), ("a cat", 2)]


@pytest.mark.parametrize(
    ("conditions", "options", "arguments"),
    [
        (("class",), ("--label", "dog", "cat"), {"labels": ["dog", "cat"]}),
        (("class",), ("--label", "dog", "--count", 2), {"labels": ["dog", "dog"]}),
        (("text", "class"), ("--prompt", "a", "b", "--label", "dog"), {"prompts": ["a", "b"], "labels": [1, 1]}),
        (("text", "class"), ("--prompt", "a", "b", "--label", "dog", "cat"), {"prompts": ["a", "b"], "labels": [1, 0]}),
        ((), ("--count", 2), {"count": 2}),
        ((), ("--count", 2, "--size", "24x16"), {"count": 2, "size": (24, 16)}),
    ],
)
def test_the_script_generates_the_same_images_as_the_pipeline_in_python(
    conditions: tuple[str, ...],
    options: tuple[object, ...],
    arguments: dict[str, object],
    call: Call,
    model_dir: ModelDir,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    call(txt2img.main, "--model", model_dir(*conditions), *options, "--seed", 4, *EXACT, "--out", tmp_path / "out")
    expected = LatentDiffusion.load(model_dir(*conditions), "cpu")(**arguments, seed=4)
    paths = png_files(tmp_path / "out")
    assert len(paths) == len(expected) == 2
    for path, image in zip(paths, expected, strict=True):
        assert np.abs(read_pixels(path) - np.asarray(image).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("conditions", "options"), [(("text",), ("--prompt", "red heart", "a cat")), ((), ("--count", 2))]
)
def test_an_interpolation_starts_and_ends_with_the_two_images(
    conditions: tuple[str, ...],
    options: tuple[object, ...],
    call: Call,
    model_dir: ModelDir,
    read_pixels: ReadPixels,
    tmp_path: Path,
) -> None:
    for name, between in (("ends", ()), ("path", ("--between", 2))):
        call(txt2img.main, "--model", model_dir(*conditions), *options, *between, *EXACT, "--out", tmp_path / name)
    ends, path = ([read_pixels(file) for file in png_files(tmp_path / name)] for name in ("ends", "path"))
    assert len(path) == 4
    assert np.abs(path[0] - ends[0]).max() <= 1
    assert np.abs(path[3] - ends[1]).max() <= 1
    distances = [np.abs(image - ends[0]).mean() for image in path]
    assert distances[0] < distances[1] < distances[2] < distances[3]


@pytest.mark.parametrize("solver", ["ddim", "heun", "euler_a"])
def test_the_callback_is_called_at_every_step(solver: str, model_dir: ModelDir) -> None:
    model, steps_seen = LatentDiffusion.load(model_dir("text"), "cpu"), []
    images = model(
        ["red heart", "a cat", "owl"], batch=2, num_inference_steps=3, solver=solver, callback=steps_seen.append
    )
    steps = 5 if solver == "heun" else 3  # model evaluations: Heun's last step is Euler's
    assert [step.number for step in steps_seen] == [*range(1, steps + 1)] * 2
    assert {step.total for step in steps_seen} == {steps}
    assert [len(step.x0) for step in steps_seen] == [2] * steps + [1] * steps
    if solver == "ddim":  # its last step returns its x_0
        last = model.to_images(steps_seen[-1].x0)[0]
        assert np.abs(np.asarray(last).astype(int) - np.asarray(images[2])).max() <= 1


# ------------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.slow
def test_autoguidance_by_the_model_itself_changes_nothing_and_by_an_earlier_checkpoint_does(
    tiny_run: Path, call: Call, read_pixels: ReadPixels, tmp_path: Path
) -> None:
    def generate(*options: object) -> np.ndarray:
        call(
            txt2img.main,
            "--model",
            tiny_run / "pipeline",
            "--prompt",
            "red heart",
            *EXACT,
            *options,
            "--out",
            tmp_path / "a.png",
        )
        return read_pixels(tmp_path / "a.png")

    unguided = generate("--guidance", 1)
    checkpoints = sorted((tiny_run / "stage2/checkpoints").iterdir())
    for same in (tiny_run / "pipeline", checkpoints[-1]):  # the pipeline has this one's EMA weights
        assert np.abs(generate("--guidance", 3, "--weaker", same) - unguided).max() <= 1
    assert np.abs(generate("--guidance", 3, "--weaker", checkpoints[0]) - unguided).max() > 1
    assert np.abs(generate("--guidance", 3) - unguided).max() > 1


@pytest.fixture
def classifier(model_dir: ModelDir, tmp_path: Path) -> Path:
    """The folder of a classifier with random weights, for the unconditional model."""
    torch.manual_seed(0)
    settings = ClassifierConfig(
        channels=(16, 16), layers=1, attention=(False, True), attention_head_dim=8, norm_num_groups=4
    )
    vae = LatentDiffusion.load(model_dir(), "cpu").autoencoder
    NoisyClassifier.of(settings, vae, DiffusionProcess("v", "cosine"), ["cat", "dog"]).save_pretrained(
        tmp_path / "classifier"
    )
    return tmp_path / "classifier"


def test_classifier_guidance_depends_on_the_label_and_scale_0_is_unguided(
    classifier: Path, call: Call, model_dir: ModelDir, read_pixels: ReadPixels, tmp_path: Path
) -> None:
    def generate(name: str, *options: object) -> np.ndarray:
        call(
            txt2img.main,
            "--model",
            model_dir(),
            "--solver",
            "ddim",
            "--steps",
            10,
            *EXACT,
            *options,
            "--out",
            tmp_path / f"{name}.png",
        )
        return read_pixels(tmp_path / f"{name}.png")

    def guided(label: str, scale: float) -> np.ndarray:
        return generate(label, "--classifier", classifier, "--label", label, "--classifier-scale", scale)

    unguided = generate("unguided")
    assert np.array_equal(guided("dog", 0), unguided)
    cat, dog = guided("cat", 30), guided("dog", 30)
    assert np.abs(cat - unguided).max() > 1
    assert np.abs(cat - dog).max() > 1
    assert np.array_equal(generate("again", "--again", tmp_path / "dog.png"), dog)


def test_a_classifier_works_with_an_autoencoder_in_bfloat16(classifier: Path, model_dir: ModelDir) -> None:
    model = LatentDiffusion.load(model_dir(), "cpu")
    before = model.autoencoder.encoder_fingerprint()
    model.autoencoder.bfloat16()  # as `optimize_for_inference` sets it on a GPU
    assert model.autoencoder.encoder_fingerprint() == before
    model(classifier=NoisyClassifier.load(classifier), labels="dog", num_inference_steps=1)
    pixel_model = LatentDiffusion.load(model_dir(pixels=True), "cpu")
    pixel_model.autoencoder.bfloat16()
    assert pixel_model(num_inference_steps=1)[0].size == (16, 16)


# ------------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("conditions", "arguments", "message"),
    [
        (("text",), ("--prompt", "a", "--solver", "magic"), "invalid choice: 'magic'"),
        (
            ("text",),
            ("--prompt", "a", "--size", "17"),
            "--size: 17x17; this model makes sides that are multiples of 2, 16x16",
        ),
        (("text",), ("--prompt", "a", "--size", "0"), "argument --size: '0'; give 512, or 640x512"),
        (("text",), ("--prompt", "a", "--size", "16x"), "give 512, or 640x512"),
        ((), ("--model", "none"), "--model: can't load a pipeline from 'none'"),
        ((), ("--model", ""), "--model: none given"),
        (("text",), (), "error: --prompt: an empty prompt"),
        (("text",), ("--prompt",), "--prompt: expected at least one argument"),
        (("text",), ("--prompt", "a", " "), "--prompt: empty"),
        (("text",), ("--prompts", "-"), "--prompts: no prompt in standard input"),
        (("text",), ("--prompts", "empty.txt"), "--prompts: no prompt in"),
        (("text",), ("--prompts", "none.txt"), "--prompts: can't read"),
        (("text",), ("--prompts", "bytes.txt"), "--prompts: can't read"),
        (("text",), ("--prompt", "a", "--label", "dog"), "--label: this model knows no classes"),
        (("class",), ("--label", "dgo"), "--label: no class 'dgo'; did you mean 'dog'?"),
        (("class",), (), "--label: none given; there are cat, dog, heart"),
        (("text", "class"), ("--prompt", "a", "--label", "dog", "cat"), "--label: 2 for 1 prompts"),
        ((), ("--prompt", "a"), "--prompt: this model was trained without text"),
        ((), ("--steps", 0), "error: --steps: 0; give 1 or more"),
        ((), ("--steps", 1001), "error: --steps: 1001; the model's chain has 1000"),
        ((), ("--count", 0), "--count: 0; give 1 or more"),
        ((), ("--batch", 0), "--batch: 0; give 1 or more"),
        ((), ("--seed", -1), "--seed: -1; give 0 or more"),
        ((), ("--seed", 2**63), "give 0 or more, below 2^63"),
        ((), ("--guidance", -1), "--guidance: -1.0; give 0 or more"),
        ((), ("--guidance", "nan"), "--guidance: nan; give 0 or more"),
        ((), ("--solver", "ddim", "--spacing", "karras"), "--spacing: ddim has no 'karras'"),
        ((), ("--eta", 0.5), "--eta: only ddim adds noise by it; leave it out"),
        ((), ("--negative", "blue"), "--negative: this model was trained without text"),
        ((), ("--classifier-scale", 2), "--classifier-scale: there is no classifier"),
        ((), ("--threshold", 0.9), "--threshold: is for pixels"),
        ((), ("--interval", 0.9, 0.1), "--interval: 0.9 to 0.1"),
        ((), ("--between", -1), "--between: -1; give 0 or more"),
        ((), ("--between", 1), "--between: needs two images"),
        ((), ("--count", 2, "--out", "x.png"), "x.png is one file for 2 images; give a folder"),
        (("text",), ("--prompt", "a", "b", "--out", "x.png"), "x.png is one file for 2 images; give a folder"),
        ((), ("--out", "x.jpg"), "x.jpg is no .png"),
        ((), ("--out", "none/x.png"), "--out: no folder"),
        ((), ("--out", "empty.txt"), "--out:"),
        ((), ("--out", "/dev/null/out"), "--out: can't write /dev/null/out"),
        ((), ("--grid", "none/x.png"), "--grid: no folder"),
        ((), ("--grid", "x.pdf"), "x.pdf is no .png, .jpg or .webp"),
        ((), ("--animate", "x.avi"), "--animate: x.avi is none of .gif, .webp, .mp4"),
        ((), ("--device", "gpu"), "--device: gpu:"),
        ((), ("--precision", "fp16"), "--precision: fp16 is for GPUs"),
        ((), ("--classifier", "none"), "--classifier: guides to a class; name it with --label"),
        ((), ("--classifier", "none", "--label", "dog"), "--classifier: can't load one from"),
        ((), ("--weaker", "none"), "--weaker: can't load a pipeline"),
        ((), ("--again", "none.png"), "--again: no file none.png"),
        ((), ("--again", "empty.txt"), "--again: can't read empty.txt"),
        ((), ("--again", "plain.png"), "--again: plain.png does not say how it was made"),
        (
            (),
            ("--again", "--again: what odd.png says of how it was made is damaged"),
            "--again: what odd.png says of how it was made is damaged",
        ),
        (("text", "inpaint"), ("--prompt", "a"), "needs an image; use inpaint.py"),
        (("text", "upscale"), ("--prompt", "a"), "needs an image; use upscale.py"),
    ],
)
def test_a_mistake_is_reported_in_one_line_and_nothing_is_written(
    conditions: tuple[str, ...],
    arguments: tuple[object, ...],
    message: str,
    refused: Callable[..., str],
    model_dir: ModelDir,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n \n"))
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    odd = PngImagePlugin.PngInfo()
    odd.add_itxt("ldm", "7")
    Image.new("RGB", (4, 4)).save(tmp_path / "odd.png", pnginfo=odd)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert message in refused(txt2img.main, "--model", model_dir(*conditions), *arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_too_long_prompt_is_refused_with_the_words_past_the_limit(
    refused: Callable[..., str], model_dir: ModelDir, tmp_path: Path
) -> None:
    long = "one two three four five six seven eight nine"
    model = ("--model", model_dir("text"), "--out", tmp_path / "out")
    error = refused(txt2img.main, *model, "--prompt", long)
    assert "--prompt: 'one two three" in error
    assert "8 tokens; ignored would be 'seven eight nine'" in error
    assert "--negative: 'one two" in refused(txt2img.main, *model, "--prompt", "a", "--negative", long)
    assert not (tmp_path / "out").exists()


def test_again_refuses_other_weights_and_other_scripts(
    call: Call,
    refused: Callable[..., str],
    model_dir: ModelDir,
    random_model: Callable[..., LatentDiffusion],
    tmp_path: Path,
) -> None:
    original = tmp_path / "original.png"
    call(txt2img.main, "--model", model_dir("text"), "--prompt", "a", "--out", original)
    for component in ("unet", "autoencoder", "text", "scheduler"):
        other = random_model("text")
        with torch.no_grad():
            if component == "unet":
                other.unet.conv_in.weight[0] += 1
            elif component == "autoencoder":
                other.autoencoder.vae.decoder.conv_in.weight[0] += 1
            elif component == "text":
                next(other.text.model.parameters())[5] += 1
            else:
                other.scheduler = type(other.scheduler).from_config(other.scheduler.config, solver_order=3)
        other.save(tmp_path / component)
        error = refused(txt2img.main, "--again", original, "--model", tmp_path / component, "--out", tmp_path / "x.png")
        assert "other weights than those that made it" in error, component
    assert "was made by txt2img.py; give it to that" in refused(img2img.main, "--again", original)
    assert not (tmp_path / "x.png").exists()


def test_folders_that_are_no_pipeline_and_pickled_weights_are_refused(
    refused: Callable[..., str], model_dir: ModelDir, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = LatentDiffusion.load(model_dir("text"), "cpu")
    model.autoencoder.save(tmp_path / "autoencoder")
    assert "can't load a pipeline" in refused(txt2img.main, "--model", tmp_path / "autoencoder", "--prompt", "a")
    model.save(tmp_path / "pickled")
    weights = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    torch.save(model.unet.state_dict(), weights.with_suffix(".bin"))
    damaged = weights.read_bytes()[:-100]
    weights.unlink()
    assert "safetensors" in refused(txt2img.main, "--model", tmp_path / "pickled", "--prompt", "a")
    assert not caplog.records  # diffusers' own log lines are suppressed
    weights.write_bytes(damaged)
    assert "can't load a pipeline" in refused(txt2img.main, "--model", tmp_path / "pickled", "--prompt", "a")
    index = tmp_path / "pickled/model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "MyOwnPipeline"))
    assert "is a MyOwnPipeline; known are StableDiffusionPipeline" in refused(
        txt2img.main, "--model", tmp_path / "pickled", "--prompt", "a"
    )


def test_autoguidance_by_a_model_of_another_shape_is_refused(
    refused: Callable[..., str], model_dir: ModelDir, tmp_path: Path
) -> None:
    error = refused(
        txt2img.main,
        "--model",
        model_dir("text"),
        "--prompt",
        "a",
        "--weaker",
        model_dir("text", "inpaint"),
        "--out",
        tmp_path / "out",
    )
    assert "--weaker" in error
    assert not (tmp_path / "out").exists()
