"""The pictures that a call is given, as tensors, and those that it makes of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.data.images import to_pil, to_tensor
from ldm.utils.errors import UserError

Pictures = torch.Tensor | Image.Image | Sequence[Image.Image]


def pixels(name: str, pictures: Pictures, number: int) -> torch.Tensor:
    """`(number, C, H, W)`: pictures in [-1, 1]; tensors as they are."""
    if isinstance(pictures, Image.Image):
        pictures = [pictures]
    if len(pictures) not in (1, number):
        raise UserError(f"{name}: {len(pictures)} for {number} pictures; give one, or one each")
    if not isinstance(pictures, torch.Tensor):
        if len(sizes := {picture.size for picture in pictures}) > 1:
            raise UserError(f"{name}: of {len(sizes)} sizes; bring all to one")
        pictures = torch.stack([to_tensor(picture.convert("RGB")) for picture in pictures])
    return pictures.expand(number, *pictures.shape[1:])


def masks_from(mask: Pictures, number: int) -> torch.Tensor:
    """`(number, 1, H, W)`: 1 where the picture is to be made. A tensor's values are in [0, 1]."""
    found = pixels("mask", mask, number)
    return ((found if isinstance(mask, torch.Tensor) else found / 2 + 0.5)[:, :1] >= 0.5).float()


def widened(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Images `(N, C, H, W)` with their edges repeated, so that both sides are multiples."""
    return F.pad(image, (0, -image.shape[3] % multiple, 0, -image.shape[2] % multiple), mode="replicate")


def pasted(made: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> list[Image.Image]:
    """Pictures that are `made` where the mask `(N, 1, H, W)` is 1, and the image, bit for bit, where it is 0."""
    return [
        Image.fromarray(np.where(where[0].permute(1, 2, 0).numpy() > 0, np.array(new), np.array(old)))
        for new, old, where in zip(to_pil(made), to_pil(image), mask.split(1), strict=True)
    ]
