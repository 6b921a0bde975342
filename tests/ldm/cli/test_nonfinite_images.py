"""Commands write no image of values that are not finite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts import txt2img


@pytest.mark.parametrize(("folder", "name"), [("unet", "U-Net"), ("vae", "autoencoder")])
def test_a_spoilt_model_is_refused_and_nothing_is_written(
    folder: str, name: str, call: Callable[..., str], saved: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(saved("text"), tmp_path / "model")
    (file,) = (tmp_path / "model" / folder).glob("*.safetensors")
    tensors = {key: tensor * float("nan") if "conv_out" in key else tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    text = call(
        txt2img.main,
        "--model",
        tmp_path / "model",
        "--prompt",
        "a",
        "--steps",
        2,
        "--out",
        tmp_path / "a.png",
        status=2,
    )
    assert f"error: the {name}'s output is NaN or infinite for 1 of 1 images: " in text
    assert not (tmp_path / "a.png").exists()
