"""configs/tiny.yaml from pictures to pictures, through the commands that people type."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

pytestmark = pytest.mark.slow


@pytest.fixture
def launch(root: Path, environment: dict[str, str]):
    def start(*arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *arguments],
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    return start


@pytest.fixture
def train(launch):
    def start(folder: Path, *more: str) -> subprocess.Popen[str]:
        return launch("train_ldm.py", "--config", "configs/tiny.yaml", f"run.dir={folder}", *more)

    return start


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output[-3000:]
    return output


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert process.poll() is None, f"ended before {path} was written"
        assert time.monotonic() < end
        time.sleep(0.05)


def unet(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "pipeline/unet/diffusion_pytorch_model.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_run_leaves_everything_that_it_promises(tiny_run: Path) -> None:
    for name in (
        "config.yaml", "README.md", "samples.png", "autoencoder/config.json", "autoencoder/latents.json",
        "stage1/metrics.jsonl", "stage2/metrics.jsonl", "stage2/samples/step-000020.png", "pipeline/model_index.json",
    ):  # fmt: skip
        assert (tiny_run / name).exists(), name
    assert list(tiny_run.glob("stage2/events.out.tfevents.*"))
    lines = [json.loads(line) for line in (tiny_run / "stage2/metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(5, 41, 5))
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert not list(tiny_run.rglob("*.bin")) and not list(tiny_run.rglob("*.pt"))
    facts = json.loads((tiny_run / "autoencoder/latents.json").read_text())
    assert facts["held_out"]["psnr"] > 10


def test_a_finished_run_is_not_trained_again(train, tiny_run: Path) -> None:
    output = finish(train(tiny_run))
    assert f"finished: {tiny_run / 'pipeline'}" in output
    assert "stage1:" not in output
    assert "stage2:" not in output


def test_a_finished_run_says_so_where_its_pictures_changed(tiny_run: Path, train, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_run, folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("openmoji-demo", "openmoji-all"))  # as if the source had grown
    process = train(folder, "data.source=openmoji-all")
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 2
    assert "is finished, but its data changed since" in output


def test_plain_diffusers_makes_the_same_picture_as_the_script(tiny_run: Path, launch, tmp_path: Path) -> None:
    finish(launch("scripts/txt2img.py", "--model", str(tiny_run / "pipeline"), "--prompt", "red heart", "--seed", "5",
                  "--out", str(tmp_path / "ours.png")))  # fmt: skip
    plain = (
        "import sys, torch; from diffusers import DiffusionPipeline\n"
        f"pipe = DiffusionPipeline.from_pretrained({str(tiny_run / 'pipeline')!r})\n"
        "pipe('red heart', generator=torch.Generator().manual_seed(5)).images[0].save(sys.argv[1])\n"
        "assert not any(name.partition('.')[0] == 'ldm' for name in sys.modules)"
    )
    finish(launch("-c", plain, str(tmp_path / "theirs.png")))
    ours, theirs = (np.asarray(Image.open(tmp_path / f"{name}.png")).astype(int) for name in ("ours", "theirs"))
    assert ours.shape == (32, 32, 3)
    assert np.abs(ours - theirs).max() <= 1
    assert ours.std() > 5


def test_a_seed_means_the_same_picture_in_any_batch(tiny_run: Path) -> None:
    from ldm.pipeline import LatentDiffusion

    model = LatentDiffusion.load(tiny_run / "pipeline")
    together = model(["red heart", "cat", "cat"], seed=4, steps=4)
    for options in ({"batch": 1}, {"batch": 2}):
        for a, b in zip(model(["red heart", "cat", "cat"], seed=4, steps=4, **options), together, strict=True):
            assert np.abs(np.asarray(a).astype(int) - np.asarray(b).astype(int)).max() <= 1
    alone = model("cat", seed=6, steps=4)[0]
    assert np.abs(np.asarray(alone).astype(int) - np.asarray(together[2]).astype(int)).max() <= 1
    assert np.abs(np.asarray(together[1]).astype(int) - np.asarray(together[2]).astype(int)).max() > 1


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_kill_9_and_the_same_command_again_give_the_uninterrupted_weights(
    train,
    tiny_run: Path,
    tmp_path: Path,
    stage: str,
) -> None:
    folder = tmp_path / "run"
    process = train(folder)
    wait_for(folder / stage / "checkpoints/step-000020", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (folder / "pipeline").exists()
    assert f"{stage}: continuing from step" in finish(train(folder))
    assert same(unet(folder), unet(tiny_run))


def test_ctrl_c_saves_and_continues_even_past_a_damaged_checkpoint(train, tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = train(folder)
    wait_for(folder / "stage2/checkpoints/step-000010", process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 130, output[-2000:]
    assert "stopped and saved at step" in output
    newest = sorted((folder / "stage2/checkpoints").iterdir())[-1]
    with (newest / "model.safetensors").open("r+b") as file:
        file.seek(1000)
        file.write(b"damage")
    output = finish(train(folder))
    assert f"{newest.name} is damaged" in output
    assert same(unet(folder), unet(tiny_run))


def test_two_processes_train_together(launch, tiny_run: Path, tmp_path: Path) -> None:
    folder, alone = tmp_path / "two", tmp_path / "one"
    finish(launch("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
                  "tests/end_to_end/watched.py", "2", str(folder)))  # fmt: skip
    finish(launch("tests/end_to_end/watched.py", "1", str(alone), f"stage1.pretrained={folder / 'autoencoder'}"))
    first, second = (load_file(folder / f"rank-{rank}.safetensors") for rank in (0, 1))
    one = load_file(alone / "rank-0.safetensors")
    assert torch.equal(first["weights"], second["weights"])
    # the noisy latents that the U-Nets got: step by step, the halves of what one process's got
    assert torch.equal(torch.cat([first["x_t"], second["x_t"]], 1), one["x_t"])
    assert torch.unique(one["x_t"].flatten(0, 1), dim=0).shape[0] == 40 * 16
    losses = [
        [json.loads(line)["loss"] for line in (where / stage / "metrics.jsonl").read_text().splitlines()[:2]]
        for where, stage in ((folder, "stage1"), (tiny_run, "stage1"), (folder, "stage2"), (alone, "stage2"))
    ]
    # the same global batches, summed in another order, in bf16: ten steps agree before rounding has grown
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
    np.testing.assert_allclose(losses[2], losses[3], rtol=1e-3)


def test_evaluation_reports_both_groups_and_the_card_shows_them(tiny_run: Path, launch) -> None:
    output = finish(launch("scripts/evaluate.py", str(tiny_run), "--count", "8", "--steps", "2"))
    assert "held-out combinations" in output
    figures = json.loads((tiny_run / "evaluation.json").read_text())
    assert figures["held-out combinations"]["pixels"].keys() == {"top1", "top5", "role", "role+tone", "role+tone near"}
    assert figures["held-out combinations"]["pixels, prompts shuffled"]["top1"] < 0.2
    assert "held-out combinations pixels top1" in (tiny_run / "README.md").read_text()


def test_a_pretrained_autoencoder_is_loaded_instead_of_trained(train, tiny_run: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    finish(train(folder, f"stage1.pretrained={tiny_run / 'autoencoder'}"))
    assert not (folder / "stage1").exists()
    assert same(unet(folder), unet(tiny_run))


def test_own_pictures_in_a_folder_train_too(train, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "pictures").mkdir()
    for i in range(8):
        Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(tmp_path / f"pictures/{i}.png")
        (tmp_path / f"pictures/{i}.txt").write_text(f"noise number {i}")
    folder = tmp_path / "run"
    finish(train(folder, f"data.source={tmp_path / 'pictures'}", "stage1.steps=2", "stage2.steps=2"))
    assert (folder / "pipeline/model_index.json").exists()


@pytest.fixture
def tars(tmp_path: Path, shard: Callable[[Path, int, str], None]) -> Path:
    """A folder of four tars."""
    for number in range(4):
        shard(tmp_path / f"{number}.tar", 9, f"picture {number}-")
    return tmp_path


def test_a_streamed_run_killed_and_taken_up_by_two_processes_sees_the_same_samples(
    train, root: Path, environment: dict[str, str], tars: Path
) -> None:
    stream = [
        f"data.source={tars}", "data.size=16", "data.streaming=true", "data.cache=none", "data.flip=true",
        "stage2.steps=24", "stage2.checkpoint_every=4", "stage1.steps=10", "sample.prompts=[]", "run.log_every=1",
    ]  # fmt: skip
    finish(train(tars / "whole", *stream))
    process = train(tars / "killed", *stream)
    wait_for(tars / "killed/stage2/checkpoints/step-000004", process)
    process.kill()
    process.wait()
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train_ldm.py",
        "--config", "configs/tiny.yaml", f"run.dir={tars / 'killed'}", *stream, "data.workers=1",
    ]  # fmt: skip
    two = subprocess.Popen(
        command, cwd=root, env=environment, text=True, stderr=subprocess.PIPE, start_new_session=True
    )
    wait_for(tars / "killed/stage2/checkpoints/step-000012", two)
    os.killpg(two.pid, signal.SIGKILL)  # and once more, for both processes
    two.wait()
    done = subprocess.run(command, cwd=root, env=environment, text=True, capture_output=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    losses = {
        name: [json.loads(line)["loss"] for line in (tars / name / "stage2/metrics.jsonl").read_text().splitlines()]
        for name in ("whole", "killed")
    }
    assert len(losses["whole"]) == 24
    assert losses["killed"] == pytest.approx(losses["whole"], rel=2e-2)  # bf16, and two halves of a batch
