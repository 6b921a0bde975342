"""Images as feature networks were trained on them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from ldm.utils.atomic_files import tensors_sha256

VERSION = 1  # of `normalized`: raise it where it gives other numbers, so that no cached feature of the old ones is used
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

OF_LIBRARIES = ("transformers_version", "torch_dtype", "dtype")  # of a configuration, which change no feature


def normalized(images: torch.Tensor, side: int, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Images `(N, 3, H, W)` uint8 → `(N, 3, side, side)` float32, bicubic with antialiasing, each channel normalised.

    The whole image is resized: what a centre crop cuts off would not be judged. `mean` and `std` are of values in
    [0, 1]. ValueError for other tensors.
    """
    check(images)
    x = images.float() / 255
    if x.shape[2:] != (side, side):
        x = F.interpolate(x, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (x - x.new_tensor(mean)[:, None, None]) / x.new_tensor(std)[:, None, None]


def check(images: torch.Tensor) -> None:
    """ValueError if the images are not `(N, 3, H, W)` uint8."""
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"images are (N, 3, H, W) uint8, not {tuple(images.shape)} {images.dtype}")


def fingerprint(tensors: Mapping[str, torch.Tensor], config: Mapping[str, Any], settings: Mapping[str, Any]) -> str:
    """SHA-256 of all that features follow from: weights, the network's configuration, and how images are prepared.

    Where a folder lies, and which version of a library read it, change nothing.
    """
    facts = {"version": VERSION, "weights": tensors_sha256(dict(tensors)), "config": _of_network(config), **settings}
    return hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()


def versioned(digest: str) -> str:
    """The same for a file whose configuration is code: its SHA-256, which names the first version's cached features."""
    return digest if VERSION == 1 else f"{digest}-{VERSION}"


def _of_network(config: Mapping[Any, Any]) -> dict[str, Any]:
    return {
        str(key): _of_network(value) if isinstance(value, Mapping) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in OF_LIBRARIES
    }
