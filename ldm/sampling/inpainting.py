"""The input images and masks of a call as tensors, and the composition of inpainted images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from ldm.data.images import to_pil, to_tensor
from ldm.utils.errors import UserError

Images = torch.Tensor | Image.Image | Sequence[Image.Image]


def image_batch(name: str, images: Images, number: int) -> torch.Tensor:
    """`(number, C, H, W)` in [-1, 1]; tensors keep their values. UserError, naming the option `name`, for a misfit."""
    if isinstance(images, Image.Image):
        images = [images]
    if len(images) not in (1, number):
        raise UserError(f"{name}: {len(images)} for {number} images; give one, or one each")
    if not isinstance(images, torch.Tensor):
        if len(sizes := {image.size for image in images}) > 1:
            raise UserError(f"{name}: of {len(sizes)} sizes; bring all to one")
        images = torch.stack([to_tensor(image.convert("RGB")) for image in images])
    return images.expand(number, *images.shape[1:])


def mask_batch(mask: Images, number: int) -> torch.Tensor:
    """`(number, 1, H, W)`: 1 where the image is to be generated, 0 elsewhere. A tensor's values are in [0, 1]."""
    values = image_batch("mask", mask, number)
    return ((values if isinstance(mask, torch.Tensor) else values / 2 + 0.5)[:, :1] >= 0.5).float()


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Images `(N, C, H, W)` with their right and lower edges repeated until both sides are multiples of `multiple`."""
    return F.pad(image, (0, -image.shape[3] % multiple, 0, -image.shape[2] % multiple), mode="replicate")


def composite(generated: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> list[Image.Image]:
    """`generated` where the mask `(N, 1, H, W)` is 1, and `image`, bit for bit, where it is 0."""
    return [
        Image.fromarray(np.where(inside[0].permute(1, 2, 0).numpy() > 0, np.array(new), np.array(old)))
        for new, old, inside in zip(to_pil(generated), to_pil(image), mask.split(1), strict=True)
    ]
