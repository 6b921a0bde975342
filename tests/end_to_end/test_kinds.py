"""Every kind of model, trained on a few drawings by the real command, and sampled: by ldm and by plain diffusers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from tiny import TINY

import train_ldm
from ldm.data import openmoji
from ldm.data.images import to_tensor
from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.pipeline import LatentDiffusion
from stage2_diffusion.folder_trainer import FolderTrainer

pytestmark = [pytest.mark.slow, pytest.mark.drill]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, tiny_run: Path) -> Path:
    """A folder of forty drawings, food and faces in class folders, without captions."""
    folder = tmp_path_factory.mktemp("images")
    rendered = openmoji.draw("openmoji-demo", 32, tiny_run / "cache/openmoji-demo-32px")
    for label in ("food", "face"):
        (folder / label).mkdir()
        for path in [path for drawing, path in rendered if drawing.label == label][:20]:
            shutil.copy(path, folder / label / path.name)
    return folder


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "stage2/metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.fixture
def trained(tiny_run: Path, words: Path, tmp_path: Path):
    """Trains stage two of the tiny configuration with overrides and a small text encoder, in the latents of its run."""

    def train(*overrides: str) -> LatentDiffusion:
        status = train_ldm.main(
            [
                *TINY,
                f"run.dir={tmp_path / 'run'}",
                "run.tracker=none",
                "stage2.steps=25",
                f"stage1.pretrained={tiny_run / 'autoencoder'}",
                f"data.cache_dir={tiny_run / 'cache'}",
                f"text.model={words}",
                *overrides,
            ]
        )
        assert status == 0
        course = losses(tmp_path / "run")
        assert course[-1] < 0.8 * course[0]
        assert list((tmp_path / "run/stage2/samples").glob("step-*.png"))
        return LatentDiffusion.load(tmp_path / "run/pipeline")

    return train


@pytest.fixture(autouse=True)
def in_root(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)


def test_an_unconditional_model_of_pixels_in_five_lines_of_python(images: Path, tmp_path: Path) -> None:
    trainer = FolderTrainer(
        DiffusionProcess("eps", "cosine"),
        images,
        size=16,
        batch=8,
        lr=2e-3,
        steps=60,
        device_batch=4,
        ema=0.9,
        precision="no",
        run=tmp_path / "run",
        run__log_every=5,
        run__tracker="none",
        stage2__channels=[16, 32],
        stage2__attention=[False, True],
        stage2__groups=8,
        stage2__head_size=8,
        stage2__layers=1,
    )
    model = trainer.train()
    course = losses(tmp_path / "run")
    assert course[-1] < 0.6 * course[0]
    samples = model(count=3, seed=1, num_inference_steps=10)
    assert [image.size for image in samples] == [(16, 16)] * 3
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    expected = pipe(generator=torch.Generator().manual_seed(1), num_inference_steps=10).images[0]
    assert np.abs(np.asarray(expected, int) - np.asarray(samples[0], int)).max() <= 1


def test_a_class_conditional_model(trained, images: Path) -> None:
    model = trained(
        "stage2.conditions=[class]",
        "stage2.pooled_text=false",
        f"data.source={images}",
        "sample.guidance=2",
        "stage2.cond_dropout=0.2",
    )
    assert model.classes == ("face", "food")
    face, food = model(labels=["face", "food"], seed=3, num_inference_steps=4)
    assert face.size == food.size == (32, 32)
    unguided = model(labels="food", seed=4, num_inference_steps=4, guidance_scale=1.0)[0]
    assert np.abs(np.asarray(food, int) - np.asarray(unguided, int)).max() > 0


def test_an_unconditional_model_of_latents(trained, images: Path, tmp_path: Path) -> None:
    model = trained("stage2.conditions=[]", "stage2.pooled_text=false", "sample.guidance=1", f"data.source={images}")
    image = model(count=2, seed=5, num_inference_steps=4)[0]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    expected = pipe(generator=torch.Generator().manual_seed(5), num_inference_steps=4).images[0]
    assert np.abs(np.asarray(expected, int) - np.asarray(image, int)).max() <= 1


def test_an_inpainting_model(trained, tmp_path: Path) -> None:
    model = trained("stage2.conditions=[text,inpaint]")
    assert model.task == "inpaint"
    image = Image.fromarray(np.full((32, 32, 3), 200, np.uint8))
    mask = Image.fromarray(np.pad(np.full((16, 16), 255, np.uint8), 8))
    inpainted = model("red heart", seed=2, image=image, mask=mask, num_inference_steps=4, guidance_scale=2.0)[0]
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline", safety_checker=None)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    masked = to_tensor(image) * (to_tensor(mask.convert("RGB")) < 0)
    masked_latents = model.autoencoder.encode(masked[None])  # the pipeline would draw from the autoencoder's posterior
    expected = pipe(
        "red heart",
        image=image,
        mask_image=mask,
        height=32,
        width=32,
        latents=noise,
        masked_image_latents=masked_latents,
        num_inference_steps=4,
        guidance_scale=2.0,
        strength=1.0,
    ).images[0]
    hole = (
        slice(8, 24),
        slice(8, 24),
    )  # around it diffusers shows a reconstruction, ldm the image itself
    assert np.abs(np.asarray(expected, int)[hole] - np.asarray(inpainted, int)[hole]).max() <= 1
    around = np.asarray(mask) == 0
    assert np.array_equal(np.asarray(inpainted)[around], np.asarray(image)[around])


def test_a_super_resolution_model(trained, tmp_path: Path) -> None:
    model = trained("stage2.conditions=[text,upscale]")
    assert model.task == "upscale"
    small = Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))
    assert model("red heart", seed=2, image=small, num_inference_steps=4)[0].size == (32, 32)
    pipe = DiffusionPipeline.from_pretrained(tmp_path / "run/pipeline")
    assert pipe("red heart", image=small, num_inference_steps=4, noise_level=20).images[0].size == (32, 32)
