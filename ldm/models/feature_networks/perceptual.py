"""LPIPS (arXiv 1801.03924) by several networks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from ldm.models.feature_networks.weights import NOT_WEIGHTS, WeightsFile, not_weights, read
from ldm.utils.errors import UserError

if TYPE_CHECKING:  # torchmetrics takes a second to import
    from torchmetrics import Metric

BACKBONES: dict[str, str] = {
    "vgg": VGG16_Weights.DEFAULT.url,
    "alex": AlexNet_Weights.DEFAULT.url,
    "squeeze": SqueezeNet1_1_Weights.DEFAULT.url,
}
SHIFT_TOLERANT = ("st-vgg", "st-alex")
LPIPS_NETS = (*BACKBONES, *SHIFT_TOLERANT)
MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17, "st-vgg": 18, "st-alex": 21}
"""Pixels; smaller images leave the last layer without a position."""


def lpips(net: str, side: int, device: torch.device | str = "cpu") -> Metric:
    """LPIPS of each image of a batch in [0, 1]; `net` is one of `LPIPS_NETS`.

    `vgg`, `alex` and `squeeze` are torchvision's networks with LPIPS' weights; `st-vgg` and `st-alex` are the
    shift-tolerant ones of arXiv 2207.13686, whose figures are not comparable with the others'.
    UserError if images of `side` pixels are too small for it, or if the weights can't be found; it names the file and
    where to put it.
    """
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    from ldm.models.feature_networks.shift_tolerant import ShiftTolerantLPIPS

    if side < MIN_SIDE[net]:
        raise UserError(f"LPIPS: sides of {side} px are too small for {net}, which needs {MIN_SIDE[net]}")
    if net in SHIFT_TOLERANT:
        return ShiftTolerantLPIPS(net).to(device)
    path = WeightsFile.from_url(BACKBONES[net], "torchvision's").find("LPIPS")
    try:
        read(path)  # tensors alone: torchmetrics would execute any code in a pickle
        return LearnedPerceptualImagePatchSimilarity(net, "none", normalize=True).to(device)
    except NOT_WEIGHTS as error:
        raise error if isinstance(error, UserError) else not_weights(path, error) from None
