"""How well a super-resolution model enlarges images, against bicubic enlarging of the same small images."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.reconstruction import reconstruction
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import downsample
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion

BATCH = 16  # images


def enlarge(
    model: LatentDiffusion,
    small: torch.Tensor,
    prompts: Sequence[str],
    seed: int,
    options: Sampling,
    batch: int = BATCH,
) -> torch.Tensor:
    """Small images `(N, 3, h, w)` in [-1, 1] → `(N, 3, H, W)`, the i-th from the noise of `seed + i`."""
    parts = []
    for start in range(0, len(small), batch):
        image, captions = small[start : start + batch], prompts[start : start + batch]
        seeds = range(seed + start, seed + start + len(image))
        parts.append(model.autoencoder.decode(model.latents(captions, seeds, options, image=image)).cpu())
    return torch.cat(parts)


def compare_enlarging(
    model: LatentDiffusion, real: torch.Tensor, prompts: Sequence[str], seed: int, options: Sampling
) -> tuple[dict[str, dict[str, float]], dict[str, torch.Tensor]]:
    """Shrinks real images `(N, 3, H, W)` in [-1, 1], as training does, and enlarges them again.

    Returns for `bicubic` and `upscaler` the metrics: PSNR in dB, SSIM, and the Fréchet distance of latents to the real
    images; and the images, the small ones among them.
    """
    small = downsample(real, model.upscale_factor)
    images = {
        "small": small,
        "bicubic": F.interpolate(small, scale_factor=model.upscale_factor, mode="bicubic").clamp(-1, 1),
        "upscaler": enlarge(model, small, prompts, seed, options).clamp(-1, 1),
    }
    metrics = {name: _metrics(model.autoencoder, real, images[name]) for name in ("bicubic", "upscaler")}
    return metrics, images


def _metrics(autoencoder: Autoencoder, real: torch.Tensor, enlarged: torch.Tensor) -> dict[str, float]:
    return {
        **reconstruction(zip(real.split(BATCH), enlarged.split(BATCH), strict=True)),
        "Fréchet distance of latents": frechet_distance(autoencoder, real, enlarged),
    }
