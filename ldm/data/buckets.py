"""Aspect-ratio buckets: the sizes that images are resized to."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ldm.config.schema import BucketConfig
from ldm.data.images import Size
from ldm.data.page_cache import address


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


class EntrySizes(Sequence[Size]):
    """The size of the bucket of each entry; `distinct` are those of all rows of the table, `of_row` their numbers."""

    def __init__(self, distinct: list[Size], of_row: np.ndarray, rows: np.ndarray):
        self.distinct, self._of_row, self._rows = distinct, of_row, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        return self.distinct[self._of_row[self._rows[i]]]

    def address(self, row: int) -> int:
        """Where the size of a row of the table is."""
        return address(self._of_row, row)

    def numbers(self) -> np.ndarray:
        """The number of each entry's size, `(N,)`."""
        return self._of_row[self._rows]

    def used(self) -> list[Size]:
        """The sizes that any entry has, sorted."""
        return [self.distinct[number] for number in np.flatnonzero(np.bincount(self.numbers()))]
