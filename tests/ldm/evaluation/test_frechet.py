"""The Fréchet distance, where it has a closed form."""

import pytest
import torch

from ldm.evaluation.frechet import Features, frechet_distance
from ldm.models.autoencoder import Autoencoder, Identity

PIXELS = Autoencoder(Identity())


def pictures(seed: int, count: int = 400) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) - 0.5


def test_of_a_set_to_itself_it_is_nothing() -> None:
    assert frechet_distance(PIXELS, pictures(0), pictures(0)) == pytest.approx(0, abs=1e-4)


def test_of_a_set_that_is_brighter_it_is_the_square_of_the_shift() -> None:
    """Equal covariances: only ‖μ − μ'‖² is left, over 48 means."""
    shift = 51 / 255 * 2  # whole steps of 8 bits
    assert frechet_distance(PIXELS, pictures(0), pictures(0) + shift) == pytest.approx(48 * shift**2, rel=1e-3)


def test_of_a_set_of_twice_the_contrast_it_is_its_variances_trace() -> None:
    """√(Σ·4Σ) = 2Σ, so tr(Σ + 4Σ − 2·2Σ) = tr Σ; and the mean, which doubles."""
    real = pictures(0)
    features = Features(PIXELS)((real * 127.5 + 127.5).round().byte()).double()
    expected = float(features.T.cov().trace() + features.mean(0).square().sum())
    assert frechet_distance(PIXELS, real, 2 * real) == pytest.approx(expected, rel=0.02)
