"""The Fréchet distance between two sets of images, in the latents of an autoencoder: needs no downloaded network."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ldm.evaluation.distances import measure
from ldm.evaluation.features import FeatureNetwork, Features
from ldm.models.autoencoder import Autoencoder

GRID = 4  # latents are averaged over the cells of a 4 × 4 grid


class LatentFeatures:
    """A `FeatureNetwork`: the pooled features are an autoencoder's latents, averaged over a 4 × 4 grid, `(N, 16·C)`.

    They compare models that share an autoencoder.
    """

    name = "latents"

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder
        self.label = f"the autoencoder's latents, {GRID**2 * autoencoder.channels}"
        self.fingerprint = autoencoder.encoder_fingerprint()

    def __call__(self, images: torch.Tensor) -> Features:
        latents = self.autoencoder.encode(images.float() / 127.5 - 1)
        return Features(F.adaptive_avg_pool2d(latents, GRID).flatten(1).cpu())


def frechet_distance(autoencoder: Autoencoder, real: torch.Tensor, generated: torch.Tensor, batch: int = 64) -> float:
    """`distances.fid` of an autoencoder's latents; `real` and `generated` are `(N, 3, H, W)` in [-1, 1].

    On equally many images: with fewer than a few thousand it is biased upwards, for all models alike.
    """
    network: FeatureNetwork = LatentFeatures(autoencoder)
    sets = [
        Features.cat(network((part.clamp(-1, 1) * 127.5 + 127.5).round().byte()) for part in images.split(batch))
        for images in (real, generated)
    ]
    return measure(["fid"], *sets, bootstrap=0)["fid"].value
