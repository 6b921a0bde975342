"""Configuration → diffusers' UNet2DConditionModel."""

from __future__ import annotations

import importlib.util

import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

from ldm.errors import UserError
from ldm.sampling import PREDICTION
from ldm.schema import Stage2Config


def build(stage: Stage2Config, latent_channels: int, latent_size: int, text_width: int) -> UNet2DConditionModel:
    """A U-Net with random weights that denoises `(N, latent_channels, latent_size, latent_size)`."""
    down = ["CrossAttnDownBlock2D" if attends else "DownBlock2D" for attends in stage.attention]
    halvings = len(stage.channels) - 1
    if latent_size % 2**halvings:
        raise UserError(
            f"stage2.channels: {halvings + 1} levels halve the latents {halvings} times, but their side is "
            f"{latent_size}; use fewer levels or a data.size that gives a multiple of {2**halvings}"
        )
    return UNet2DConditionModel(
        sample_size=latent_size,
        in_channels=latent_channels,
        out_channels=latent_channels,
        block_out_channels=stage.channels,
        layers_per_block=stage.layers,
        down_block_types=tuple(down),
        mid_block_type="UNetMidBlock2DCrossAttn" if stage.mid_attention else "UNetMidBlock2D",
        up_block_types=tuple(name.replace("Down", "Up") for name in reversed(down)),
        # diffusers' `attention_head_dim` of this class is the number of heads
        attention_head_dim=tuple(max(1, width // stage.head_size) for width in stage.channels),
        resnet_time_scale_shift="scale_shift" if stage.scale_shift else "default",
        norm_num_groups=stage.groups,
        cross_attention_dim=text_width,
        addition_embed_type="text" if stage.pooled_text else None,
        addition_embed_type_num_heads=8,
    )


def load(name: str, latent_channels: int, latent_size: int, text_width: int, target: str) -> UNet2DConditionModel:
    """The U-Net of a diffusers pipeline folder or Hub id; UserError where it does not fit latents, text or target."""
    try:
        unet = UNet2DConditionModel.from_pretrained(name, subfolder="unet", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"stage2.init_from: can't load a U-Net from {name!r}: {str(error).splitlines()[0]}") from None
    try:
        predicts = DDIMScheduler.load_config(name, subfolder="scheduler").get("prediction_type", "epsilon")
    except (OSError, ValueError):  # a folder of a U-Net alone does not say
        predicts = PREDICTION[target]
    if predicts != PREDICTION[target]:
        own = next((ours for ours, theirs in PREDICTION.items() if theirs == predicts), "another")
        raise UserError(
            f"stage2.target: {target!r}, but {name} was trained to predict {own!r}; set stage2.target={own}"
        )
    unet.register_to_config(sample_size=latent_size)  # convolutions take any; this is what sampling starts from
    for key, value, what in (
        ("in_channels", latent_channels, "the autoencoder's latent channels"),
        ("out_channels", latent_channels, "the autoencoder's latent channels"),
        ("cross_attention_dim", text_width, "the text encoder's width"),
    ):
        if unet.config[key] != value:
            raise UserError(
                f"stage2.init_from: {name} has {key} {unet.config[key]}, but {what} are {value}; use its own"
            )
    return unet


def check_backend(backend: str, gpu: bool) -> None:
    """UserError where an attention backend can't work here."""
    if backend == "xformers" and not (gpu and importlib.util.find_spec("xformers")):
        raise UserError("stage2.attention_backend: xformers needs a GPU and pip install 'ldm[xformers]'; use auto")


def use_attention(unet: UNet2DConditionModel, backend: str, device: torch.device) -> None:
    """Chooses how attention is computed; the result is the same within rounding."""
    check_backend(backend, device.type == "cuda")
    if backend == "xformers":
        unet.enable_xformers_memory_efficient_attention()
    elif backend == "eager" or (backend == "auto" and device.type == "cpu"):
        unet.set_attn_processor(AttnProcessor())
    else:
        unet.set_attn_processor(AttnProcessor2_0())
