"""Small pipelines of SDXL's layout, with random weights, as diffusers builds them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

WIDTHS, POOLED = (16, 24), 12  # channels of the states of both text encoders, and of the pooled embedding


def tokenizer(folder: Path, padding: str) -> CLIPTokenizer:
    """Its tokens are letters. SDXL's second tokenizer pads with "!"."""
    letters = "!abcdefghijklmnopqrstuvwxyz"
    names = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    files = {"vocab": str(folder / "vocab.json"), "merges": str(folder / "merges.txt")}
    return CLIPTokenizer(**files, model_max_length=77, pad_token=padding)


def text_encoder(kind: Any, vocabulary: int, width: int, layers: int = 3) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            projection_dim=POOLED,
            bos_token_id=vocabulary - 2,
            eos_token_id=vocabulary - 1,
        )
    ).eval()


def sdxl(folder: Path, **more: Any) -> StableDiffusionXLPipeline:
    """A small pipeline of SDXL's layout: two text encoders, size conditions, depths 0, 2 and 3 of attention."""
    torch.manual_seed(0)
    tokenizers = tokenizer(folder, "<|endoftext|>"), tokenizer(folder, "!")
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 3),
        attention_head_dim=(1, 2, 2),
        cross_attention_dim=sum(WIDTHS),
        use_linear_projection=True,
        norm_num_groups=4,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=6 * 256 + POOLED,
    )
    vae = AutoencoderKL(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latent_channels=4,
        sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        scaling_factor=0.13025,
        force_upcast=True,
    )
    vocabulary = len(tokenizers[0])
    return StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=text_encoder(CLIPTextModel, vocabulary, WIDTHS[0]),
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, vocabulary, WIDTHS[1]),
        tokenizer=tokenizers[0],
        tokenizer_2=tokenizers[1],
        unet=unet.eval(),
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085,
            beta_end=0.012,
            beta_schedule="scaled_linear",
            timestep_spacing="leading",
            steps_offset=1,
        ),
        add_watermarker=False,
        **more,
    )
