"""Textual inversion: a word is learned, and nothing else changes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from sdxl import WIDTHS
from stable_diffusion import PIPELINES

import train_ldm
from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import index, openmoji
from ldm.models import autoencoder, text_encoder
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import checks
from ldm.training.checkpoint import checkpoints, read_checkpoint
from ldm.utils.errors import UserError
from stage2_diffusion import train as training
from stage2_diffusion.finetune.deliver import deliver

WORD = "<toy>"
KEYS = {
    "sd1": ("stage2.conditions=[text]", "finetune.vectors=2", "finetune.initializer=d"),
    "sdxl": ("stage2.conditions=[text, size]", "finetune.initializer=a d"),
}
SHAPES = {
    "sd1": {"emb_params": (2, WIDTHS[0])},
    "sdxl": {"clip_l": (1, WIDTHS[0]), "clip_g": (1, WIDTHS[1])},
}
Settings = Callable[..., Config]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("pipelines")
    for kind in KEYS:
        PIPELINES[kind](root).save_pretrained(root / kind)
    return {kind: root / kind for kind in KEYS}


@pytest.fixture
def settings(
    root: Path, tmp_path: Path, small: list[str], folders: dict[str, Path], three_shapes: Callable[[list[str]], Path]
) -> Settings:
    images = three_shapes([f"a {WORD}", f"{WORD} and {WORD}", f"a red {WORD}", "a fox"])

    def load(kind: str, *overrides: str) -> Config:
        folder = folders[kind]
        keys = (f"stage1.pretrained={folder}", f"stage2.init_from={folder}", f"text.model={folder}")
        sizes = ("text.max_tokens=null", "stage1.channels=[8, 8]", "stage2.prediction_type=eps", "stage2.batch=2")
        word = ("finetune.kind=inversion", f"finetune.token={WORD}", f"data.source={images}", *KEYS[kind])
        common = (f"data.cache_dir={tmp_path / 'cache'}", f"run.dir={tmp_path / 'run'}", "stage2.checkpoint_every=2")
        return loader.load(root / "configs/tiny.yaml", [*small, *keys, *sizes, *word, *common, *overrides])

    return load


def run(settings: Config) -> dict[str, torch.nn.Module]:
    """Trains, and returns the networks as they are then."""
    encoder = text_encoder.of(settings.text)
    vae = autoencoder.load(str(settings.stage1.pretrained), "stage1.pretrained")
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    with pytest.MonkeyPatch.context() as patch:
        models: list[LatentDiffusion] = []
        patch.setattr(training, "deliver", lambda *args: (models.append(args[1]), deliver(*args)))
        training.train(settings, data, vae, encoder)
    return {"vae": vae.vae, **models[0].networks}


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", pytest.param("sdxl", marks=pytest.mark.drill)])
def test_only_the_word_is_trained_and_a_resumed_run_has_the_same_bits(
    kind: str, settings: Settings, folders: dict[str, Path], tmp_path: Path
) -> None:
    trained, model = run(settings(kind, "stage2.steps=4")), LatentDiffusion.load(folders[kind], "cpu")
    before = {"vae": model.autoencoder.vae, **model.networks}
    assert trained.keys() == before.keys() == {"vae", "unet", "text_encoder", *["text_encoder_2"] * (kind == "sdxl")}
    for part, network in before.items():
        state = {name.replace(".base.", "."): tensor for name, tensor in trained[part].state_dict().items()}
        expected = network.state_dict()  # with the rows of all other tokens
        assert state.keys() - expected.keys() == {name for name in state if name.endswith("token_embedding.learned")}
        assert all(bytes_of(state[name]) == bytes_of(tensor) for name, tensor in expected.items()), part
    parts, _ = read_checkpoint(checkpoints(tmp_path / "run/stage2")[-1])
    assert all(name.endswith("token_embedding.learned") for name in parts["model"])
    assert len(parts["model"]) == len(parts["ema"]) == len(model.text.models)

    assert not (tmp_path / "run/pipeline").exists()
    files = {path.name: path.read_bytes() for path in (tmp_path / "run/embeddings").iterdir()}
    names = {"toy.safetensors", "README.md", *(["learned_embeds.safetensors"] if kind == "sd1" else [])}
    assert files.keys() == names
    rows = load_file(tmp_path / "run/embeddings/toy.safetensors")
    assert {key: tuple(row.shape) for key, row in rows.items()} == SHAPES[kind]
    for part, row in zip(model.text.encoders, [rows[key] for key in SHAPES[kind]], strict=True):
        ids = part.tokenizer(settings(kind).finetune.initializer, add_special_tokens=False).input_ids
        assert not torch.equal(row[:1], part.model.get_input_embeddings().weight[ids].mean(0, keepdim=True))

    for steps in (2, 4):
        run(settings(kind, f"stage2.steps={steps}", f"run.dir={tmp_path / 'resumed'}"))
    assert {path.name: path.read_bytes() for path in (tmp_path / "resumed/embeddings").iterdir()} == files
    model.add_embeddings(tmp_path / "run")
    assert torch.isfinite(model.text.embed([f"a {WORD}"]).states).all()


@pytest.mark.slow
def test_a_preflight_leaves_the_text_encoder_without_the_word(settings: Settings, tmp_path: Path) -> None:
    config = settings("sd1", "stage2.steps=2", "run.preflight=true")
    encoder = text_encoder.of(config.text)
    data = index.build(config.data, config.cache_dir, config.stage2.conditions)
    config.run.dir.mkdir()
    train_ldm.measure(config, encoder, "stage2", data)
    assert encoder.encoders[0].added_words == []
    assert json.loads((tmp_path / "run/preflight.json").read_text())["stage2"]["needs"]["step"] > 0


THUMB = (  # docs/results.md
    "finetune={kind: inversion, token: <thumb>, initializer: hand, vectors: 4}",
    "data.source={path: openmoji-thumbs, replace: {thumbs up: <thumb>, thumbsup: <thumb>, '+1': <thumb>}}",
)


def test_the_demos_thumb_gets_captions_with_a_word_to_learn(root: Path, drawn: Path, tmp_path: Path) -> None:
    common = f"run.dir={tmp_path}", f"data.cache_dir={drawn}"
    config = loader.load(root / "configs/lora-openmoji.yaml", [*common, *THUMB])
    images = index.build(config.data, config.cache_dir)
    tones = ("", *(f", {tone} skin tone" for tone in openmoji.TONES))
    assert {tuple(captions) for captions in images.captions()} == {(f"<thumb>{tone}",) for tone in tones}
    config = loader.load(
        root / "configs/lora-openmoji.yaml", [*common, THUMB[0], THUMB[1].replace("thumbsup", "thumb")]
    )
    with pytest.raises(UserError, match=r"^data\.source\.replace: no caption of openmoji-thumbs has 'thumb'; write it"):
        index.build(config.data, config.cache_dir)


def test_what_can_not_be_learned_is_refused(settings: Settings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"finetune\.token: no caption has <cat>, .* data\.source\.caption"):
        run(settings("sd1", "finetune.token=<cat>"))
    assert not (tmp_path / "run/stage2").exists()
    with pytest.raises(UserError, match=r"finetune\.token: a is a word that the text encoder knows already"):
        checks.check(settings("sd1", "finetune.token=a"), 1)
