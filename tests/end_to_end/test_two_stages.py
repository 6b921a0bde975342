"""configs/tiny.yaml from images to images, through the commands that users type."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from forked import ScriptProcess
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY

from ldm.config import loader
from ldm.models.text_encoder_files import MINILM
from scripts import evaluate, txt2img

pytestmark = pytest.mark.slow


Start = Callable[..., ScriptProcess]
Finish = Callable[[ScriptProcess], str]
Wait = Callable[[Path, ScriptProcess], None]
Kill = Callable[[ScriptProcess], None]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_everything_that_it_promises(tiny_run: Path) -> None:
    for name in (
        "config.yaml",
        "README.md",
        "report.html",
        "samples.png",
        "autoencoder/config.json",
        "autoencoder/latents.json",
        "stage1/metrics.jsonl",
        "stage2/metrics.jsonl",
        "stage2/samples/step-000020.png",
        "pipeline/model_index.json",
    ):
        assert (tiny_run / name).exists(), name
    assert list(tiny_run.glob("stage2/events.out.tfevents.*"))
    lines = [json.loads(line) for line in (tiny_run / "stage2/metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "loss" in line]  # the others are of held-out images
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not list(tiny_run.rglob("*.bin")) and not list(tiny_run.rglob("*.pt"))
    facts = json.loads((tiny_run / "autoencoder/latents.json").read_text())
    assert facts["held_out"]["psnr"] > 10


def test_a_finished_run_is_not_trained_again(train: Callable[..., str], tiny_run: Path) -> None:
    output = train(tiny_run)
    assert f"finished: {tiny_run / 'pipeline'}" in output
    assert "stage1:" not in output
    assert "stage2:" not in output


def test_plain_diffusers_makes_the_same_image_as_the_script(
    tiny_run: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(tiny_run / "pipeline")
    components = [kind for kind in pipe.config.values() if isinstance(kind, tuple) and kind[0]]
    assert {library for library, _ in components} == {"diffusers", "transformers"}
    options = {"num_inference_steps": 5, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(5)}
    diffusers = np.asarray(pipe("red heart", **options).images[0]).astype(int)
    request = ("--model", tiny_run / "pipeline", "--prompt", "red heart", "--seed", 5, "--precision", "no")
    call(txt2img.main, *request, "--out", tmp_path / "script.png")
    script = np.asarray(Image.open(tmp_path / "script.png")).astype(int)
    assert script.shape == (32, 32, 3)
    assert np.abs(script - diffusers).max() <= 1
    assert script.std() > 5


def test_a_seed_means_the_same_image_in_any_batch(tiny_run: Path) -> None:
    from ldm.sampling.pipeline import LatentDiffusion

    model = LatentDiffusion.load(tiny_run / "pipeline")
    together = model(["red heart", "cat", "cat"], seed=4, num_inference_steps=4)
    for options in ({"batch": 1}, {"batch": 2}):
        for a, b in zip(
            model(["red heart", "cat", "cat"], seed=4, num_inference_steps=4, **options), together, strict=True
        ):
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1
    alone = model("cat", seed=6, num_inference_steps=4)[0]
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(together[2]).astype(int)).max() <= 1
    assert np.abs(np.asarray(together[1]).astype(int) - np.asarray(together[2]).astype(int)).max() > 1


def test_kill_9_in_each_stage_and_the_same_command_again_give_the_uninterrupted_weights(
    train: Callable[..., str], launch: Start, wait_for: Wait, tiny_run: Path, tmp_path: Path
) -> None:
    folder, cache = tmp_path / "run", f"data.cache_dir={tiny_run / 'cache'}"
    outputs = []
    for stage in ("stage1", "stage2"):
        process = launch("train_ldm.py", *TINY, f"run.dir={folder}", cache)
        wait_for(folder / stage / "checkpoints/step-000020", process)
        os.kill(process.pid, signal.SIGKILL)
        outputs.append(process.communicate()[0])
        assert not (folder / "pipeline").exists()
    assert "stage1: continuing from step" in outputs[1]
    assert "stage2: continuing from step" in train(folder, cache)
    assert equal(unet(folder), unet(tiny_run))


def test_ctrl_c_saves_and_continues_even_past_a_damaged_checkpoint(
    train: Callable[..., str], launch: Start, wait_for: Wait, tiny_run: Path, tmp_path: Path
) -> None:
    """With a pretrained autoencoder, which is loaded instead of trained."""
    folder = tmp_path / "run"
    more = [f"data.cache_dir={tiny_run / 'cache'}", f"stage1.pretrained={tiny_run / 'autoencoder'}"]
    process = launch("train_ldm.py", *TINY, f"run.dir={folder}", *more)
    wait_for(folder / "stage2/checkpoints/step-000010", process)
    os.kill(process.pid, signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output[-2000:]
    assert "stopped and saved at step" in output
    newest = sorted((folder / "stage2/checkpoints").iterdir())[-1]
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    assert f"{newest.name} is damaged" in train(folder, *more)
    assert equal(unet(folder), unet(tiny_run))
    assert not (folder / "stage1").exists()


@pytest.mark.drill
def test_torchrun_starts_two_processes_that_find_each_other(launch_python: Start, finish: Finish) -> None:
    """What two processes train, the other tests hold with forked ones, which get the same environment."""
    assert finish(launch_python(*TORCHRUN, "tests/end_to_end/world.py", 2)).count("a world of 2") == 2


@pytest.mark.drill
def test_a_batch_of_8_its_two_halves_and_two_processes_of_4_learn_alike(
    train: Callable[..., str], launch: Start, finish: Finish, tiny_run: Path, words: Path, tmp_path: Path
) -> None:
    shared = (
        f"text.model={words}",
        f"data.cache_dir={tiny_run / 'cache'}",
        f"stage1.pretrained={tiny_run / 'autoencoder'}",
        "stage2.batch=8",
        "stage2.steps=8",
        "stage2.lr_scheduler=cosine",
        "run.precision=no",
        "run.log_every=1",
        "sample.prompts=[]",
    )
    processes = launch("tests/end_to_end/record_inputs.py", 2, tmp_path / "processes", *shared, processes=2)
    train(tmp_path / "halves", *shared, "stage2.device_batch=4")
    finish(processes)  # which asserts the world's size too
    finish(launch("tests/end_to_end/record_inputs.py", 1, tmp_path / "single", *shared))
    curves = {}
    for name in ("single", "halves", "processes"):
        lines = [json.loads(line) for line in (tmp_path / name / "stage2/metrics.jsonl").read_text().splitlines()]
        curves[name] = {key: [line[key] for line in lines if key in line] for key in ("loss", "gradient_norm", "lr")}
        assert len(curves[name]["loss"]) == 8
    for name in ("halves", "processes"):
        assert curves[name]["lr"] == curves["single"]["lr"]
        np.testing.assert_allclose(curves[name]["loss"], curves["single"]["loss"], rtol=1e-4)
        np.testing.assert_allclose(curves[name]["gradient_norm"], curves["single"]["gradient_norm"], rtol=1e-2)
    first, second = (load_file(tmp_path / f"processes/rank-{rank}.safetensors") for rank in (0, 1))
    single = load_file(tmp_path / "single/rank-0.safetensors")
    assert torch.equal(first["weights"], second["weights"])
    # the noisy latents that the U-Nets got: step by step, the halves of what a single process's got
    assert torch.equal(torch.cat([first["x_t"], second["x_t"]], 1), single["x_t"])
    assert torch.unique(single["x_t"].flatten(0, 1), dim=0).shape[0] == 8 * 8  # no noise came twice


def test_evaluation_reports_both_groups_and_the_card_shows_them(tiny_run: Path, call: Callable[..., str]) -> None:
    output = call(evaluate.main, tiny_run, "--count", 8, "--images", 20, "--network", "latents")
    assert "held-out combinations" in output
    assert "Fréchet distance of latents" in output
    figures = json.loads((tiny_run / "evaluation.json").read_text())
    assert figures["held-out combinations"]["pixels"].keys() == {"top1", "top5", "role", "role+tone", "role+tone near"}
    assert figures["held-out combinations"]["pixels, prompts shuffled"]["top1"] < 0.2
    assert "held-out combinations pixels top1" in (tiny_run / "README.md").read_text()
    assert {"fid", "kid", "precision", "coverage"} <= figures["figures"]["latents"].keys()
    assert figures["figures"]["latents"]["fid"]["images"] == 20
    assert figures["sampling of figures"] == {"steps": 5, "guidance": 3.0, "precision": "no"}
    assert figures["memorization"]["calibration"] == "training images"  # fewer than 100 are held out at random
    assert figures["retrieval"]["latents"]["R@1"]["images"] == 20
    samples = json.loads((tiny_run / "evaluation/samples.json").read_text())
    assert [sample["score"] for sample in samples] == sorted((sample["score"] for sample in samples), reverse=True)
    assert {sample["group"] for sample in samples} <= {"held-out images", "held-out combinations", "training captions"}
    assert sorted(sample["number"] for sample in samples) == list(range(20))
    for file in ("memorization.png", *(sample["file"] for sample in samples)):
        Image.open(tiny_run / "evaluation" / file).verify()


def test_the_sheet_of_samples_shows_every_prompt(tiny_run: Path, root: Path) -> None:
    """In rows of eight, each image at 128 px."""
    prompts = loader.load(root / "configs/tiny.yaml").sample.prompts
    sheet = np.asarray(Image.open(tiny_run / "samples.png").convert("L"))
    columns = min(8, len(prompts))
    shown = [sheet[12:140, 12 + i * 140 : 140 + i * 140].std() for i in range(columns)]
    assert min(shown) > 1


def test_evaluating_other_solvers_or_steps_changes_nothing_in_the_run(
    tiny_run: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in tiny_run.glob("*.*")}
    sheet = tmp_path / "sheet.png"
    output = call(
        evaluate.main, tiny_run, "--count", 4, "--images", 0, "--solver", "ddim", "--steps", 2, "--sheet", sheet
    )
    assert "images and the real ones of their prompts: Fréchet" in output
    figures = ("--images", 12, "--network", "latents", "--metrics", "kid", "--seeds", 2, "--compare", tiny_run)
    output = call(evaluate.main, tiny_run, "--count", 4, "--steps", 2, "--model", tiny_run / "pipeline", *figures)
    assert "12 images against" in output
    assert re.search(r"over 2 seeds, by latents\n  kid +\S+ ± [\d.e+-]*[1-9]", output)  # other noise, another figure
    assert output.count("can't be told apart (p = 1)") == 3  # from itself: KID, R@1 and R@5
    assert {path: path.read_bytes() for path in tiny_run.glob("*.*")} == before
    assert Image.open(sheet).width > 8 * 128


def test_own_images_are_trained_on_and_a_finished_run_reports_that_they_changed(
    train: Callable[..., str], three_shapes: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    images, folder = three_shapes([f"noise number {i}" for i in range(8)]), tmp_path / "run"
    overrides = (f"data.source={images}", f"text.model={MINILM}", "stage1.steps=2", "stage2.steps=2")
    train(folder, *overrides)
    assert (folder / "pipeline/model_index.json").exists()
    (images / "00.png").replace(images / "99.png")
    (images / "00.txt").replace(images / "99.txt")
    assert "is finished, but its data changed since" in train(folder, *overrides, status=2)


@pytest.fixture
def tars(tmp_path: Path, shard: Callable[[Path, int, str], None]) -> Path:
    """A folder of four tars."""
    for number in range(4):
        shard(tmp_path / f"{number}.tar", 9, f"image {number}-")
    return tmp_path


@pytest.mark.drill
def test_a_streamed_run_that_is_killed_and_resumed_by_two_processes_sees_the_same_samples(
    train: Callable[..., str],
    launch: Start,
    finish: Finish,
    wait_for: Wait,
    kill: Kill,
    kill_one: Callable[..., str],
    tars: Path,
    words: Path,
) -> None:
    stream = [
        f"data.source={tars}",
        "data.size=16",
        "data.streaming=true",
        "data.cache=none",
        "data.flip=true",
        "stage2.steps=16",
        "stage2.checkpoint_every=4",
        "stage1.steps=2",
        "sample.prompts=[]",
        "run.log_every=1",
        f"text.model={words}",
    ]
    command = ["train_ldm.py", *TINY, f"run.dir={tars / 'killed'}", *stream]
    process = launch(*command)
    wait_for(tars / "killed/stage2/checkpoints/step-000004", process)
    kill(process)
    processes = launch(*command, "data.workers=1", processes=2)
    wait_for(tars / "killed/stage2/checkpoints/step-000008", processes)
    output = kill_one(processes, 1)
    assert "another process of this run has ended" in output, output[-5000:]
    assert "[rank0]: Traceback" not in output
    resumed = launch(*command, "data.workers=1", processes=2)
    train(tars / "uninterrupted", *stream)
    finish(resumed)
    losses = {
        name: [json.loads(line)["loss"] for line in (tars / name / "stage2/metrics.jsonl").read_text().splitlines()]
        for name in ("uninterrupted", "killed")
    }
    assert len(losses["uninterrupted"]) == 16
    assert losses["killed"] == pytest.approx(losses["uninterrupted"], rel=2e-2)  # bf16, and two halves of a batch
