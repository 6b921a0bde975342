"""Fine-tuning from one file in the layout of Stable Diffusion 1, 2 or XL, and exporting the result as such a file."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sdxl import sdxl
from stable_diffusion import stable_diffusion

from ldm.cli import export
from ldm.models.convert import checkpoint
from ldm.sampling.pipeline import LatentDiffusion

ZERO_SNR: dict[str, Any] = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
PIPELINES: dict[str, Callable[[Path], Any]] = {
    "sd1": lambda folder: stable_diffusion(folder, linear=False),
    "sd2": lambda folder: stable_diffusion(folder, linear=True, layers=23, **ZERO_SNR),
    "sdxl": sdxl,
}
KEYS = {  # of the training, by layout
    "sd1": ("stage2.process=stable-diffusion", "stage2.attention_head_dim=4"),
    "sd2": ("stage2.process=zero-snr", "stage2.attention_head_dim=4"),
    "sdxl": ("stage2.process=stable-diffusion", "stage2.attention_head_dim=8", "stage2.conditions=[text, size]"),
}
SHARED = (
    "text.max_tokens=null",
    "stage1.channels=[8, 8]",
    "data.size=16",
    "stage2.norm_num_groups=4",
    "stage2.batch=2",
    "stage2.steps=2",
    "stage2.evaluate_images=2",
    "sample.prompts=[]",
    "run.precision=no",
    "run.tracker=none",
)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """A small model of a layout as a single file, and the folder that it was written from."""
    written: dict[str, tuple[Path, Path]] = {}

    def write(layout: str) -> tuple[Path, Path]:
        if layout not in written:
            folder = tmp_path_factory.mktemp(layout)
            PIPELINES[layout](folder).save_pretrained(folder / "base")
            file = folder / "model.safetensors"
            assert export.write_single_file(LatentDiffusion.load(folder / "base", "cpu"), file) == layout
            written[layout] = file, folder / "base"
        return written[layout]

    return write


@pytest.mark.parametrize("layout", PIPELINES)
def test_a_single_file_is_fine_tuned_and_exported_as_a_single_file(
    layout: str,
    models: Callable[[str], tuple[Path, Path]],
    tmp_path: Path,
    three_shapes: Callable[[list[str]], Path],
    train: Callable[..., str],
    call: Callable[..., str],
) -> None:
    file, base = models(layout)
    source = f"data.source={three_shapes(['a red heart', 'a green square', 'a fox'])}"
    one_file = (f"stage1.pretrained={file}", f"stage2.init_from={file}", f"text.model={file}", f"text.base={base}")
    train(tmp_path / "run", *SHARED, *KEYS[layout], source, *one_file)
    vae = json.loads((tmp_path / "run/pipeline/vae/config.json").read_text())
    assert vae["force_upcast"] is True

    out = tmp_path / "tuned.safetensors"
    output = call(export.main, tmp_path / "run", "--to", "single-file", "--precision", "fp16", "--out", out)
    assert re.search(rf"layout   {layout}\n(note .*\n)?tensors  \d+ read again, all equal\n", output)
    difference = re.search(r"image    differs by (\d+) of 255", output)
    assert difference and int(difference[1]) <= 1

    original, exported = load_file(file), load_file(out)
    assert exported.keys() == original.keys()
    trained = {name for name, tensor in exported.items() if not torch.equal(tensor, original[name].half())}
    assert all(name.startswith(checkpoint.UNET) for name in trained)
    assert len(trained) > 100
    first, tuned = (LatentDiffusion.load(path, "cpu", str(base)) for path in (file, out))
    assert tuned.prediction_type == first.prediction_type == ("v" if layout == "sd2" else "eps")
    assert tuned.autoencoder.scale == first.autoencoder.scale == checkpoint.SCALING_FACTOR[layout]
    zero_snr = [model.scheduler.config.get("rescale_betas_zero_snr", False) for model in (first, tuned)]
    assert zero_snr == [layout == "sd2"] * 2
