"""Scripts refuse to write an image whose values are NaN or infinite."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from scripts import txt2img


@pytest.mark.parametrize(("folder", "name"), [("unet", "U-Net"), ("vae", "autoencoder")])
def test_a_model_whose_output_is_nan_is_refused_and_nothing_is_written(
    folder: str, name: str, call: Callable[..., str], model_dir: Callable[..., str], tmp_path: Path
) -> None:
    shutil.copytree(model_dir("text"), tmp_path / "model")
    (file,) = (tmp_path / "model" / folder).glob("*.safetensors")
    tensors = {key: tensor * float("nan") if "conv_out" in key else tensor for key, tensor in load_file(file).items()}
    save_file(tensors, file, {"format": "pt"})
    output = call(
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
    assert f"error: the {name}'s output is NaN or infinite for 1 of 1 images: " in output
    assert not (tmp_path / "a.png").exists()
