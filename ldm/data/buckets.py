"""Aspect-ratio buckets: the sizes that images are resized to."""

from __future__ import annotations

import math

from ldm.config.schema import BucketConfig
from ldm.data.images import Size


class Buckets:
    """The sizes that images are resized to: one square, or sizes of about the same area and various aspect ratios.

    `sizes` lists them, ordered by aspect ratio. With `upscale: false`, small images get smaller sizes besides these.
    """

    def __init__(self, size: int, config: BucketConfig | None = None):
        self.config = config
        sizes = {(size, size)}
        if config:
            step = config.step
            low = -(-(config.smallest or size // 2) // step) * step
            high = (config.largest or size * 2) // step * step
            sides = {side: min(high, size**2 // side // step * step) for side in range(low, high + 1, step)}
            sizes = {pair for a, b in sides.items() if b >= low for pair in ((a, b), (b, a))}
        self.sizes: tuple[Size, ...] = tuple(sorted(sizes, key=lambda wh: (wh[0] / wh[1], wh)))

    def of(self, width: int, height: int) -> Size:
        """The bucket, of the nearest aspect ratio, for an image of `width × height` pixels."""
        ratio = math.log(width / height)
        best = min(self.sizes, key=lambda wh: (abs(ratio - math.log(wh[0] / wh[1])), -wh[0] * wh[1]))
        if self.config and not self.config.upscale:
            step = self.config.step
            return (max(step, min(best[0], width // step * step)), max(step, min(best[1], height // step * step)))
        return best
