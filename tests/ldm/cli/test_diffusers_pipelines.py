"""txt2img.py on pipelines that diffusers itself builds and saves, against diffusers' own images."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    LDMPipeline,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ldm.models import text_encoder
from ldm.sampling.loop import initial_noise
from scripts import txt2img

EXACT = ("--precision", "no")
SHAPE: dict[str, Any] = {"block_out_channels": (8, 8), "norm_num_groups": 4}


def unet(**more: Any) -> UNet2DConditionModel:
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        cross_attention_dim=16,
        attention_head_dim=4,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **SHAPE,
        **more,
    ).eval()


def plain_unet(side: int, channels: int) -> UNet2DModel:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2, "layers_per_block": 1}
    shape = {"sample_size": side, "in_channels": channels, "out_channels": channels, "attention_head_dim": 4}
    return UNet2DModel(**shape, **blocks, **SHAPE).eval()


def vae(kind: Any) -> Any:
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    return kind(latent_channels=4, sample_size=16, **blocks, **SHAPE)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """CLIP's text encoder and tokenizer, whose tokens are letters."""
    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        bos_token_id=len(names) - 2,
        eos_token_id=len(names) - 1,
    )
    tokenizer = CLIPTokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"), model_max_length=77)
    return {"text_encoder": CLIPTextModel(config).eval(), "tokenizer": tokenizer}


NO_SAFETY_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@pytest.fixture(scope="module")
def sd1_dir(clip: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small pipeline with the layout and the scheduler of Stable Diffusion 1."""
    folder = tmp_path_factory.mktemp("pipelines") / "sd1"
    noise_scheduler = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    StableDiffusionPipeline(
        **clip, vae=vae(AutoencoderKL), unet=unet(), scheduler=noise_scheduler, **NO_SAFETY_CHECKER
    ).save_pretrained(folder)
    path = folder / "scheduler/scheduler_config.json"
    scheduler_config = {**json.loads(path.read_text()), "clip_sample": False}  # Stable Diffusion 1 has this key too
    path.write_text(json.dumps(scheduler_config))
    return folder


def txt2img_pixels(call: Callable[..., str], folder: Path, out: Path, *options: object) -> np.ndarray:
    call(txt2img.main, "--model", folder, "--seed", 5, *EXACT, *options, "--out", out)
    image = np.asarray(Image.open(out)).astype(int)
    assert image.std() > 1
    return image


@pytest.mark.parametrize(
    ("solver", "kind"),
    [
        (None, PNDMScheduler),
        ("ddim", DDIMScheduler),
        ("euler", EulerDiscreteScheduler),
        ("dpm++", DPMSolverMultistepScheduler),
    ],
)
def test_stable_diffusion_equals_diffusers(
    solver: str | None, kind: Any, sd1_dir: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    options = ("--solver", solver) if solver else ()
    image = txt2img_pixels(
        call,
        sd1_dir,
        tmp_path / "a.png",
        "--prompt",
        "red heart",
        "--negative",
        "blue",
        "--steps",
        6,
        "--guidance",
        3,
        *options,
    )
    pipe = DiffusionPipeline.from_pretrained(sd1_dir)
    pipe.scheduler = kind.from_config(pipe.scheduler.config)
    expected = pipe(
        "red heart",
        negative_prompt="blue",
        num_inference_steps=6,
        guidance_scale=3.0,
        latents=initial_noise((4, 8, 8), [5]),
    ).images[0]
    assert np.abs(image - np.asarray(expected)).max() <= 1


def test_a_latent_consistency_models_guidance_embedding_equals_diffusers(
    clip: dict[str, Any], call: Callable[..., str], tmp_path: Path
) -> None:
    network, noise_scheduler = unet(time_cond_proj_dim=32), LCMScheduler(beta_start=0.00085, beta_end=0.012)
    pipe = LatentConsistencyModelPipeline(
        **clip, vae=vae(AutoencoderKL), unet=network, scheduler=noise_scheduler, **NO_SAFETY_CHECKER
    )
    pipe.save_pretrained(tmp_path / "lcm")
    for scale in (4.0, 8.0):
        image = txt2img_pixels(
            call, tmp_path / "lcm", tmp_path / "a.png", "--prompt", "owl", "--steps", 1, "--guidance", scale
        )
        expected = pipe("owl", num_inference_steps=1, guidance_scale=scale, latents=initial_noise((4, 8, 8), [5]))
        assert np.abs(image - np.asarray(expected.images[0])).max() <= 1
    txt2img_pixels(call, tmp_path / "lcm", tmp_path / "a.png", "--prompt", "owl", "--steps", 4)


def test_unconditional_pipelines_equal_diffusers(call: Callable[..., str], tmp_path: Path) -> None:
    pipes = {
        "ldm": LDMPipeline(vqvae=vae(VQModel), unet=plain_unet(8, 4), scheduler=DDIMScheduler(clip_sample=False)),
        "ddim": DDIMPipeline(unet=plain_unet(16, 3), scheduler=DDIMScheduler(clip_sample=True)),
        "ddpm": DDPMPipeline(unet=plain_unet(16, 3), scheduler=DDPMScheduler()),
    }
    for name, pipe in pipes.items():
        pipe.save_pretrained(tmp_path / name)
        image = txt2img_pixels(call, tmp_path / name, tmp_path / "a.png", "--steps", 4)
        expected = pipe(num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
        assert np.abs(image - np.asarray(expected)).max() <= 1, name
    image = txt2img_pixels(call, tmp_path / "ddpm", tmp_path / "a.png", "--solver", "ddim", "--steps", 4)
    ddim = DDIMPipeline(unet=pipes["ddpm"].unet, scheduler=DDIMScheduler.from_config(pipes["ddpm"].scheduler.config))
    expected = ddim(num_inference_steps=4, generator=torch.Generator().manual_seed(5)).images[0]
    assert np.abs(image - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
def test_a_pipeline_of_fp16_weights_loads_without_its_unused_components(
    shard_size: str, sd1_dir: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    pipe = DiffusionPipeline.from_pretrained(sd1_dir, torch_dtype=torch.float16)
    pipe.save_pretrained(tmp_path / "half", variant="fp16", max_shard_size=shard_size)
    index = tmp_path / "half/model_index.json"
    unused = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    index.write_text(json.dumps(json.loads(index.read_text()) | unused))
    names = {path.name for path in (tmp_path / "half").rglob("*.safetensors")}
    assert names and all(".fp16" in name for name in names)
    options = ("--prompt", "red heart", "--steps", 4)
    images = [txt2img_pixels(call, folder, tmp_path / "a.png", *options) for folder in (sd1_dir, tmp_path / "half")]
    assert 0 < np.abs(images[0] - images[1]).mean() < 2
    encoder = text_encoder.load(str(tmp_path / "half"))
    assert encoder.encode(["a"]).dtype == torch.float32


def test_pickled_weights_are_refused(sd1_dir: Path, call: Callable[..., str], tmp_path: Path) -> None:
    DiffusionPipeline.from_pretrained(sd1_dir).save_pretrained(tmp_path / "bin", safe_serialization=False)
    assert list((tmp_path / "bin").rglob("*.bin"))
    output = call(txt2img.main, "--model", tmp_path / "bin", "--prompt", "a", "--out", tmp_path / "out", status=2)
    assert output.startswith("error: --model: can't load a pipeline")
    assert re.search(r"\.bin: is a pickle, which can run anything when it is opened, and is not read; make a", output)
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()
