"""The Fréchet distance between two sets of pictures, in the latents of an autoencoder: needs no downloaded network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.models.autoencoder import Autoencoder

PLACES = 4  # along a side, over which latents are averaged


class Features(nn.Module):
    """Pictures `(N, 3, H, W)` uint8 → latents averaged over 4 × 4 places, `(N, 16·C)`."""

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder
        self.num_features = PLACES**2 * autoencoder.channels

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        latents = self.autoencoder.encode(pictures.float() / 127.5 - 1)
        return F.adaptive_avg_pool2d(latents, PLACES).flatten(1)


def frechet_distance(autoencoder: Autoencoder, real: torch.Tensor, made: torch.Tensor, batch: int = 64) -> float:
    """‖μ − μ'‖² + tr(Σ + Σ' − 2·√(Σ·Σ')), arXiv 1706.08500, eq. 6, of latents' averages instead of Inception's.

    `real` and `made` are `(N, 3, H, W)` in [-1, 1]. It compares models of one autoencoder, on as many pictures each:
    with fewer than some thousand it is too large, in all of them alike.
    """
    side = tuple(real.shape[1:])
    metric = FrechetInceptionDistance(Features(autoencoder), input_img_size=side).set_dtype(torch.float64)
    for pictures, is_real in ((real, True), (made, False)):
        for part in pictures.split(batch):
            metric.update((part.clamp(-1, 1) * 127.5 + 127.5).round().byte(), real=is_real)
    return float(metric.compute())
