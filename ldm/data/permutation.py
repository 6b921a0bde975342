"""A random permutation of any size as a function: nothing of its size is stored or shuffled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

ROUNDS = 8  # pairs of Feistel rounds; with 4, permutations of five elements are measurably uneven
MASK = 2**64 - 1


class Permutation:
    """A permutation of 0 … `size` - 1 that follows from `key`, some integers: `permutation[i]` is i's image.

    A generalised Feistel cipher on pairs of digits, walked along its cycles until the result is below `size`: Black and
    Rogaway, Ciphers with Arbitrary Finite Domains (2002), methods 3 and 2. TensorFlow's `random_index_shuffle` and
    Grain shuffle so too, with another round function.
    """

    def __init__(self, size: int, key: tuple[int, ...]):
        self.size = size
        self._base = math.isqrt(size - 1) + 1  # of the low digit; the number of high ones
        self._high = -(-size // self._base)  # exceeds the size by less than the base, so walks are short
        self._keys = np.random.default_rng(key).integers(0, MASK, (ROUNDS, 2), np.uint64, endpoint=True).tolist()

    def __getitem__(self, i: int) -> int:
        image: int = self._cipher(i)
        while image >= self.size:
            image = self._cipher(image)
        return image

    def take(self, indices: np.ndarray) -> np.ndarray:
        """The images of all `indices`, `(N,)` uint64."""
        images = self._cipher(indices.astype(np.uint64))
        while (over := images >= self.size).any():
            images[over] = self._cipher(images[over])
        return images

    def _cipher(self, i: Any) -> Any:
        """Of an integer or of an array of uint64."""
        high, low = i // self._base, i % self._base
        for first, second in self._keys:
            low = (low + _mix(high ^ first) % self._base) % self._base
            high = (high + _mix(low ^ second) % self._high) % self._high
        return high * self._base + low


def _mix(x: Any) -> Any:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), which mixes the bits of an integer below 2**64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & MASK
    return x ^ (x >> 31)
