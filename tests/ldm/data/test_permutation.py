"""Shuffles as functions: bijective for any size, and as even as shuffled arrays."""

import math
from collections import Counter

import numpy as np
import pytest

from ldm.data.permutation import Permutation

SIZES = (1, 2, 3, 4, 5, 7, 8, 9, 16, 17, 31, 32, 97, 100, 127, 128, 1000, 1009, 4095, 4096, 4097, 65_537, 1_000_003)


@pytest.mark.parametrize("size", SIZES)
def test_each_index_comes_once(size: int) -> None:
    for key in range(3):
        images = Permutation(size, (key, 1)).take(np.arange(size))
        assert np.array_equal(np.sort(images), np.arange(size))


def test_one_index_is_permuted_as_many_are() -> None:
    for size in (1, 7, 4097, 10**8, 2**40 + 1):
        permutation = Permutation(size, (3,))
        indices = np.unique(np.linspace(0, size - 1, 200).astype(np.uint64))
        assert permutation.take(indices).tolist() == [permutation[i] for i in indices.tolist()]


def test_keys_give_different_permutations() -> None:
    images = {
        tuple(Permutation(50, key).take(np.arange(50))) for key in ((0, 0), (0, 1), (1, 0), (0, 0, 1), (2**40, 0))
    }
    assert len(images) == 5


def deviation(counts: np.ndarray, freedom: int) -> float:
    """The chi-square of counts that should be equal, in standard deviations from its mean."""
    expected = counts.mean()
    return float((((counts - expected) ** 2 / expected).sum() - freedom) / math.sqrt(2 * freedom))


@pytest.mark.parametrize("size", [2, 3, 5, 10, 16, 50])
def test_each_index_comes_equally_often_at_each_position(size: int) -> None:
    counts = np.zeros((size, size))
    for key in range(4000):
        counts[np.arange(size), Permutation(size, (key, 7)).take(np.arange(size)).astype(int)] += 1
    assert abs(deviation(counts, (size - 1) ** 2)) < 4


@pytest.mark.parametrize(
    "size", [3, 4, pytest.param(5, marks=pytest.mark.drill), pytest.param(6, marks=pytest.mark.drill)]
)
def test_each_order_of_a_few_comes_equally_often(size: int) -> None:
    orders = Counter(tuple(Permutation(size, (key, 9)).take(np.arange(size)).tolist()) for key in range(7200))
    assert len(orders) == math.factorial(size)
    assert abs(deviation(np.array([*orders.values()]), math.factorial(size) - 1)) < 4


def test_positions_of_a_large_permutation_are_uniform_and_neighbours_independent() -> None:
    size = 10**8
    images = Permutation(size, (1, 2)).take(np.arange(200_000)).astype(float) / size
    counts, _ = np.histogram(images, 1000, (0, 1))
    assert abs(deviation(counts, 999)) < 4
    pairs, _, _ = np.histogram2d(images[:-1], images[1:], 30, [(0, 1)] * 2)
    assert abs(deviation(pairs, 899)) < 4
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 4 / math.sqrt(len(images))
