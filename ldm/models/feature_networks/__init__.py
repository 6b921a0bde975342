"""Pretrained networks that judge images: features for the metrics of generated images, LPIPS, FID."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.models.feature_networks.efficientnet import EfficientNetLite0
from ldm.models.feature_networks.inception import Inception, fid
from ldm.models.feature_networks.perceptual import BACKBONES, LPIPS_NETS, lpips
from ldm.models.features import FeatureNetwork
from ldm.utils.errors import unknown_choice

NETWORKS = {network.name: network for network in (Inception, EfficientNetLite0)}

__all__ = ["BACKBONES", "LPIPS_NETS", "NETWORKS", "fid", "load", "lpips"]


def load(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> FeatureNetwork:
    """The feature network of one of `NETWORKS`; `weights` is a file of other weights than its published ones.

    UserError for another name; and if the weights are missing, damaged or another network's, which names the file and
    where to put it or which package to install.
    """
    if name not in NETWORKS:
        raise unknown_choice("network", name, tuple(NETWORKS))
    return NETWORKS[name](device, Path(weights) if weights else None)
