"""Fine-tuning: runs that start from a single-file checkpoint or from the pipeline of another run."""

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
from ldm.models import autoencoder, text_encoder, text_encoder_files, unet
from ldm.models.autoencoder import Autoencoder
from ldm.models.convert import autoencoder as single_file
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training import checks
from ldm.utils.errors import UserError

OVERRIDES = [
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
FROZEN = ["stage2.lr=1e-30", "stage2.weight_decay=0"]
ONE_LEVEL = ["stage2.channels=[16]", "stage2.attention=[true]", "stage2.pooled_text=false"]


def write_checkpoint(path: Path, model: UNet2DConditionModel, vae: Autoencoder) -> Path:
    """Writes a U-Net and its autoencoder to one file in CompVis' original layout."""
    tensors = in_original_layout(model)
    single_file.write(vae.vae, path)
    tensors |= {f"first_stage_model.{name}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors | {"cond_stage_model.transformer.x": torch.ones(1)}, path)
    return path


def assert_same(path: Path, other: Path) -> None:
    tensors, expected = load_file(path), load_file(other)
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():  # 1e-30 is what FROZEN adds to a weight that is 0
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-25, msg=name)


@pytest.mark.slow
def test_a_single_file_checkpoint_is_fine_tuned_and_then_the_resulting_pipeline(
    root: Path,
    tmp_path: Path,
    words: Path,
    vae: Autoencoder,
    three_shapes: Callable[[list[str]], Path],
    train: Callable[..., str],
) -> None:
    images = three_shapes(["a red heart", "a green square", "a fox", "a crown"])
    shared = [*OVERRIDES, f"data.source={images}", f"data.cache_dir={tmp_path / 'cache'}"]
    stage = loader.load(root / "configs/tiny.yaml", [*OVERRIDES, *ONE_LEVEL]).stage2
    torch.manual_seed(1)
    start = unet.build(stage, 4, 8, 16)
    file = write_checkpoint(tmp_path / "model.safetensors", start, vae)
    from_file = [f"stage1.pretrained={file}", f"stage2.init_from={file}", f"text.model={words}"]

    output = train(tmp_path / "frozen", *shared, *from_file, *FROZEN)
    # The checkpoint's channels replace stage2.channels.
    assert f"{sum(p.numel() for p in start.parameters()) / 1e6:,.2f} M" in output
    assert "finished" in output
    part = "pipeline/unet/diffusion_pytorch_model.safetensors"
    start.save_pretrained(tmp_path / "start")
    assert_same(tmp_path / "frozen" / part, tmp_path / "start/diffusion_pytorch_model.safetensors")
    card = (tmp_path / "frozen/README.md").read_text()
    assert f"| U-Net | {file}, 2 steps of 4 |" in card

    first = tmp_path / "first"
    train(first, *shared, *from_file, "stage2.uncond_embedding=learned", "text.train=true")
    moved = load_file(first / part)["conv_in.weight"] - load_file(tmp_path / "frozen" / part)["conv_in.weight"]
    assert float(moved.abs().max()) > 1e-5
    assert (first / "pipeline/null.safetensors").exists()
    pretrained = first / "pipeline"
    train(
        tmp_path / "second",
        *shared,
        f"stage1.pretrained={pretrained}",
        f"stage2.init_from={pretrained}",
        f"text.model={pretrained}",
        *FROZEN,
    )
    for part in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        assert_same(tmp_path / f"second/pipeline/{part}.safetensors", pretrained / f"{part}.safetensors")
    model = LatentDiffusion.load(tmp_path / "second/pipeline", "cpu")
    assert model("a fox", num_inference_steps=1)[0].size == (16, 16)


def save_pipeline(root: Path, folder: Path, words: Path, vae: Autoencoder) -> Path:
    """Saves an untrained text-to-image pipeline."""
    stage = loader.load(root / "configs/tiny.yaml", [*OVERRIDES, *ONE_LEVEL]).stage2
    encoder = text_encoder.load(str(words), 8)
    LatentDiffusion(encoder, unet.build(stage, 4, 8, 16), vae, scheduler(DiffusionProcess("eps"), "ddim")).save(folder)
    return folder


def test_the_text_encoder_of_a_pipeline_is_loaded(root: Path, tmp_path: Path, words: Path, vae: Autoencoder) -> None:
    folder = save_pipeline(root, tmp_path / "pipeline", words, vae)
    expected, loaded = text_encoder.load(str(words), 8), text_encoder.load(str(folder))
    prompts = ["red heart", "woman astronaut, light skin tone"]
    assert (loaded.length, loaded.width) == (8, 16)
    assert torch.equal(loaded.encode(prompts), expected.encode(prompts))
    assert loaded.fingerprint() == expected.fingerprint()  # so caches of embeddings stay valid
    index = json.loads((folder / "model_index.json").read_text())
    for parts, reason in (
        ({"text_encoder_2": ["transformers", "CLIPTextModel"]}, "has BertModel, CLIPTextModel; known are"),
        ({"text_encoder": [None, None]}, "has no text encoder"),
    ):
        (folder / "model_index.json").write_text(json.dumps(index | parts))
        with pytest.raises(UserError, match=rf"text\.model: the pipeline .* {reason}"):
            text_encoder.load(str(folder))
    with pytest.raises(
        UserError, match=r"text\.model: .*model\.safetensors holds .*; give a whole checkpoint .*, or the folder"
    ):
        text_encoder.load(str(words / "model.safetensors"))


def test_only_the_text_encoder_of_a_hub_pipeline_is_downloaded(
    root: Path, tmp_path: Path, words: Path, vae: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub, local = save_pipeline(root, tmp_path / "hub", words, vae), tmp_path / "local"
    files = [str(path.relative_to(hub)) for path in hub.rglob("*") if path.is_file()]

    def fetch(_name: str, allow_patterns: str | list[str]) -> str:
        for file in filter_repo_objects(files, allow_patterns=allow_patterns):
            (local / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(hub / file, local / file)
        return str(local)

    monkeypatch.setattr(text_encoder_files, "snapshot_download", fetch)
    assert text_encoder.load("someone/pipeline").fingerprint() == text_encoder.load(str(hub)).fingerprint()
    assert {path.name for path in local.iterdir()} == {"model_index.json", "text_encoder", "tokenizer"}


def test_the_autoencoder_of_an_ldm_pipeline_is_loaded(tmp_path: Path, vae: Autoencoder) -> None:
    LDMPipeline(
        vae.vae,
        UNet2DModel(
            block_out_channels=(32, 32), down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2
        ),
        scheduler(DiffusionProcess("eps"), "ddim"),
    ).save_pretrained(tmp_path)
    assert autoencoder.load(tmp_path).fingerprint() == vae.fingerprint()


def test_a_pretrained_unet_without_a_pretrained_autoencoder_is_refused(
    root: Path, tmp_path: Path, words: Path, vae: Autoencoder
) -> None:
    folder = save_pipeline(root, tmp_path / "pipeline", words, vae)
    overrides = [*OVERRIDES, f"stage2.init_from={folder}", f"text.model={folder}", f"run.dir={tmp_path / 'run'}"]
    with pytest.raises(UserError, match=r"stage2\.init_from: .* latents of its own .* set stage1\.pretrained"):
        checks.check(loader.load(root / "configs/tiny.yaml", overrides), 1)
    checks.check(loader.load(root / "configs/tiny.yaml", [*overrides, f"stage1.pretrained={folder}"]), 1)
    with pytest.raises(UserError, match=r"text\.model: has 384 channels, but .* cross_attention_dim 16"):
        checks.check(
            loader.load(root / "configs/tiny.yaml", [*overrides, f"text.model={text_encoder_files.MINILM}"]), 1
        )


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], ""),
        (["stage2.beta_schedule=cosine"], "√ᾱ up to 0."),
        (["stage2.timesteps=500"], "500 steps, not 1000"),
        (["stage2.shift=1.5"], "was trained with other noise levels"),
    ],
)
def test_noise_levels_that_differ_from_the_pretrained_models_are_warned_of(
    root: Path,
    tmp_path: Path,
    words: Path,
    vae: Autoencoder,
    capsys: pytest.CaptureFixture[str],
    keys: list[str],
    message: str,
) -> None:
    folder = save_pipeline(root, tmp_path / "pipeline", words, vae)
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    for published in (None, PNDMScheduler(**betas), EulerDiscreteScheduler(**betas)):  # None: the pipeline's own
        if published:
            published.save_pretrained(folder / "scheduler")
        pretrained = [f"{key}={folder}" for key in ("stage1.pretrained", "stage2.init_from", "text.model")]
        overrides = [*OVERRIDES, *pretrained, *keys]
        checks.check(loader.load(root / "configs/tiny.yaml", overrides), 1)
        stderr = capsys.readouterr().err
        assert message in stderr if message else not stderr
