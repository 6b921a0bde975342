"""The Fréchet distance where it has a closed form."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torchmetrics.image import FrechetInceptionDistance

from ldm.evaluation.frechet import LatentFeatures, frechet_distance
from ldm.models.autoencoder import Autoencoder, Identity

PIXELS = Autoencoder(Identity())


def random_images(seed: int, count: int = 400) -> torch.Tensor:
    return torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) - 0.5


def test_the_distance_of_a_set_to_itself_is_0() -> None:
    assert frechet_distance(PIXELS, random_images(0), random_images(0)) == pytest.approx(0, abs=1e-4)


def test_the_distance_to_a_brighter_set_is_the_squared_shift_of_the_means() -> None:
    """Equal covariances: only ‖μ − μ'‖² is left, over 48 means."""
    shift = 51 / 255 * 2  # a multiple of an 8-bit step
    real = random_images(0)
    assert frechet_distance(PIXELS, real, real + shift) == pytest.approx(48 * shift**2, rel=1e-3)


def test_the_distance_to_a_set_of_twice_the_contrast_is_the_trace_and_the_squared_mean() -> None:
    """√(Σ·4Σ) = 2Σ, so tr(Σ + 4Σ − 2·2Σ) = tr Σ; the mean doubles, which adds ‖μ‖²."""
    real = random_images(0)
    features = LatentFeatures(PIXELS)((real * 127.5 + 127.5).round().byte()).pooled.double()
    expected = float(features.T.cov().trace() + features.mean(0).square().sum())
    assert frechet_distance(PIXELS, real, 2 * real) == pytest.approx(expected, rel=0.02)


def test_the_features_of_an_autoencoder_on_a_gpu_are_on_the_cpu_as_the_metrics_sums_are() -> None:
    with FakeTensorMode():  # has a GPU on every machine
        autoencoder = Autoencoder(Identity()).to(torch.device("cuda"))
        images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
        assert autoencoder.encode(images.float()).device.type == "cuda"
        assert LatentFeatures(autoencoder)(images).pooled.device.type == "cpu"


def test_the_distance_is_torchmetrics_of_the_same_latents() -> None:
    class Pooled(torch.nn.Module):
        num_features = 48

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return LatentFeatures(PIXELS)(images).pooled

    real, generated = random_images(0), random_images(1) * 1.2
    metric = FrechetInceptionDistance(Pooled(), input_img_size=(3, 8, 8)).set_dtype(torch.float64)
    for images, is_real in ((real, True), (generated, False)):
        metric.update((images.clamp(-1, 1) * 127.5 + 127.5).round().byte(), real=is_real)
    assert frechet_distance(PIXELS, real, generated) == pytest.approx(float(metric.compute()), rel=1e-6)
