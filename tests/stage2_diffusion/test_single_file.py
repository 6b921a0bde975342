"""Fine-tuning from one file in the layout of Stable Diffusion 1, 2 or XL, and exporting the result as such a file."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load_file, save_file
from sdxl import sdxl
from stable_diffusion import stable_diffusion

from ldm.cli import export
from ldm.config import loader
from ldm.models import text_encoder
from ldm.models.convert import checkpoint
from ldm.models.convert.unet import NOISE_SCHEDULE
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import checks
from ldm.utils.errors import UserError

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


class Model(NamedTuple):
    file: Path
    folder: Path
    """The pipeline that the file was written from."""
    base: Path
    """The same without weights, and for Stable Diffusion 2 with a scheduler for eps, as another model of its family."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """A small model of a layout as a single file."""

    @cache
    def write(layout: str) -> Model:
        path = tmp_path_factory.mktemp(layout)
        model = Model(path / "model.safetensors", path / "pipeline", path / "base")
        PIPELINES[layout](path).save_pretrained(model.folder)
        assert export.write_single_file(LatentDiffusion.load(model.folder, "cpu"), model.file) == layout
        shutil.copytree(model.folder, model.base, ignore=shutil.ignore_patterns("*.safetensors"))
        if layout == "sd2":
            DDIMScheduler(**NOISE_SCHEDULE, clip_sample=False, steps_offset=1).save_pretrained(model.base / "scheduler")
        return model

    return write


@pytest.mark.parametrize(
    "layout", [pytest.param("sd1", marks=pytest.mark.drill), pytest.param("sd2", marks=pytest.mark.drill), "sdxl"]
)
def test_a_single_file_is_fine_tuned_and_exported_as_a_single_file(
    layout: str,
    models: Callable[[str], Model],
    tmp_path: Path,
    three_shapes: Callable[[list[str]], Path],
    train: Callable[..., str],
    call: Callable[..., str],
) -> None:
    file, _, base = models(layout)
    source = f"data.source={three_shapes(['a red heart', 'a green square', 'a fox'])}"
    one_file = (f"stage1.pretrained={file}", f"stage2.init_from={file}", f"text.model={file}", f"text.base={base}")
    train(tmp_path / "run", *SHARED, *KEYS[layout], source, *one_file)
    out = tmp_path / "tuned.safetensors"
    output = call(export.main, tmp_path / "run", "--to", "single-file", "--precision", "fp16", "--out", out)
    assert f"layout   {layout}\n" in output
    assert re.search(r"tensors  [\d,]+ read again, all equal\n", output)
    assert ("overflows when it is computed in fp16" in output) is (layout == "sdxl")
    difference = re.search(r"image    differs by (\d+) of 255", output)
    assert difference and int(difference[1]) <= 1

    original, exported = load_file(file), load_file(out)
    assert exported.keys() == original.keys()
    trained = {name for name, tensor in exported.items() if not torch.equal(tensor, original[name].half())}
    assert all(name.startswith(checkpoint.UNET) for name in trained)
    assert len(trained) > 0.9 * sum(name.startswith(checkpoint.UNET) for name in original)
    assert ("v_pred" in exported, "ztsnr" in exported) == (layout == "sd2",) * 2
    tuned = LatentDiffusion.load(out, "cpu", str(base))
    assert tuned.prediction_type == ("v" if layout == "sd2" else "eps")
    assert tuned.scheduler.config.get("rescale_betas_zero_snr", False) is (layout == "sd2")
    assert tuned.autoencoder.scale == checkpoint.SCALING_FACTOR[layout]


@pytest.mark.parametrize("layout", PIPELINES)
def test_the_text_encoders_of_a_file_equal_those_of_its_folder(layout: str, models: Callable[[str], Model]) -> None:
    file, folder, base = models(layout)
    encoder, expected = text_encoder.load(str(file), base=str(base)), text_encoder.load(str(folder))
    assert encoder.fingerprint() == expected.fingerprint()  # so caches of embeddings stay valid
    embedding, from_folder = (model.embed(["red heart", ""]) for model in (encoder, expected))
    assert torch.equal(embedding.states, from_folder.states)
    assert (embedding.pooled is None) == (from_folder.pooled is None)
    assert embedding.pooled is None or torch.equal(embedding.pooled, from_folder.pooled)


def test_length_chunks_and_skipped_layers_apply_to_a_file(models: Callable[[str], Model]) -> None:
    file, folder, base = models("sd1")
    options = {"skip_layers": 1, "chunks": 2}
    encoder = text_encoder.load(str(file), 8, base=str(base), **options)
    assert torch.equal(
        encoder.embed(["a b c"]).states, text_encoder.load(str(folder), 8, **options).embed(["a b c"]).states
    )


CLIP, OPEN_CLIP = "cond_stage_model.transformer.text_model.", "conditioner.embedders.1.model."


@pytest.mark.parametrize(
    ("layout", "base", "removed", "message"),
    [
        ("sd1", "sd1", "cond_stage_model.", "text.model: .* holds a U-Net .*; give a whole checkpoint of"),
        ("sdxl", "sdxl", OPEN_CLIP, "text.model: .* holds a U-Net .*; give a whole checkpoint of"),
        (
            "sd1",
            "sd1",
            f"{CLIP}embeddings.position",
            f"text.model: .* lacks tensor {CLIP}embeddings.pos.*; is the file",
        ),
        (
            "sd1",
            "sd1",
            f"{CLIP}final_layer_norm.bias",
            "text.model: .* lacks tensor final_layer_norm.bias; is it .* whole",
        ),
        ("sdxl", "sdxl", f"{OPEN_CLIP}transformer.resblocks.1.", "text.model: .* text_encoder_2 lacks .* and 15 more"),
        ("sd1", "sd2", None, "text.model: .* text_encoder lacks .* and 335 more; is it of the same family"),
        ("sd2", "sd1", None, "text.model: .* has 24 layers, the configuration 2; is it of the same family"),
        ("sd1", "sdxl", None, "text.base: .* text_encoder_2, .* of layout sd1, needs .*: is it of the same family"),
        ("sdxl", "sd1", None, "text.base: .* of layout sdxl, needs .* tokenizer_2: is it of the same family"),
    ],
)
def test_another_file_or_base_is_refused_in_a_line(
    layout: str, base: str, removed: str | None, message: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    file = models(layout).file
    if removed:
        tensors = {name: tensor for name, tensor in load_file(file).items() if not name.startswith(removed)}
        save_file(tensors, file := tmp_path / "changed.safetensors")
    with pytest.raises(UserError, match=message) as error:
        text_encoder.load(str(file), base=str(models(base).base))
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_a_useless_base_are_refused_in_a_line(
    models: Callable[[str], Model], tmp_path: Path
) -> None:
    file, folder, base = models("sd1")
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:-99])
    shutil.copytree(base, tmp_path / "base", ignore=shutil.ignore_patterns("tokenizer"))
    for name, other, message in (
        (
            tmp_path / "cut.safetensors",
            base,
            "text.model: .* can't be read as safetensors .*; copy or download it again",
        ),
        (tmp_path / "none.safetensors", base, "text.model: .* no such file"),
        (file, tmp_path, "text.model: .* with the configuration of .* no file named model_index.json"),
        (file, tmp_path / "base", "text.model: .* its text_encoder knows 56 tokens, the tokenizer 2"),
        (folder, base, "text.base: has no effect on .*, which is no single file; leave it out"),
    ):
        with pytest.raises(UserError, match=message):
            text_encoder.load(str(name), base=str(other))


def test_a_file_that_says_that_its_noise_levels_end_in_pure_noise_warns_of_others(
    models: Callable[[str], Model], tmp_path: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _, base = models("sd2")
    one_file = (f"stage1.pretrained={file}", f"stage2.init_from={file}", f"text.model={file}", f"text.base={base}")
    for keys, warned in (
        (("stage2.process=stable-diffusion", "stage2.prediction_type=v"), True),
        (KEYS["sd2"][:1], False),
    ):
        overrides = (*SHARED, *KEYS["sd2"], *keys, *one_file, f"run.dir={tmp_path / 'run'}")
        checks.check(loader.load(root / "configs/tiny.yaml", overrides), 1)
        assert ("was trained with other noise levels (√ᾱ up to 0.07 apart)" in capsys.readouterr().err) is warned
