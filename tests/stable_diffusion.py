"""Small pipelines of the layouts of Stable Diffusion 1, 2 and XL, with random weights, as diffusers builds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from sdxl import WIDTHS, sdxl, text_encoder, tokenizer
from transformers import CLIPTextModel

SCHEDULE: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def stable_diffusion(folder: Path, linear: bool, layers: int = 2, **schedule: Any) -> StableDiffusionPipeline:
    """A small pipeline of the layout of Stable Diffusion 1, or with `linear` projections of 2."""
    torch.manual_seed(0)
    words = tokenizer(folder, "<|endoftext|>")
    encoder = text_encoder(CLIPTextModel, len(words), WIDTHS[0], layers)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),
        cross_attention_dim=WIDTHS[0],
        use_linear_projection=linear,
        norm_num_groups=4,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=schedule.pop("scaling_factor", 0.18215),
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=words,
        unet=unet.eval(),
        scheduler=DDIMScheduler(**{**SCHEDULE, "clip_sample": False, "steps_offset": 1, **schedule}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


PIPELINES: dict[str, Callable[[Path], DiffusionPipeline]] = {
    "sd1": lambda folder: stable_diffusion(folder, linear=False),
    "sd2": lambda folder: stable_diffusion(folder, linear=True, layers=23),
    "sdxl": sdxl,
}
