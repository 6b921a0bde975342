"""The Fréchet distance between two sets of images, in the latents of an autoencoder: needs no downloaded network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm.models.autoencoder import Autoencoder

GRID = 4  # latents are averaged over the cells of a 4 × 4 grid


class Features(nn.Module):
    """Images `(N, 3, H, W)` uint8 → latents averaged over a 4 × 4 grid, `(N, 16·C)`, on the CPU.

    There the metric keeps its sums, in float64, which not every accelerator has.
    """

    def __init__(self, autoencoder: Autoencoder):
        super().__init__()
        self.autoencoder = autoencoder
        self.num_features = GRID**2 * autoencoder.channels

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        latents = self.autoencoder.encode(images.float() / 127.5 - 1)
        return F.adaptive_avg_pool2d(latents, GRID).flatten(1).cpu()


def frechet_distance(autoencoder: Autoencoder, real: torch.Tensor, generated: torch.Tensor, batch: int = 64) -> float:
    """‖μ − μ'‖² + tr(Σ + Σ' − 2·√(Σ·Σ')), arXiv 1706.08500, eq. 6, of pooled latents instead of Inception's features.

    `real` and `generated` are `(N, 3, H, W)` in [-1, 1]. The distance compares models that share an autoencoder, on
    equally many images: with fewer than a few thousand it is biased upwards, for all models alike.
    """
    shape = tuple(real.shape[1:])
    metric = FrechetInceptionDistance(Features(autoencoder), input_img_size=shape).set_dtype(torch.float64)
    for images, is_real in ((real, True), (generated, False)):
        for part in images.split(batch):
            metric.update((part.clamp(-1, 1) * 127.5 + 127.5).round().byte(), real=is_real)
    return float(metric.compute())
