"""Flat areas and edges, against their closed forms."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from ldm.evaluation.reconstruction import ReconstructionMetrics
from ldm.evaluation.sharpness import edge_width, flat_deviation


def halves(side: int = 32) -> torch.Tensor:
    """An image whose right half is light grey, the left one dark."""
    return (0.2 + 0.6 * (torch.arange(side) >= side // 2)).expand(1, 3, side, side).contiguous()


def test_the_deviation_of_flat_areas_is_that_of_the_noise_on_them() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.full((1, 3, 128, 128), 0.5)
    noise = 0.02 * torch.randn(real.shape, generator=generator)
    within = 255 * 0.02 * (24 / 25) ** 0.5  # a window of 25 pixels has its own mean
    assert float(flat_deviation(real + noise, real)) == pytest.approx(within, rel=0.02)
    assert float(flat_deviation(real, real)) == float(flat_deviation(real + 0.25, real)) == 0


def test_two_pixels_on_each_side_of_an_edge_are_no_flat_area() -> None:
    real = halves()
    near, far = real.clone(), real.clone()
    near[..., 14:18] = torch.rand(1, 3, 32, 4)
    far[..., 13] = 0.1  # one pixel further away
    assert float(flat_deviation(near, real)) == pytest.approx(0, abs=1e-4)
    assert float(flat_deviation(far, real)) > 0


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("width", [1, 3, 5])
def test_a_blur_by_a_box_makes_an_edge_as_wide_as_the_box(width: int, transposed: bool) -> None:
    real = halves()
    padded = F.pad(real, (width // 2, width // 2, 0, 0), mode="replicate")
    blurred = F.avg_pool2d(padded, (1, width), 1)
    if transposed:
        real, blurred = real.mT, blurred.mT
    assert float(edge_width(blurred, real)) == pytest.approx(width, rel=1e-5)


@pytest.mark.parametrize(("contrast", "width"), [(0.6, 1), (0.3, 2), (0.15, 4), (0.05, 8), (0, 8), (-0.6, 8)])
def test_an_edge_is_wider_by_as_much_as_it_fades(contrast: float, width: float) -> None:
    real = halves()
    assert float(edge_width(0.5 + (real - 0.5) * contrast / 0.6, real)) == pytest.approx(width, rel=1e-4)


def test_a_saturated_channel_does_not_make_a_colour_flatter() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = 0.02 * torch.randn(1, 3, 64, 64, generator=generator)
    grey, red = torch.full((1, 3, 64, 64), 0.5), torch.zeros(1, 3, 64, 64)
    red[:, 0], red[:, 1] = 1, 0.5
    of_green = flat_deviation((red + noise).clamp(0, 1), red)
    torch.testing.assert_close(of_green, flat_deviation(grey + noise, grey), rtol=0.05, atol=0)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_white_and_black_are_no_flat_colours(value: float) -> None:
    real = torch.full((1, 3, 32, 32), value)
    assert flat_deviation(torch.rand(1, 3, 32, 32), real).isnan()


def test_images_without_flat_areas_or_edges_do_not_count() -> None:
    noise, flat = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)), torch.zeros(1, 3, 32, 32)
    assert flat_deviation(noise, noise).isnan() and edge_width(flat, flat).isnan()
    small = halves(7)
    assert flat_deviation(small, small).isnan() and edge_width(small, small).isnan()
    metrics = ReconstructionMetrics()
    metrics.add(2 * noise - 1, 2 * noise - 1)
    assert "flat" not in metrics.means()
    metrics.add(2 * halves() - 1, 2 * halves() - 1)
    assert metrics.means()["flat"] == 0 and metrics.means()["edge"] == 1
