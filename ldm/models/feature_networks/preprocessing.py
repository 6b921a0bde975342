"""Images as feature networks were trained on them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


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
