"""Presets: named sets of values for keys of the configuration. A key that is set explicitly overrides its preset."""

from __future__ import annotations

from typing import Any

Presets = dict[str, dict[str, Any]]

# The family comes before the first hyphen: diffusers' AutoencoderKL, VQModel, AutoencoderTiny, AutoencoderDC, or none.
AUTOENCODERS: Presets = {
    "kl": {},
    # Rombach et al., arXiv 2112.10752, table 8
    "kl-f4": {"channels": [128, 256, 512], "latent_channels": 3},
    "kl-f8": {"channels": [128, 256, 512, 512]},
    "kl-f16": {"channels": [128, 128, 256, 256, 512], "latent_channels": 16},
    "vq-f4": {"channels": [128, 256, 512], "latent_channels": 3, "codes": 8192},
    "vq-f8": {"channels": [128, 256, 256, 512], "codes": 16384},
    # of newer models (SD 3, Flux), and for small machines
    "kl-f8-16ch": {"channels": [128, 256, 512, 512], "latent_channels": 16},
    "kl-f16-16ch": {"channels": [128, 128, 256, 512, 512], "latent_channels": 16},
    "kl-f8-small": {"channels": [32, 64, 128, 128], "layers": 1, "latent_channels": 8, "mid_attention": False},
    "vq-f4-small": {"channels": [32, 64, 128], "layers": 1, "latent_channels": 3, "mid_attention": False},
    # TAESD: convolutions only. DC-AE, arXiv 2410.10733: factor 32 with linear attention in the deep half, small ones
    # without.
    "tiny": {"channels": [64, 64, 64, 64], "layers": 3},
    "dc-f32": {"channels": [128, 256, 512, 512, 1024, 1024], "latent_channels": 32},
    "dc-f4-small": {"channels": [32, 64, 128], "layers": 1, "latent_channels": 8, "mid_attention": False},
    "dc-f8-small": {"channels": [32, 64, 64, 128], "layers": 1, "latent_channels": 16, "mid_attention": False},
    "identity": {"channels": [3], "latent_channels": 3},
}

SMALL, DEEP = [False, True, True], [True, True, True, False]
UNETS: Presets = {  # by parameters, with text embeddings of 384 channels (unet-5m), 768, or 2048 (unet-2.6b)
    "custom": {},
    "unet-5m": {
        "channels": [32, 96, 128],
        "layers": 1,
        "attention": [False, False, True],
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "pooled_text": True,
    },
    "unet-34m": {"channels": [96, 192, 256], "attention": SMALL, "attention_head_dim": 32},
    "unet-110m": {"channels": [128, 256, 384, 512], "attention": [False, True, True, False]},
    "unet-425m": {"channels": [224, 448, 896, 896], "attention": DEEP, "attention_head_dim": 32},
    "unet-860m": {"channels": [320, 640, 1280, 1280], "attention": DEEP},  # Stable Diffusion 1, except for the heads
    "unet-2.6b": {  # SDXL, arXiv 2307.01952, table 1
        "channels": [320, 640, 1280],
        "attention": SMALL,
        "transformer_layers": [1, 2, 10],
        "linear_projection": True,
        "pooled_text": True,
    },
}

PROCESSES: Presets = {
    "custom": {},
    "ddpm": {"prediction_type": "eps", "beta_schedule": "linear"},  # arXiv 2006.11239
    "improved-ddpm": {"prediction_type": "eps", "beta_schedule": "cosine", "variance": "learned"},  # arXiv 2102.09672
    "stable-diffusion": {"prediction_type": "eps", "beta_schedule": "scaled_linear"},  # arXiv 2112.10752
    "zero-snr": {"prediction_type": "v", "beta_schedule": "scaled_linear", "zero_snr": True},  # arXiv 2305.08891
    "rectified-flow": {"prediction_type": "flow", "timestep_sampling": "logit_normal"},  # arXiv 2209.03003, 2403.03206
    "variational": {"prediction_type": "eps", "beta_schedule": "learned"},  # arXiv 2107.00630
}

PRESETS = (
    (
        "stage1",
        "model",
        AUTOENCODERS,
        (
            "channels",
            "layers",
            "decoder_channels",
            "decoder_layers",
            "latent_channels",
            "norm_num_groups",
            "mid_attention",
            "codes",
        ),
    ),
    (
        "stage2",
        "model",
        UNETS,
        (
            "channels",
            "layers",
            "attention",
            "mid_attention",
            "attention_head_dim",
            "transformer_layers",
            "linear_projection",
            "norm_num_groups",
            "pooled_text",
            "scale_shift",
        ),
    ),
    (
        "stage2",
        "process",
        PROCESSES,
        (
            "prediction_type",
            "beta_schedule",
            "timesteps",
            "zero_snr",
            "shift",
            "variance",
            "timestep_sampling",
            "logit_mean",
            "logit_std",
        ),
    ),
)
"""Section, key that names a preset, its presets, and all keys that a preset may set."""
