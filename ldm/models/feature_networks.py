"""The feature networks of LPIPS and FID, and their weights.

The weights are files in torch.hub's cache. A missing file is downloaded, unless `HF_HUB_OFFLINE=1` is set, which
applies here too.
"""

from __future__ import annotations

import http.client
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import huggingface_hub
import torch
from torchvision.models import AlexNet_Weights, SqueezeNet1_1_Weights, VGG16_Weights

from ldm.utils.errors import UserError

if TYPE_CHECKING:  # torchmetrics takes a second to import
    from torchmetrics import Metric

BACKBONES: dict[str, str] = {
    "vgg": VGG16_Weights.DEFAULT.url,
    "alex": AlexNet_Weights.DEFAULT.url,
    "squeeze": SqueezeNet1_1_Weights.DEFAULT.url,
}
MIN_SIDE = {"vgg": 16, "alex": 31, "squeeze": 17}  # pixels; smaller images leave the last layer without a position
TIMEOUT = 10.0  # seconds that a server may be silent


def lpips(net: str, side: int, device: torch.device | str = "cpu") -> Metric:
    """LPIPS of each image of a batch in [0, 1], arXiv 1801.03924; `net` is `vgg`, `alex` or `squeeze`.

    UserError if images of `side` pixels are too small for it, or if the weights can't be downloaded; it names the file
    and where to put it.
    """
    from torchmetrics.image import LearnedPerceptualImagePatchSimilarity

    if side < MIN_SIDE[net]:
        raise UserError(f"LPIPS: sides of {side} px are too small for {net}, which needs {MIN_SIDE[net]}")
    path = _file("LPIPS", BACKBONES[net], "torchvision's")
    return _load_metric(path, lambda: LearnedPerceptualImagePatchSimilarity(net, "none", normalize=True)).to(device)


def fid(device: torch.device | str = "cpu") -> Metric:
    """Fréchet distance of Inception's 2048 features, arXiv 1706.08500, of uint8 images; UserError as for `lpips`."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchmetrics.image import FrechetInceptionDistance

    path = _file("rFID", URL_INCEPTION_V3, "torch-fidelity's")
    return _load_metric(path, lambda: FrechetInceptionDistance(2048, feature_extractor_weights_path=str(path))).to(
        device
    )


def _file(metric: str, url: str, whose: str) -> Path:
    """The file of torch.hub's cache for `url`, downloaded if it is missing."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rpartition("/")[2]
    if path.exists():
        return path
    reason = "HF_HUB_OFFLINE is set"
    if not huggingface_hub.is_offline_mode():
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)  # torch.hub sets none
        try:
            folder.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), path.stem.rpartition("-")[2])
            return path
        except (OSError, RuntimeError, http.client.HTTPException) as error:  # no network, or a wrong checksum
            reason = " ".join(str(error).split())
        finally:
            socket.setdefaulttimeout(timeout)
    raise UserError(
        f"{metric}: {path.name} is not in {folder} and can't be downloaded ({reason}); "
        f"put it there, it is {whose}: {url}"
    )


def _load_metric(path: Path, build: Callable[[], Metric]) -> Metric:
    """`build()` once the weights in `path` have proved to be tensors alone; UserError otherwise."""
    try:
        torch.load(path, map_location="cpu", weights_only=True)  # torchmetrics would execute any code in a pickle
        return build()
    except (OSError, RuntimeError, EOFError, KeyError, TypeError, AttributeError, pickle.UnpicklingError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path}: not the weights that it should be ({reason}); remove it, and it is fetched") from None
