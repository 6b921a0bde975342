"""txt2img.py, and what it shares with the other scripts that make pictures, on small models with random weights."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Process
from PIL import Image, PngImagePlugin

from ldm.config.schema import ClassifierConfig
from ldm.diffusion.process import DiffusionProcess
from ldm.models.classifier import NoisyClassifier
from ldm.sampling import png_metadata
from ldm.sampling.pipeline import LatentDiffusion
from scripts import img2img, txt2img

Call = Callable[..., str]
Saved = Callable[..., str]
Pixels = Callable[[Path], np.ndarray]
EXACT = ("--precision", "no")


def made(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.png"))


# -------------------------------------------------------------------------------------------- what is kept of a picture


@pytest.mark.parametrize(
    "way",
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
def test_a_picture_out_of_a_batch_is_made_again_bit_for_bit(
    way: tuple[str, ...], call: Call, saved: Saved, pixels: Pixels, tmp_path: Path
) -> None:
    prompts = ["red heart", "a cat"]
    call(
        txt2img.main,
        "--model",
        saved("text"),
        "--prompt",
        *prompts,
        "--count",
        4,
        "--batch",
        3,
        *way,
        "--out",
        tmp_path / "all",
    )
    for number in (4, 7):  # from the midst of a batch, and of the last one, which has two
        one, again = made(tmp_path / "all")[number], tmp_path / f"{number}.png"
        call(txt2img.main, "--again", one, "--out", again)
        assert np.array_equal(pixels(again), pixels(one))
        assert png_metadata.read(again) == png_metadata.read(one)
    assert png_metadata.read(one)["row"] == [1, 2]
    assert pixels(one).std() > 5


def test_a_picture_between_two_prompts_is_made_again_bit_for_bit(
    call: Call, saved: Saved, pixels: Pixels, tmp_path: Path
) -> None:
    call(
        txt2img.main,
        "--model",
        saved("text"),
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
    one = made(tmp_path / "all")[2]
    call(txt2img.main, "--again", one, "--out", tmp_path / "again.png")
    assert np.array_equal(pixels(tmp_path / "again.png"), pixels(one))
    assert png_metadata.read(one)["toward"] == ["a cat", 1, 0.5]


def test_a_cut_prompt_is_made_again_and_can_be_watched(call: Call, saved: Saved, tmp_path: Path) -> None:
    long = "a red heart " * 20
    call(
        txt2img.main,
        "--model",
        saved("text"),
        "--prompt",
        long,
        "--count",
        3,
        "--cut-prompts",
        "--out",
        tmp_path / "all",
    )
    one = made(tmp_path / "all")[1]
    call(txt2img.main, "--again", one, "--out", tmp_path / "a.png", "--animate", tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as film, Image.open(tmp_path / "a.png") as picture:
        assert film.width < 2 * 128  # one picture, not its batch
        assert picture.tobytes() == Image.open(one).tobytes()


def test_a_picture_tells_how_it_was_made(call: Call, saved: Saved, tmp_path: Path) -> None:
    said = call(
        txt2img.main,
        "--model",
        saved("text"),
        "--prompt",
        "ein Herz ♥",
        "--seed",
        7,
        "--solver",
        "dpm++",
        "--out",
        tmp_path / "a.png",
    )
    assert f"wrote {tmp_path / 'a.png'}" in said
    with Image.open(tmp_path / "a.png") as opened:
        kept = json.loads(opened.info["ldm"])
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
        "model": saved("text"),
        "size": None,
        "row": [0, 1],
        "torch": torch.__version__,
        "device": "cpu",
    }
    assert {name: kept[name] for name in expected} == expected
    assert kept["precision"] in ("no", "bf16")  # what auto stood for


def test_numbers_go_on_in_a_folder_and_nothing_is_overwritten(call: Call, saved: Saved, tmp_path: Path) -> None:
    def draw() -> list[Path]:
        call(txt2img.main, "--model", saved(), "--steps", 1, "--out", tmp_path / "new/out", "--count", 2)
        return made(tmp_path / "new/out")

    first = {path: path.read_bytes() for path in draw()}
    assert [path.name for path in first] == ["00000-seed-0.png", "00001-seed-1.png"]
    (tmp_path / "new/out/123456-seed-0.png").write_bytes(b"mine")
    found = draw()
    assert [path.name for path in found[2:]] == ["123456-seed-0.png", "123457-seed-0.png", "123458-seed-1.png"]
    assert found[2].read_bytes() == b"mine"
    assert all(path.read_bytes() == data for path, data in first.items())


@pytest.mark.parametrize("prompt", ["𠀀" * 90, "♥ !", "../../a\\b", "x" * 300])
def test_any_prompt_names_a_file(prompt: str, call: Call, saved: Saved, tmp_path: Path) -> None:
    call(
        txt2img.main,
        "--model",
        saved("text"),
        "--prompt",
        prompt,
        "--steps",
        1,
        "--cut-prompts",
        "--out",
        tmp_path / "out",
    )
    (found,) = made(tmp_path / "out")
    assert found.name.startswith("00000-")
    assert png_metadata.read(found)["prompt"] == prompt


def test_a_sheet_shows_all_pictures(call: Call, saved: Saved, tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "webp"):
        call(
            txt2img.main,
            "--model",
            saved("class"),
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
            tmp_path / f"sheet.{suffix}",
        )
        with Image.open(tmp_path / f"sheet.{suffix}") as sheet:
            assert sheet.width > 4 * 128
            assert sheet.format == {"jpg": "JPEG"}.get(suffix, suffix.upper())


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_lasts_a_frame_a_step_of_the_first_batch_and_ends_on_its_pictures(
    suffix: str, call: Call, saved: Saved, tmp_path: Path
) -> None:
    film = tmp_path / f"film.{suffix}"
    call(
        txt2img.main,
        "--model",
        saved("text"),
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
        film,
    )
    with Image.open(film) as opened:
        assert 2 * 128 < opened.width < 3 * 128
        times = []
        for i in range(opened.n_frames):
            opened.seek(i)
            opened.load()
            times.append(opened.info["duration"])
    assert sum(times) == 4 * 80 + 1500  # frames that are alike may be one
    assert len(times) >= 4


def test_a_film_lasts_as_long(call: Call, saved: Saved, tmp_path: Path) -> None:
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    call(txt2img.main, "--model", saved(), "--out", tmp_path / "a.png", "--animate", tmp_path / "a.mp4")
    frames, seconds = ffmpeg.count_frames_and_secs(str(tmp_path / "a.mp4"))
    assert frames == 3 + round(1500 / 80)
    assert seconds == pytest.approx(frames * 0.08, abs=0.05)


# ---------------------------------------------------------------------------------------------------- what is asked for


def test_a_seed_means_the_same_picture_in_any_batch_and_order(
    call: Call, saved: Saved, pixels: Pixels, tmp_path: Path
) -> None:
    def draw(name: str, *more: object) -> list[np.ndarray]:
        call(txt2img.main, "--model", saved("text"), "--solver", "euler_a", *more, "--out", tmp_path / name)
        return [pixels(path) for path in made(tmp_path / name)]

    three = ("--prompt", "red heart", "a cat", "owl", "--seed", 3)
    together = draw("together", *three)
    for size in (1, 2):
        assert np.abs(np.subtract(draw(f"by {size}", *three, "--batch", size), together)).max() <= 1
    alone = draw("alone", "--prompt", "owl", "--seed", 5)[0]
    assert np.abs(alone - together[2]).max() <= 1
    assert np.abs(draw("other", "--prompt", "owl", "--seed", 6)[0] - alone).max() > 1


@pytest.mark.slow
def test_two_processes_make_what_one_makes(
    launch: Callable[..., Process],
    finish: Callable[[Process], str],
    call: Call,
    saved: Saved,
    pixels: Pixels,
    tmp_path: Path,
) -> None:
    model = ("--model", saved("text"), "--solver", "euler_a", "--batch", "2")
    (tmp_path / "prompts.txt").write_text("red heart\na cat\nowl\n")
    three = ("--prompts", tmp_path / "prompts.txt")
    several = launch(
        "scripts/txt2img.py",
        *model,
        *three,
        "--out",
        tmp_path / "several",
        "--grid",
        tmp_path / "sheet.png",
        "--animate",
        tmp_path / "film.gif",
        processes=2,
    )
    call(txt2img.main, *model, *three, "--out", tmp_path / "alone")
    assert f"3 images in {tmp_path / 'several'}" in finish(several)
    again = launch(
        "scripts/txt2img.py", "--again", made(tmp_path / "several")[2], "--out", tmp_path / "again", processes=2
    )
    expected = made(tmp_path / "alone")
    assert [path.name for path in made(tmp_path / "several")] == [path.name for path in expected]
    for path in expected:
        assert np.abs(pixels(tmp_path / "several" / path.name) - pixels(path)).max() <= 1
    assert (tmp_path / "sheet.png").exists() and (tmp_path / "film.gif").exists()
    finish(again)  # a picture for two processes
    (remade,) = made(tmp_path / "again")
    assert np.array_equal(pixels(remade), pixels(made(tmp_path / "several")[2]))


@pytest.mark.parametrize("named", ["file", "standard input"])
def test_prompts_come_from_a_file_or_standard_input(
    named: str, call: Call, saved: Saved, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = "red heart\r\n\n  a cat \n"
    (tmp_path / "prompts.txt").write_text("\ufeff" + lines, "utf-8")  # as Windows begins files
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    call(
        txt2img.main,
        "--model",
        saved("text"),
        "--prompt",
        "owl",
        "--steps",
        1,
        "--out",
        tmp_path / "out",
        "--prompts",
        tmp_path / "prompts.txt" if named == "file" else "-",
    )
    found = [png_metadata.read(path) for path in made(tmp_path / "out")]
    assert [(each["prompt"], each["seed"]) for each in found] == [("owl", 0), ("red heart", 1), ("a cat", 2)]


@pytest.mark.parametrize(
    ("conditions", "asked", "same"),
    [
        (("class",), ("--label", "dog", "cat"), {"labels": ["dog", "cat"]}),
        (("class",), ("--label", "dog", "--count", 2), {"labels": ["dog", "dog"]}),
        (("text", "class"), ("--prompt", "a", "b", "--label", "dog"), {"prompts": ["a", "b"], "labels": [1, 1]}),
        (("text", "class"), ("--prompt", "a", "b", "--label", "dog", "cat"), {"prompts": ["a", "b"], "labels": [1, 0]}),
        ((), ("--count", 2), {"count": 2}),
        ((), ("--count", 2, "--size", "24x16"), {"count": 2, "size": (24, 16)}),
    ],
)
def test_labels_prompts_or_nothing_make_what_a_call_makes(
    conditions: tuple[str, ...],
    asked: tuple[object, ...],
    same: dict[str, object],
    call: Call,
    saved: Saved,
    pixels: Pixels,
    tmp_path: Path,
) -> None:
    call(txt2img.main, "--model", saved(*conditions), *asked, "--seed", 4, *EXACT, "--out", tmp_path / "out")
    expected = LatentDiffusion.load(saved(*conditions), "cpu")(**same, seed=4)
    found = made(tmp_path / "out")
    assert len(found) == len(expected) == 2
    for path, picture in zip(found, expected, strict=True):
        assert np.abs(pixels(path) - np.asarray(picture).astype(int)).max() <= 1


@pytest.mark.parametrize(
    ("conditions", "asked"), [(("text",), ("--prompt", "red heart", "a cat")), ((), ("--count", 2))]
)
def test_between_two_pictures_ends_are_these(
    conditions: tuple[str, ...], asked: tuple[object, ...], call: Call, saved: Saved, pixels: Pixels, tmp_path: Path
) -> None:
    for name, more in (("ends", ()), ("way", ("--between", 2))):
        call(txt2img.main, "--model", saved(*conditions), *asked, *more, *EXACT, "--out", tmp_path / name)
    ends, way = ([pixels(path) for path in made(tmp_path / name)] for name in ("ends", "way"))
    assert len(way) == 4
    assert np.abs(way[0] - ends[0]).max() <= 1
    assert np.abs(way[3] - ends[1]).max() <= 1
    far = [np.abs(each - ends[0]).mean() for each in way]
    assert far[0] < far[1] < far[2] < far[3]


@pytest.mark.parametrize("solver", ["ddim", "heun", "euler_a"])
def test_told_hears_every_step(solver: str, saved: Saved) -> None:
    model, seen_steps = LatentDiffusion.load(saved("text"), "cpu"), []
    pictures = model(
        ["red heart", "a cat", "owl"], batch=2, num_inference_steps=3, solver=solver, callback=seen_steps.append
    )
    steps = 5 if solver == "heun" else 3  # evaluations: the last of a second order is one of first order
    assert [step.number for step in seen_steps] == [*range(1, steps + 1)] * 2
    assert {step.total for step in seen_steps} == {steps}
    assert [len(step.x0) for step in seen_steps] == [2] * steps + [1] * steps
    if solver == "ddim":  # whose last step is its x_0
        last = model.to_images(seen_steps[-1].x0)[0]
        assert np.abs(np.asarray(last).astype(int) - np.asarray(pictures[2])).max() <= 1


# ------------------------------------------------------------------------------------------------------------- guidance


@pytest.mark.slow
def test_guided_away_from_itself_is_not_guided_and_from_an_earlier_checkpoint_is(
    tiny_run: Path, call: Call, pixels: Pixels, tmp_path: Path
) -> None:
    def draw(*more: object) -> np.ndarray:
        call(
            txt2img.main,
            "--model",
            tiny_run / "pipeline",
            "--prompt",
            "red heart",
            *EXACT,
            *more,
            "--out",
            tmp_path / "a.png",
        )
        return pixels(tmp_path / "a.png")

    free = draw("--guidance", 1)
    checkpoints = sorted((tiny_run / "stage2/checkpoints").iterdir())
    for same in (tiny_run / "pipeline", checkpoints[-1]):  # whose averages the pipeline is
        assert np.abs(draw("--guidance", 3, "--weaker", same) - free).max() <= 1
    assert np.abs(draw("--guidance", 3, "--weaker", checkpoints[0]) - free).max() > 1
    assert np.abs(draw("--guidance", 3) - free).max() > 1


@pytest.fixture
def classifier(saved: Saved, tmp_path: Path) -> Path:
    """The folder of one with random weights for the model that is told nothing."""
    torch.manual_seed(0)
    settings = ClassifierConfig(
        channels=(16, 16), layers=1, attention=(False, True), attention_head_dim=8, norm_num_groups=4
    )
    vae = LatentDiffusion.load(saved(), "cpu").autoencoder
    NoisyClassifier.of(settings, vae, DiffusionProcess("v", "cosine"), ["cat", "dog"]).save_pretrained(
        tmp_path / "classifier"
    )
    return tmp_path / "classifier"


def test_a_classifier_pulls_to_its_label(
    classifier: Path, call: Call, saved: Saved, pixels: Pixels, tmp_path: Path
) -> None:
    def draw(name: str, *more: object) -> np.ndarray:
        call(
            txt2img.main,
            "--model",
            saved(),
            "--solver",
            "ddim",
            "--steps",
            10,
            *EXACT,
            *more,
            "--out",
            tmp_path / f"{name}.png",
        )
        return pixels(tmp_path / f"{name}.png")

    def pulled(label: str, scale: float) -> np.ndarray:
        return draw(label, "--classifier", classifier, "--label", label, "--classifier-scale", scale)

    free = draw("free")
    assert np.array_equal(pulled("dog", 0), free)
    cat, dog = pulled("cat", 30), pulled("dog", 30)
    assert np.abs(cat - free).max() > 1
    assert np.abs(cat - dog).max() > 1
    assert np.array_equal(draw("again", "--again", tmp_path / "dog.png"), dog)


def test_a_classifier_fits_a_model_whose_autoencoder_computes_in_bfloat16(classifier: Path, saved: Saved) -> None:
    model = LatentDiffusion.load(saved(), "cpu")
    before = model.autoencoder.encoder_fingerprint()
    model.autoencoder.bfloat16()  # as `optimize_for_inference` asks of it on a GPU
    assert model.autoencoder.encoder_fingerprint() == before
    model(classifier=NoisyClassifier.load(classifier), labels="dog", num_inference_steps=1)
    pixels = LatentDiffusion.load(saved(pixels=True), "cpu")
    pixels.autoencoder.bfloat16()
    assert pixels(num_inference_steps=1)[0].size == (16, 16)


# ------------------------------------------------------------------------------------------------------------- mistakes


def refused(call: Call, main: Callable[..., int], *arguments: object) -> str:
    """What a command says that can't be followed: one line."""
    said = call(main, *arguments, status=2)
    assert re.fullmatch(r"error: [^\n]+\n", said), said
    return said


