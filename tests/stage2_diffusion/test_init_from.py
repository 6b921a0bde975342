"""Fine-tuning: a run that starts from a whole checkpoint, and one that starts from what another run made."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import EulerDiscreteScheduler, LDMPipeline, PNDMScheduler, UNet2DConditionModel, UNet2DModel
from huggingface_hub.utils import filter_repo_objects
from original_layout import in_original_layout
from safetensors.torch import load_file, save_file

from ldm.config import loader
from ldm.diffusion.process import DiffusionProcess
from ldm.models import autoencoder, text_encoder, unet
from ldm.models.autoencoder import Autoencoder
from ldm.models.convert import autoencoder as single_file
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training import checks
from ldm.utils.errors import UserError

LITTLE = [
    "run.tracker=none",
    "run.precision=no",
    "data.size=16",
    "stage1.channels=[16, 16]",
    "stage2.batch=4",
    "stage2.steps=2",
    "stage2.prediction_type=eps",
    "sample.prompts=[]",
    "sample.steps=2",
    "text.max_tokens=8",
]
STILL = ["stage2.lr=1e-30", "stage2.weight_decay=0"]
ONE_LEVEL = ["stage2.channels=[16]", "stage2.attention=[true]", "stage2.pooled_text=false"]


def checkpoint(path: Path, model: UNet2DConditionModel, vae: Autoencoder) -> Path:
    """A U-Net and its autoencoder in one file of the original layout."""
    tensors = in_original_layout(model)
    single_file.write(vae.vae, path)
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"cond_stage_model.transformer.x": torch.ones(1)}, path)
    return path


def assert_same(path: Path, other: Path) -> None:
    ours, theirs = load_file(path), load_file(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():  # 1e-30 is what STILL adds to a weight that is 0
        torch.testing.assert_close(tensor, theirs[name], rtol=0, atol=1e-25, msg=name)


@pytest.mark.slow
def test_a_whole_checkpoint_is_fine_tuned_and_then_the_run_that_came_of_it(
    root: Path,
    tmp_path: Path,
    words: Path,
    vae: Autoencoder,
    three_shapes: Callable[[list[str]], Path],
    train: Callable[..., str],
) -> None:
    pictures = three_shapes(["a red heart", "a green square", "a fox", "a crown"])
    given = [*LITTLE, f"data.source={pictures}", f"data.cache_dir={tmp_path / 'cache'}"]
    stage = loader.load(root / "configs/tiny.yaml", [*LITTLE, *ONE_LEVEL]).stage2
    torch.manual_seed(1)
    start = unet.build(stage, 4, 8, 16)
    file = checkpoint(tmp_path / "model.safetensors", start, vae)
    plan_of_it = [f"stage1.pretrained={file}", f"stage2.init_from={file}", f"text.model={words}"]

    said = train(tmp_path / "none", *given, *plan_of_it, "--dry-run")  # stage2.channels are others, and don't count
    assert f"{sum(p.numel() for p in start.parameters()) / 1e6:,.2f} M" in said
    still = train(tmp_path / "still", *given, *plan_of_it, *STILL)
    assert "finished" in still
    part = "pipeline/unet/diffusion_pytorch_model.safetensors"
    start.save_pretrained(tmp_path / "start")
    assert_same(tmp_path / "still" / part, tmp_path / "start/diffusion_pytorch_model.safetensors")
    card = (tmp_path / "still/README.md").read_text()
    assert f"| U-Net | {file}, 2 steps of 4 |" in card

    first = tmp_path / "first"
    train(first, *given, *plan_of_it, "stage2.uncond_embedding=learned", "text.train=true")
    moved = load_file(first / part)["conv_in.weight"] - load_file(tmp_path / "still" / part)["conv_in.weight"]
    assert float(moved.abs().max()) > 1e-5
    assert (first / "pipeline/null.safetensors").exists()
    whole = first / "pipeline"
    train(
        tmp_path / "second",
        *given,
        f"stage1.pretrained={whole}",
        f"stage2.init_from={whole}",
        f"text.model={whole}",
        *STILL,
    )
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert_same(tmp_path / f"second/pipeline/{part}.safetensors", whole / f"{part}.safetensors")
    model = LatentDiffusion.load(tmp_path / "second/pipeline", "cpu")
    assert model("a fox", num_inference_steps=1)[0].size == (16, 16)


def pipeline(root: Path, folder: Path, words: Path, vae: Autoencoder) -> Path:
    stage = loader.load(root / "configs/tiny.yaml", [*LITTLE, *ONE_LEVEL]).stage2
    encoder = text_encoder.load(str(words), 8)
    LatentDiffusion(encoder, unet.build(stage, 4, 8, 16), vae, scheduler(DiffusionProcess("eps"), "ddim")).save(folder)
    return folder


def test_a_pipeline_gives_its_text_encoder(root: Path, tmp_path: Path, words: Path, vae: Autoencoder) -> None:
    whole = pipeline(root, tmp_path / "pipeline", words, vae)
    expected, found = text_encoder.load(str(words), 8), text_encoder.load(str(whole))
    prompts = ["red heart", "woman astronaut, light skin tone"]
    assert (found.length, found.width) == (8, 16)
    assert torch.equal(found.encode(prompts), expected.encode(prompts))
    assert found.fingerprint() == expected.fingerprint()  # so caches of embeddings stay valid
    index = json.loads((whole / "model_index.json").read_text())
    for parts in ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, {"text_encoder": [None, None]}):
        (whole / "model_index.json").write_text(json.dumps(index | parts))
        with pytest.raises(UserError, match=r"text\.model: the pipeline .* has no text encoder, or several"):
            text_encoder.load(str(whole))
    with pytest.raises(UserError, match=r"text\.model: .*model\.safetensors is a file; a text encoder is a folder"):
        text_encoder.load(str(words / "model.safetensors"))


def test_of_a_pipeline_on_the_hub_only_the_text_encoder_is_fetched(
    root: Path, tmp_path: Path, words: Path, vae: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, local = pipeline(root, tmp_path / "hub", words, vae), tmp_path / "local"
    files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]

    def fetch(_name: str, allow_patterns: str | list[str]) -> str:
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, local / file)
        return str(local)

    monkeypatch.setattr(text_encoder, "snapshot_download", fetch)
    assert text_encoder.load("someone/pipeline").fingerprint() == text_encoder.load(str(hub)).fingerprint()
    assert {path.name for path in local.iterdir()} == {"model_index.json", "text_encoder", "tokenizer"}


def test_a_pipeline_gives_its_autoencoder_under_each_name(tmp_path: Path, vae: Autoencoder) -> None:
    LDMPipeline(
        vae.vae,
        UNet2DModel(
            block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        ),
        scheduler(DiffusionProcess("eps"), "ddim"),
    ).save_pretrained(tmp_path)
    assert autoencoder.load(tmp_path).fingerprint() == vae.fingerprint()


def test_a_unet_whose_latents_would_be_trained_anew_is_refused(
    root: Path, tmp_path: Path, words: Path, vae: Autoencoder
) -> None:
    whole = pipeline(root, tmp_path / "pipeline", words, vae)
    given = [*LITTLE, f"stage2.init_from={whole}", f"text.model={whole}", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"stage2\.init_from: .* latents of its own .* set stage1\.pretrained"):
        checks.check(loader.load(root / "configs/tiny.yaml", given), 1)
    checks.check(loader.load(root / "configs/tiny.yaml", [*given, f"stage1.pretrained={whole}"]), 1)
    with pytest.raises(UserError, match=r"text\.model: has 384 channels, but .* cross_attention_dim 16"):
        checks.check(loader.load(root / "configs/tiny.yaml", [*given, "text.model=" + text_encoder.MINILM]), 1)


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ([], ""),
        (["stage2.beta_schedule=cosine"], "√ᾱ up to 0."),
        (["stage2.timesteps=500"], "500 steps, not 1000"),
        (["stage2.shift=1.5"], "was trained with other noise levels"),
    ],
)
def test_other_noise_levels_than_those_of_the_start_are_warned_of(
    root: Path,
    tmp_path: Path,
    words: Path,
    vae: Autoencoder,
    capsys: pytest.CaptureFixture[str],
    keys: list[str],
    says: str,
) -> None:
    whole = pipeline(root, tmp_path / "pipeline", words, vae)
    theirs = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for written in (None, PNDMScheduler(**theirs), EulerDiscreteScheduler(**theirs)):  # as published pipelines have
        if written:
            written.save_pretrained(whole / "scheduler")
        given = [*LITTLE, *(f"{key}={whole}" for key in ("stage1.pretrained", "stage2.init_from", "text.model")), *keys]
        checks.check(loader.load(root / "configs/tiny.yaml", given), 1)
        said = capsys.readouterr().err
        assert says in said if says else not said
