"""Pictures ↔ normalised latents. The only place that knows how latents are scaled.

Latents that leave here have mean 0 and standard deviation 1 in each channel as far as the autoencoder's own files can
say it: an autoencoder that we trained carries its statistics inside its 1×1 quant convolutions and has
`scaling_factor` 1, so that every program that reads diffusers folders decodes it rightly.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import nn

from ldm.errors import UserError
from ldm.files import tensors_sha256, whole_folder

STATISTICS = "latents.json"


class Autoencoder:
    """An AutoencoderKL as two functions, `encode` and `decode`, and the facts that others need of it."""

    def __init__(self, vae: AutoencoderKL):
        if vae.config.shift_factor:  # diffusers' StableDiffusionPipeline ignores the shift, the convolutions don't
            shift = torch.full((vae.config.latent_channels,), float(vae.config.shift_factor))
            vae = fold(vae, shift, torch.ones_like(shift))
        self.vae = vae.eval().requires_grad_(False)
        self.channels: int = vae.config.latent_channels
        self.factor: int = 2 ** (len(vae.config.block_out_channels) - 1)
        self.scale: float = vae.config.scaling_factor

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """`(N, 3, H, W)` in [-1, 1] → `(N, channels, H/factor, W/factor)` float32: the posterior's mean, normalised."""
        return self.moments(pixels)[0]

    @torch.no_grad()
    def moments(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of the normalised posterior, each as `encode` gives the mean."""
        posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.scale, posterior.logvar.float() + 2 * math.log(self.scale)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """`(N, channels, h, w)` normalised latents → `(N, 3, h·factor, w·factor)` float32, about [-1, 1]."""
        return self.vae.decode(latents.to(self.vae.device, self.vae.dtype) / self.scale).sample.float()

    def to(self, device: torch.device) -> Autoencoder:
        self.vae.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of the weights and the scale: what caches and checkpoints of latents are bound to."""
        return tensors_sha256(self.vae.state_dict(), self.scale)

    def contract(self, size: int) -> dict[str, Any]:
        """What latents of pictures of `size` pixels are: shape, and the autoencoder that made them."""
        side = size // self.factor
        return {"shape": [self.channels, side, side], "autoencoder": self.fingerprint()}

    def save(self, folder: Path, **facts: Any) -> None:
        """Writes a diffusers folder and `latents.json` (contract, facts given), whole or not at all."""
        with whole_folder(folder) as beside:
            self.vae.save_pretrained(beside)
            (beside / STATISTICS).write_text(json.dumps({"autoencoder": self.fingerprint(), **facts}, indent=2) + "\n")


def load(name: str | Path) -> Autoencoder:
    """Loads a diffusers autoencoder: a local folder (of a whole pipeline too) or a Hub id."""
    folder = Path(name)
    subfolder = "vae" if (folder / "vae").is_dir() else None
    if folder.is_dir() and not (folder / (subfolder or "") / "config.json").exists():
        raise UserError(
            f"stage1.pretrained: {folder} has no config.json; give the folder that an AutoencoderKL was saved to"
        )
    try:
        try:
            vae = AutoencoderKL.from_pretrained(str(name), subfolder=subfolder, use_safetensors=True)
        except (OSError, ValueError):  # the id of a whole pipeline on the Hub
            if folder.is_dir():
                raise
            vae = AutoencoderKL.from_pretrained(str(name), subfolder="vae", use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(
            f"stage1.pretrained: can't load an AutoencoderKL from {str(name)!r}: {str(error).splitlines()[0]}"
        ) from None
    return Autoencoder(vae)


def build(
    channels: tuple[int, ...], layers: int, latent_channels: int, groups: int, mid_attention: bool, size: int
) -> AutoencoderKL:
    """A new AutoencoderKL with random weights for pictures of `size` pixels."""
    levels = len(channels)
    return AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        layers_per_block=layers,
        latent_channels=latent_channels,
        norm_num_groups=groups,
        mid_block_add_attention=mid_attention,
        sample_size=size,
        scaling_factor=1.0,
    )


def statistics(vae: AutoencoderKL, batches: Iterable[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of each latent channel, `(C,)` each, over all pictures and positions given."""
    channels = vae.config.latent_channels
    count, total, squares = 0, torch.zeros(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)
    with torch.no_grad():
        for pixels in batches:
            z = (
                vae.encode(pixels.to(vae.device)).latent_dist.mean.double().cpu().transpose(0, 1).flatten(1)
            )  # (C, N·h·w)
            count += z.shape[1]
            total += z.sum(1)
            squares += z.square().sum(1)
    mean = total / count
    return mean.float(), (squares / count - mean.square()).clamp_min(1e-12).sqrt().float()


def fold(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> AutoencoderKL:
    """The same autoencoder with latents `(z - mean) / std`, by its quant convolutions, which it gets if it has none.

    quant_conv ends in (mean, log-variance): m' = (m - mean) / std, and lv' = lv - 2 log std.
    post_quant_conv begins on z: W'·z' + b' = W·(std·z' + mean) + b.
    """
    c = vae.config.latent_channels
    config = {**vae.config, "use_quant_conv": True, "use_post_quant_conv": True, "shift_factor": None}
    folded = AutoencoderKL.from_config(config)
    folded.load_state_dict(vae.state_dict(), strict=False)
    with torch.no_grad():
        for conv, present in ((folded.quant_conv, vae.quant_conv), (folded.post_quant_conv, vae.post_quant_conv)):
            if present is None:
                nn.init.dirac_(conv.weight)
                nn.init.zeros_(conv.bias)
        quant, post = folded.quant_conv, folded.post_quant_conv
        post.bias += post.weight[:, :, 0, 0] @ mean
        post.weight *= std[None, :, None, None]
        quant.bias[:c] = (quant.bias[:c] - mean) / std
        quant.weight[:c] /= std[:, None, None, None]
        quant.bias[c:] -= 2 * std.log()
    return folded.to(vae.device)
