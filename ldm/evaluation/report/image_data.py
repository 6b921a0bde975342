"""Images small enough to be part of a page."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

GOOD, FAIR = 80, 50  # WebP's quality
SMALLEST = 64  # pixels; what is so small stays as it is


def data_uri(path: Path, width: int, limit: int) -> str:
    """The image as WebP, at most `width` pixels wide and `limit` bytes long, as a `data:` address.

    Its quality is lowered where it would be too long, then its size. OSError where the file can't be read.
    """
    with Image.open(path) as file:
        image = _on_white(file)
    if image.width > width:
        image = _scaled(image, width / image.width)
    data = _encoded(image, GOOD)
    if len(data) > limit:
        data = _encoded(image, FAIR)
    while len(data) > limit and max(image.size) > SMALLEST:
        image = _scaled(image, max(0.5, 0.9 * math.sqrt(limit / len(data))))
        data = _encoded(image, FAIR)
    return "data:image/webp;base64," + base64.b64encode(data).decode()


def _encoded(image: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "WEBP", quality=quality, method=2)
    return buffer.getvalue()


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0)


def spread(items: Sequence[Path], most: int) -> list[int]:
    """Indices of at most so many items, evenly spaced, the first and the last among them."""
    if len(items) <= most:
        return list(range(len(items)))
    return sorted({round(i * (len(items) - 1) / (most - 1)) for i in range(most)})


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode in ("RGBA", "LA", "P", "PA"):
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")