@pytest.mark.parametrize(
    ("conditions", "arguments", "says"),
    [
        (("text",), ("--prompt", "a", "--solver", "magic"), "invalid choice: 'magic'"),
        (("text",), ("--prompt", "a", "--size", "17"), "17x17; this model makes sides that are multiples of 2, 16x16"),
        (("text",), ("--prompt", "a", "--size", "0"), "argument --size: '0'; give 512, or 640x512"),
        (("text",), ("--prompt", "a", "--size", "16x"), "give 512, or 640x512"),
        ((), ("--model", "none"), "--model: can't load a pipeline from 'none'"),
        ((), ("--model", ""), "--model: none given"),
        (("text",), (), "prompt: an empty prompt"),
        (("text",), ("--prompt",), "--prompt: expected at least one argument"),
        (("text",), ("--prompt", "a", " "), "--prompt: empty"),
        (("text",), ("--prompts", "-"), "--prompts: no prompt in standard input"),
        (("text",), ("--prompts", "empty.txt"), "--prompts: no prompt in"),
        (("text",), ("--prompts", "none.txt"), "--prompts: can't read"),
        (("text",), ("--prompts", "bytes.txt"), "--prompts: can't read"),
        (("text",), ("--prompt", "a", "--label", "dog"), "labels: this model knows no classes"),
        (("class",), ("--label", "dgo"), "labels: no class 'dgo'; did you mean 'dog'?"),
        (("class",), (), "labels: none given; there are cat, dog, heart"),
        (("text", "class"), ("--prompt", "a", "--label", "dog", "cat"), "--label: 2 for 1 prompts"),
        ((), ("--prompt", "a"), "this model was trained without text"),
        ((), ("--steps", 0), "steps: 0; give 1 or more"),
        ((), ("--steps", 1001), "steps: 1001; the model's chain has 1000"),
        ((), ("--count", 0), "--count: 0; give 1 or more"),
        ((), ("--batch", 0), "--batch: 0; give 1 or more"),
        ((), ("--seed", -1), "--seed: -1; give 0 or more"),
        ((), ("--seed", 2**63), "give 0 or more, below 2^63"),
        ((), ("--guidance", -1), "guidance: -1.0; give 0 or more"),
        ((), ("--guidance", "nan"), "guidance: nan; give 0 or more"),
        ((), ("--solver", "ddim", "--spacing", "karras"), "spacing: ddim has no 'karras'"),
        ((), ("--threshold", 0.9), "threshold: is for pixels"),
        ((), ("--interval", 0.9, 0.1), "interval: 0.9 to 0.1"),
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
        ((), ("--animate", "x.avi"), "x.avi is none of .gif, .webp, .mp4"),
        ((), ("--device", "gpu"), "--device: gpu:"),
        ((), ("--precision", "fp16"), "precision: fp16 is for GPUs"),
        ((), ("--classifier", "none"), "--classifier: guides to a class; name it with --label"),
        ((), ("--classifier", "none", "--label", "dog"), "classifier: can't load one from"),
        ((), ("--weaker", "none"), "--weaker: can't load a pipeline"),
        ((), ("--again", "none.png"), "--again: no file none.png"),
        ((), ("--again", "empty.txt"), "--again: can't read empty.txt"),
        ((), ("--again", "plain.png"), "plain.png does not say how it was made"),
        ((), ("--again", "odd.png"), "odd.png"),
        (("text", "inpaint"), ("--prompt", "a"), "needs an image; use inpaint.py"),
        (("text", "upscale"), ("--prompt", "a"), "needs an image; use upscale.py"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(
    conditions: tuple[str, ...],
    arguments: tuple[object, ...],
    says: str,
    call: Call,
    saved: Saved,
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
    assert says in refused(call, txt2img.main, "--model", saved(*conditions), *arguments)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_words_that_would_not_be_read_are_shown(call: Call, saved: Saved, tmp_path: Path) -> None:
    long = "one two three four five six seven eight nine"
    model = ("--model", saved("text"), "--out", tmp_path / "out")
    said = refused(call, txt2img.main, *model, "--prompt", long)
    assert "--prompt: 'one two three" in said
    assert "8 tokens; ignored would be 'seven eight nine'" in said
    assert "--negative: 'one two" in refused(call, txt2img.main, *model, "--prompt", "a", "--negative", long)
    assert not (tmp_path / "out").exists()


def test_another_model_or_script_makes_nothing_again(
    call: Call, saved: Saved, random_model: Callable[..., LatentDiffusion], tmp_path: Path
) -> None:
    one = tmp_path / "one.png"
    call(txt2img.main, "--model", saved("text"), "--prompt", "a", "--out", one)
    for part in ("unet", "autoencoder", "text", "scheduler"):
        other = random_model("text")
        with torch.no_grad():
            if part == "unet":
                other.unet.conv_in.weight[0] += 1
            elif part == "autoencoder":
                other.autoencoder.vae.decoder.conv_in.weight[0] += 1
            elif part == "text":
                next(other.text.model.parameters())[5] += 1
            else:
                other.scheduler = type(other.scheduler).from_config(other.scheduler.config, solver_order=3)
        other.save(tmp_path / part)
        said = refused(call, txt2img.main, "--again", one, "--model", tmp_path / part, "--out", tmp_path / "x.png")
        assert "other weights than those that made it" in said, part
    assert "was made by txt2img.py; give it to that" in refused(call, img2img.main, "--again", one)
    assert not (tmp_path / "x.png").exists()


def test_weights_of_no_known_kind_or_as_pickle_are_refused(
    call: Call, saved: Saved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = LatentDiffusion.load(saved("text"), "cpu")
    model.autoencoder.save(tmp_path / "autoencoder")
    assert "can't load a pipeline" in refused(call, txt2img.main, "--model", tmp_path / "autoencoder", "--prompt", "a")
    model.save(tmp_path / "pickled")
    weights = tmp_path / "pickled/unet/diffusion_pytorch_model.safetensors"
    torch.save(model.unet.state_dict(), weights.with_suffix(".bin"))
    damaged = weights.read_bytes()[:-100]
    weights.unlink()
    assert "safetensors" in refused(call, txt2img.main, "--model", tmp_path / "pickled", "--prompt", "a")
    assert not caplog.records  # diffusers' own lines would come beside ours
    weights.write_bytes(damaged)
    assert "can't load a pipeline" in refused(call, txt2img.main, "--model", tmp_path / "pickled", "--prompt", "a")
    index = tmp_path / "pickled/model_index.json"
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "MyOwnPipeline"))
    assert "can't load a pipeline" in refused(call, txt2img.main, "--model", tmp_path / "pickled", "--prompt", "a")


def test_a_weaker_model_of_another_shape_is_refused(call: Call, saved: Saved, tmp_path: Path) -> None:
    said = refused(
        call,
        txt2img.main,
        "--model",
        saved("text"),
        "--prompt",
        "a",
        "--weaker",
        saved("text", "inpaint"),
        "--out",
        tmp_path / "out",
    )
    assert "--weaker" in said
    assert not (tmp_path / "out").exists()
