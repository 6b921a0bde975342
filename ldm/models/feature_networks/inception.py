"""Inception-v3 of 2015 with TensorFlow's weights, the network of FID, sFID, KID and the Inception score."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ldm.models.feature_networks.preprocessing import check
from ldm.models.feature_networks.weights import WeightsFile, not_weights, read, sha256
from ldm.models.features import Features

if TYPE_CHECKING:  # torchmetrics takes a second to import
    from torchmetrics import Metric

NAME = "inception"
WEIGHTS = WeightsFile.from_url(
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth",
    "torch-fidelity's",
    checked=True,
)
SPATIAL_LAYER = "Mixed_6d.branch1x1"  # TensorFlow's mixed_6/conv
SPATIAL_CHANNELS = 7


class Inception:
    """Features: pooled `(N, 2048)`, spatial `(N, 2023)`, logits `(N, 1008)`, as ADM's evaluator has them.

    They are torch-fidelity's: images are resized to 299 px as TensorFlow 1 did it, without antialiasing, since
    published figures are measured so, and the logits are without bias. `spatial` is `mixed_6/conv:0` of
    https://github.com/openai/guided-diffusion, its first 7 channels of 17×17, flattened as `(H, W, C)`.
    `weights` is a file; by default torch-fidelity's. UserError if it is missing, or is another file.
    """

    name = NAME
    label = "Inception-v3, 2048"

    def __init__(self, device: torch.device | str = "cpu", weights: str | Path | None = None):
        path = Path(weights) if weights else WEIGHTS.find(NAME)
        self.fingerprint = sha256(path) if path.exists() else ""
        self.model = extractor(path).to(device)
        self.device = device
        self._spatial = torch.empty(0)
        self.model.get_submodule(SPATIAL_LAYER).register_forward_hook(self._keep_spatial)

    def _keep_spatial(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        self._spatial = output[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1).float().cpu()

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> Features:
        check(images)
        pooled, logits = self.model(images.to(self.device))
        return Features(pooled.cpu(), self._spatial, logits.cpu())


def extractor(path: Path) -> Any:
    """torch-fidelity's extractor of pooled features and unbiased logits, with the weights of a file."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    buffer = io.BytesIO()  # torch-fidelity would unpickle anything that a file holds
    torch.save(read(path), buffer)
    buffer.seek(0)
    try:
        return FeatureExtractorInceptionV3(NAME, ["2048", "logits_unbiased"], buffer)
    except (RuntimeError, KeyError) as error:
        raise not_weights(path, error) from None


def fid(device: torch.device | str = "cpu", weights: Path | None = None) -> Metric:
    """Fréchet distance of Inception's 2048 features, arXiv 1706.08500, of uint8 images; UserError as `Inception`."""
    from torchmetrics.image import FrechetInceptionDistance

    path = weights or WEIGHTS.find("rFID")
    read(path)  # tensors alone: torchmetrics would execute any code in a pickle
    try:
        return FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path)).to(device)
    except (RuntimeError, KeyError) as error:
        raise not_weights(path, error) from None
