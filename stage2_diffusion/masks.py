"""Random masks for training an inpainting model: boxes, brush strokes, a missing side, sometimes everything."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image, ImageDraw


def random_mask(rng: np.random.Generator, height: int, width: int) -> torch.Tensor:
    """A mask `(1, height, width)` of 0 and 1; 1 marks pixels to generate, at least one of them."""
    image = Image.new("L", (width, height))
    draw, kind = ImageDraw.Draw(image), rng.random()
    if kind < 0.1:  # everything, so that the model can also generate complete images
        draw.rectangle((0, 0, width, height), fill=1)
    elif kind < 0.25:  # a side is missing: outpainting
        share, side = rng.uniform(0.2, 0.7), rng.integers(4)
        x, y = round(width * share), round(height * share)
        boxes = ((0, 0, x, height), (width - x, 0, width, height), (0, 0, width, y), (0, height - y, width, height))
        draw.rectangle(boxes[side], fill=1)
    elif kind < 0.6:
        for _ in range(rng.integers(1, 4)):
            w, h = rng.uniform(0.15, 0.6, 2) * (width, height)
            left, top = rng.uniform(0, 1, 2) * (width - w, height - h)
            draw.rectangle((left, top, left + w, top + h), fill=1)
    else:
        for _ in range(rng.integers(1, 4)):
            points = rng.uniform(0, 1, (rng.integers(2, 6), 2)) * (width, height)
            thick = max(1, round(min(width, height) * rng.uniform(0.08, 0.25)))
            draw.line([tuple(point) for point in points], fill=1, width=thick, joint="curve")
            for x, y in points:
                draw.ellipse((x - thick / 2, y - thick / 2, x + thick / 2, y + thick / 2), fill=1)
    mask = torch.from_numpy(np.array(image, dtype=np.float32))[None]
    if not mask.any():
        mask[:, height // 2, width // 2] = 1
    return mask
