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
    """`(number, C, H, W)` in [-1, 1]; tensors keep their values, and what is transparent becomes white.

    UserError, naming the option `name`, for a misfit.
    """
    if isinstance(images, Image.Image):
        images = [images]
    if len(images) not in (1, number):
        raise UserError(f"{name}: {len(images)} for {number} images; give one, or one each")
    if not isinstance(images, torch.Tensor):
        if len(sizes := {image.size for image in images}) > 1:
            raise UserError(f"{name}: of {len(sizes)} sizes; bring all to one")
        images = torch.stack([to_tensor(_over(image, "white")) for image in images])
    return images.expand(number, *images.shape[1:])


def mask_batch(mask: Images, number: int) -> torch.Tensor:
    """`(number, 1, H, W)`: 1 where the image is to be generated, 0 elsewhere. A tensor's values are in [0, 1].

    The brightest channel counts. Transparent pixels are kept. UserError where a mask generates nothing.
    """
    if isinstance(mask, torch.Tensor):
        if not (mask.min() >= 0 and mask.max() <= 1):
            raise UserError(
                f"mask: its values go from {mask.min():g} to {mask.max():g}; give 0 (kept) to 1 (generated)"
            )
        values = image_batch("mask", mask, number)
    else:
        opaque = [_over(image, "black") for image in ([mask] if isinstance(mask, Image.Image) else mask)]
        for image in opaque:
            check_mask(image)
        values = image_batch("mask", opaque, number) / 2 + 0.5
    generated = (values.amax(dim=1, keepdim=True) >= 0.5).float()
    empty = ~generated.flatten(1).any(dim=1)
    if bool(empty.any()):
        first = int(empty.int().argmax())
        which = "it" if isinstance(mask, Image.Image) or len(mask) == 1 else f"mask[{first}]"
        raise UserError(
            f"mask: {which} generates nothing: its brightest value is {round(float(values[first].max()) * 255)} of "
            "255, and 128 or more is generated; paint what to generate white, or invert the mask"
        )
    return generated


def check_mask(image: Image.Image) -> None:
    """UserError for a mask of the values 0 and 1 of 255, which all look black."""
    if np.asarray(image).max(initial=0) == 1:
        raise UserError("mask: its values are 0 and 1 of 255, which is all black; multiply them by 255")


def _over(image: Image.Image, background: str) -> Image.Image:
    """The image as RGB, laid over `background` where it is transparent."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    rgba = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, background), rgba).convert("RGB")


def pad_to_multiple(image: torch.Tensor, multiple: int) -> torch.Tensor:
    """Images `(N, C, H, W)` with their right and lower edges repeated until both sides are multiples of `multiple`."""
    return F.pad(image, (0, -image.shape[3] % multiple, 0, -image.shape[2] % multiple), mode="replicate")


def composite(generated: torch.Tensor, image: torch.Tensor, mask: torch.Tensor) -> list[Image.Image]:
    """`generated` where the mask `(N, 1, H, W)` is 1, and `image`, bit for bit, where it is 0."""
    return [
        Image.fromarray(np.where(inside[0].permute(1, 2, 0).cpu().numpy() > 0, np.array(new), np.array(old)))
        for new, old, inside in zip(to_pil(generated), to_pil(image), mask.split(1), strict=True)
    ]
