"""`FolderTrainer`: stage two from Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ldm.config.schema import Stage1Config
from ldm.diffusion.process import DiffusionProcess
from ldm.models.autoencoder import Autoencoder, build
from ldm.training.diffusion_process import diffusion_process
from ldm.utils.errors import UserError
from stage2_diffusion.folder_trainer import FolderTrainer

KEYS = {
    "size": 16,
    "batch": 4,
    "steps": 2,
    "precision": "no",
    "run__preflight": False,
    "run__tracker": "none",
    "run__device": "cpu",
    "stage2__channels": [8, 8],
    "stage2__attention": [False, True],
    "stage2__norm_num_groups": 4,
    "stage2__attention_head_dim": 4,
    "stage2__layers": 1,
}
FAST_SHEETS = {"sample__steps": 2}
BuildTrainer = Callable[..., FolderTrainer]


def write_random_image(path: Path) -> None:
    rng = np.random.default_rng([*path.name.encode()])
    Image.fromarray(rng.integers(0, 255, (16, 16, 3), np.uint8)).save(path)


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(6):
        write_random_image(folder / f"{i}.png")
    return folder


@pytest.fixture
def build_trainer(image_folder: Path, tmp_path: Path) -> BuildTrainer:
    def build(process: DiffusionProcess, **keys: Any) -> FolderTrainer:
        return FolderTrainer(process, image_folder, run=tmp_path / "run", **{**KEYS, **keys})

    return build


def test_a_finished_run_returns_its_model_until_its_data_changes(
    build_trainer: BuildTrainer, image_folder: Path
) -> None:
    process = DiffusionProcess("eps", "cosine")
    first = build_trainer(process, **FAST_SHEETS).train()(count=2, seed=1, num_inference_steps=2)
    again = build_trainer(process, **FAST_SHEETS).train()(count=2, seed=1, num_inference_steps=2)
    assert [image.tobytes() for image in again] == [image.tobytes() for image in first]
    write_random_image(image_folder / "new.png")
    with pytest.raises(UserError, match=r"is finished, but its data changed since; give another run\.dir"):
        build_trainer(process, **FAST_SHEETS).train()


def test_a_run_trained_longer_equals_one_trained_in_one_go(build_trainer: BuildTrainer, tmp_path: Path) -> None:
    process, name = DiffusionProcess("v", "cosine"), "pipeline/unet/diffusion_pytorch_model.safetensors"
    build_trainer(process, steps=2, **FAST_SHEETS).train()
    before = (tmp_path / "run" / name).read_bytes()
    build_trainer(process, steps=5, **FAST_SHEETS).train()
    build_trainer(process, steps=5, run__dir=str(tmp_path / "at_once"), **FAST_SHEETS).train()
    assert (tmp_path / "run/pipeline-2" / name.partition("/")[2]).read_bytes() == before
    assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "at_once" / name).read_bytes() != before


@pytest.mark.parametrize(
    ("process", "kind", "steps"),
    [
        (DiffusionProcess("eps", "linear", timesteps=25), "DDIMScheduler", 25),
        pytest.param(
            DiffusionProcess("v", "cosine", timesteps=60, zero_snr=True, shift=2.0),
            "DDIMScheduler",
            50,
            marks=pytest.mark.drill,
        ),
        pytest.param(DiffusionProcess("flow"), "DPMSolverMultistepScheduler", 50, marks=pytest.mark.drill),
        (DiffusionProcess("flow", timestep_sampling="uniform", shift=2.0), "DPMSolverMultistepScheduler", 50),
    ],
)
def test_every_process_is_trained_and_sampled(
    process: DiffusionProcess, kind: str, steps: int, build_trainer: BuildTrainer
) -> None:
    trainer = build_trainer(process)
    assert diffusion_process(trainer.config.stage2) == process
    model = trainer.train()
    assert (type(model.scheduler).__name__, model.steps) == (kind, steps)
    assert model.scheduler.config.num_train_timesteps == process.timesteps
    (image,) = model(num_inference_steps=3)
    assert image.size == (16, 16)


def test_captions_and_a_saved_autoencoder(
    build_trainer: BuildTrainer, image_folder: Path, vae: Autoencoder, words: Path, tmp_path: Path
) -> None:
    for path in image_folder.glob("*.png"):
        path.with_suffix(".txt").write_text(f"an image {path.stem}")
    vae.save(tmp_path / "autoencoder")
    keys = {"text__model": str(words), "text__max_tokens": 8, "sample__prompts": ["an image 1"]}
    trainer = build_trainer(DiffusionProcess("v"), conditions=("text",), autoencoder=tmp_path / "autoencoder", **keys)
    model = trainer.train()
    assert model.autoencoder.fingerprint() == vae.fingerprint()
    assert model("an image 1", num_inference_steps=2)[0].size == (16, 16)
    assert "a text-to-image latent" in (tmp_path / "run/README.md").read_text().lower()
    assert list((tmp_path / "run/stage2/samples").glob("*.png"))


def test_a_saved_autoencoder_of_more_latent_channels_than_64_is_described_by_the_settings(
    build_trainer: BuildTrainer, tmp_path: Path
) -> None:
    shape = {"channels": (128, 128), "latent_channels": 128, "layers": 1, "mid_attention": False}
    Autoencoder(build(Stage1Config(model="dc-f32", **shape), 16)).save(tmp_path / "autoencoder")
    stage = build_trainer(DiffusionProcess("v"), autoencoder=tmp_path / "autoencoder").config.stage1
    assert (stage.family, stage.factor, stage.latent_channels) == ("dc", 2, 128)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"stage2__chanels": [8]}, r"unknown key 'stage2\.chanels'; did you mean 'channels'\?"),
        ({"stage4__steps": 3}, r"unknown key 'stage4'; did you mean 'stage[12]'\?"),
        ({"epochs": 3}, "unknown key 'epochs'; known: run, "),
        ({"conditions": ("texts",)}, r"stage2\.conditions\.0: 'texts'.*did you mean 'text'\?"),
        ({"autoencoder": "nowhere"}, "autoencoder: .*nowhere"),
        ({"process": DiffusionProcess("eps", (0.1, 0.2), timesteps=2)}, r"stage2\.beta_schedule: .*0\.1, 0\.2"),
        ({"process": DiffusionProcess("v", "log_linear")}, r"stage2\.beta_schedule: 'log_linear'"),
        ({"steps": 0}, r"stage2\.steps: 0"),
        ({"batch": 0}, r"stage2\.batch: 0"),
    ],
)
def test_a_wrong_argument_is_one_line(keys: dict[str, Any], message: str, build_trainer: BuildTrainer) -> None:
    with pytest.raises(UserError) as caught:
        build_trainer(**{"process": DiffusionProcess("eps", "cosine"), **keys})
    assert re.search(message, str(caught.value)), caught.value
    assert "\n" not in str(caught.value)


def test_a_caption_that_all_images_share_has_to_be_confirmed(
    build_trainer: BuildTrainer, image_folder: Path, words: Path, tmp_path: Path
) -> None:
    keys = {"conditions": ("text",), "text__model": str(words), "text__max_tokens": 8, "sample__prompts": []}
    image_folder.rename(tmp_path / "dog")
    image_folder.mkdir()
    (tmp_path / "dog").rename(image_folder / "dog")
    with pytest.raises(
        UserError, match=r"share the caption 'dog', .* give data__source=\{'path': …, 'kind': 'classes'"
    ):
        build_trainer(DiffusionProcess("v"), **keys).train()
    assert not (tmp_path / "run").exists()
    source = {"path": str(image_folder), "kind": "classes"}
    model = build_trainer(DiffusionProcess("v"), **keys, data__source=source).train()
    assert model("dog", num_inference_steps=1)[0].size == (16, 16)


def test_an_old_key_loads_with_a_line_that_names_the_new_one(
    build_trainer: BuildTrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    stage = build_trainer(DiffusionProcess("v"), stage2__micro_batches=2, stage2__dropout=0.25).config.stage2
    assert (stage.device_batch, stage.cond_dropout) == (2, 0.25)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == [
        "stage2.dropout is now stage2.cond_dropout",
        "stage2.micro_batches is now stage2.device_batch",
    ]


def test_a_preset_unet_keeps_its_shape_except_for_overridden_keys(image_folder: Path) -> None:
    stage = FolderTrainer(DiffusionProcess("v"), image_folder, stage2__model="unet-34m", stage2__layers=3).config.stage2
    assert (stage.channels, stage.attention, stage.layers) == ((96, 192, 256), (False, True, True), 3)
