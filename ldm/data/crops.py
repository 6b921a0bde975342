"""Which part of an image is used, and how it is resized to the size of its bucket."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps

from ldm.config.schema import DataConfig
from ldm.data.images import Size, to_tensor


@dataclass(frozen=True)
class Augmentation:
    """What varies between two samples of the same image: which crop, mirrored or not.

    `crops` is the number of random crops in a cache, None for the centre crop. A source may override `flip`.
    """

    crops: int | None = None
    flip: bool = False

    @classmethod
    def of(cls, data: DataConfig) -> Augmentation:
        return cls(data.crops if data.crop == "random" else None, data.flip)


@dataclass(frozen=True)
class Crop:
    """A crop of an image: its size, the number of the random crop (-1: the centre), mirrored or not."""

    size: Size
    number: int = -1
    flip: bool = False

    def pixels(self, image: Image.Image, sha256: bytes) -> torch.Tensor:
        """`(3, H, W)` in [-1, 1]."""
        return to_tensor(self.apply(image, sha256))

    def apply(self, image: Image.Image, sha256: bytes) -> Image.Image:
        """The crop of an image, or of its mask; `sha256` is the image's."""
        cropped, _ = crop_resize(image, self.size, *self._uv(sha256))
        return ImageOps.mirror(cropped) if self.flip else cropped

    def corner(self, original: Size, sha256: bytes) -> Size:
        """The crop's left and top, in pixels of the resized image, which is mirrored first."""
        u, v = self._uv(sha256)
        return crop_box(original, self.size, 1 - u if self.flip else u, v)[1]

    def _uv(self, sha256: bytes) -> tuple[float, float]:
        """The position follows from the crop's number and the image's content, so that runs can share a cache."""
        if self.number < 0:
            return 0.5, 0.5
        u, v = np.random.default_rng([self.number, *sha256]).random(2)
        return float(u), float(v)


def crop_resize(image: Image.Image, size: Size, u: float = 0.5, v: float = 0.5) -> tuple[Image.Image, Size]:
    """The largest part of an image with the aspect ratio of `size`, resized to it (Lanczos, antialiased).

    `u`, `v` in [0, 1] are its horizontal and vertical position in the image; 0.5 is the centre. Also returns the crop's
    left and top, in pixels of the resized image.
    """
    box, corner = crop_box(image.size, size, u, v)
    return (image if image.size == size else image.resize(size, Image.Resampling.LANCZOS, box=box)), corner


def crop_box(original: Size, size: Size, u: float, v: float) -> tuple[tuple[float, float, float, float], Size]:
    """The part that `crop_resize` keeps, in pixels of the original; its left and top in those of the resized image."""
    scale = max(size[0] / original[0], size[1] / original[1])
    width, height = size[0] / scale, size[1] / scale
    left, top = max(0.0, u * (original[0] - width)), max(0.0, v * (original[1] - height))
    # Rounding may put a box slightly outside, which Pillow refuses.
    box = (left, top, min(left + width, original[0]), min(top + height, original[1]))
    return box, (round(left * scale), round(top * scale))
