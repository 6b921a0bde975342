"""`scripts/ema.py`: averages of other widths and steps from a finished run's snapshots."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.training.ema import fit, read_snapshots, weighted_sum
from scripts import ema
from stage2_diffusion.train import train

WITH_SNAPSHOTS = ("stage2.ema_widths=[0.1,0.2]", "stage2.ema_snapshot_every=2", "stage2.steps=8")
Few = Callable[..., tuple[Config, Index]]


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


TRAINED_TEXT = ("text.train=true", "stage2.uncond_embedding=learned", "stage2.conditions=[text,upscale]")


@pytest.mark.parametrize("more", [(), TRAINED_TEXT])
def test_a_run_s_own_average_is_reproduced_and_others_are_computed(
    more: tuple[str, ...], few: Few, vae: Autoencoder, call: Callable[..., str], tmp_path: Path
) -> None:
    settings, index = few(*WITH_SNAPSHOTS, *more)
    train(settings, index, vae, text_encoder.of(settings.text))
    run, same, other = tmp_path / "run", tmp_path / "same", tmp_path / "other"
    output = call(ema.main, run, "--width", 0.1, "--out", same)
    assert "width 0.1 at step 8, of 8 snapshots; its profile is off by 0.00%" in output
    assert files(same) == files(run / "pipeline")

    call(ema.main, run, "--width", 0.15, "--step", 6, "--out", other)
    snapshots = [snapshot for snapshot in read_snapshots(run / "stage2/ema") if snapshot.step <= 6]
    expected = weighted_sum([snapshot.path for snapshot in snapshots], fit(snapshots, 0.15)[0])
    tensors = {
        f"unet.{name}": tensor for name, tensor in load_file(other / "unet/diffusion_pytorch_model.safetensors").items()
    }
    encoder = load_file(other / "text_encoder/model.safetensors")
    tensors |= {f"encoder.{name}": tensor for name, tensor in encoder.items()}
    if more:
        tensors |= load_file(other / "null.safetensors")
    assert expected.keys() <= tensors.keys()
    assert {name.partition(".")[0] for name in expected} == ({"unet", "encoder", "null"} if more else {"unet"})
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert files(other).keys() == files(run / "pipeline").keys()


def test_plain_diffusers_opens_the_written_pipeline(
    few: Few, vae: Autoencoder, call: Callable[..., str], tmp_path: Path
) -> None:
    settings, index = few(*WITH_SNAPSHOTS)
    train(settings, index, vae, text_encoder.of(settings.text))
    call(ema.main, tmp_path / "run", "--width", 0.15, "--out", tmp_path / "other")
    image = DiffusionPipeline.from_pretrained(tmp_path / "other")("red heart", num_inference_steps=2).images[0]
    assert np.asarray(image).shape == (16, 16, 3)


def test_a_mistake_is_one_line(few: Few, vae: Autoencoder, call: Callable[..., str], tmp_path: Path) -> None:
    settings, index = few(*WITH_SNAPSHOTS)
    train(settings, index, vae, text_encoder.of(settings.text))
    run, out = tmp_path / "run", tmp_path / "out"
    for width, more, message in (
        (0.5, (), "--width: 0.5; give more than 0 and less than 0.2887"),
        ("nan", (), "--width: nan; give more than 0"),
        (0.01, (), "can't be made of 8 snapshots of widths 0.1, 0.2 up to step 8"),
        (0.1, ("--step", 9), "--step: 9 has no snapshot"),
        (0.1, ("--step", 3), "the nearest is 2"),
        (0.1, ("--out", run), f"--out: {run} exists already"),
        (0.1, ("--out", "/dev/null/out"), "--out: no folder /dev/null;"),
    ):
        output = call(ema.main, run, "--width", width, "--out", out, *more, status=2)
        assert message in output
        assert output.startswith("error: ") and output.count("\n") == 1
    shutil.move(run / "pipeline", tmp_path / "elsewhere")
    assert "it has no pipeline" in call(ema.main, run, "--width", 0.1, "--out", out, status=2)
    shutil.rmtree(run / "stage2/ema")
    for folder in (run, tmp_path / "nowhere"):
        assert f"{folder}: no snapshots in" in call(ema.main, folder, "--width", 0.1, "--out", out, status=2)
    assert not out.exists()
