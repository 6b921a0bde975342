"""Pretrained networks that judge images: features for the metrics of generated images, LPIPS, FID."""

from __future__ import annotations

from pathlib import Path

import torch

from ldm.models.feature_networks.efficientnet import EfficientNetLite0
from ldm.models.feature_networks.inception import Inception, fid
from ldm.models.feature_networks.perceptual import BACKBONES, LPIPS_NETS, lpips
from ldm.models.features import FeatureNetwork
from ldm.utils.errors import unknown_choice

NETWORKS = ("inception", "clip", "dinov2", "efficientnet-lite0")

__all__ = ["BACKBONES", "LPIPS_NETS", "NETWORKS", "fid", "load", "lpips"]


def load(name: str, device: torch.device | str = "cpu", weights: str | Path | None = None) -> FeatureNetwork:
    """The feature network of one of `NETWORKS`; `weights` are other weights than its published ones.

    A file for `inception` and `efficientnet-lite0`; a local folder or Hub id of transformers' for `clip` and `dinov2`,
    and `open_clip:ARCH:WEIGHTS` for `clip`, which also has `text(captions)`.

    UserError for another name; and if the weights are missing, damaged or another network's, which names the file and
    where to put it or which package to install.
    """
    if name not in NETWORKS:
        raise unknown_choice("network", name, NETWORKS)
    if name == "inception":
        return Inception(device, weights)
    if name == "efficientnet-lite0":
        return EfficientNetLite0(device, weights)
    from ldm.models.feature_networks.transformer import CLIP, DINOv2  # transformers takes seconds to import

    return CLIP(device, weights) if name == "clip" else DINOv2(device, weights)
