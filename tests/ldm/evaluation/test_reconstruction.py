"""Reconstruction metrics, the recommendation that follows from them, and the networks of LPIPS and rFID."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from torchmetrics.functional.image import (
    multiscale_structural_similarity_index_measure,
    peak_signal_noise_ratio,
    structural_similarity_index_measure,
)

from ldm.evaluation.reconstruction import (
    BETAS,
    Bicubic,
    ReconstructionMetrics,
    max_scales,
    ms_ssim,
    recommend_action,
    reconstruction,
)

GOOD = {"psnr": 28.0, "ssim": 0.85, "red": 0.1, "green": -0.2, "blue": 0.3}
BICUBIC = {"psnr": 23.0, "ssim": 0.60, "lpips": 0.5}
UNIT = torch.ones(4)


def pairs(count: int, height: int, width: int, seed: int = 0, noise: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth images in [-1, 1] and noisy copies, some of whose values lie outside; `(count, 3, height, width)` both."""
    random = torch.Generator().manual_seed(seed)
    real = F.interpolate(torch.randn(count, 3, 8, 8, generator=random), (height, width), mode="bicubic").clamp(-1, 1)
    return real, real + noise * torch.randn(real.shape, generator=random)


def test_psnr_equals_its_definition_averaged_over_images() -> None:
    real = torch.zeros(2, 3, 32, 32)
    reconstructed = real.clone()
    reconstructed[0] += 0.2  # 0.1 of the range: 20 dB
    reconstructed[1] += 0.02  # 0.01 of the range: 40 dB
    batches = [(real[:1], reconstructed[:1]), (real[1:], reconstructed[1:])]
    assert reconstruction(batches)["psnr"] == pytest.approx(30, abs=1e-3)


def test_a_perfect_copy_has_ssim_1_and_values_are_clipped_to_the_range() -> None:
    real = torch.randn(2, 3, 32, 32).clamp(-1, 1)
    assert reconstruction([(real, real)])["ssim"] == pytest.approx(1, abs=1e-5)
    white = torch.ones(1, 3, 32, 32)
    assert reconstruction([(white, white + 0.01 * torch.rand(1, 3, 32, 32))])["ssim"] == pytest.approx(1, abs=1e-5)


def test_batched_metrics_equal_numpys_and_torchmetrics_on_the_full_set() -> None:
    real, reconstructed = pairs(5, 48, 64)
    metrics = ReconstructionMetrics(scales=3)
    for part in (slice(0, 2), slice(2, 5)):
        metrics.add(real[part], reconstructed[part])
    a, b = real.double().numpy() / 2 + 0.5, (reconstructed.double().numpy() / 2 + 0.5).clip(0, 1)
    squared = ((a - b) ** 2).mean((1, 2, 3))
    np.testing.assert_allclose(metrics.per_image["psnr"], -10 * np.log10(squared), rtol=1e-5)
    for channel, name in enumerate(("red", "green", "blue")):
        np.testing.assert_allclose(metrics.per_image[name], (b - a)[:, channel].mean((1, 2)) * 255, atol=1e-4)
    means = metrics.means()
    x, y = real / 2 + 0.5, (reconstructed / 2 + 0.5).clamp(0, 1)
    betas = tuple(beta / sum(BETAS[:3]) * sum(BETAS) for beta in BETAS[:3])
    assert means["psnr"] == pytest.approx(
        float(peak_signal_noise_ratio(y, x, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))), rel=1e-5
    )
    assert means["ssim"] == pytest.approx(float(structural_similarity_index_measure(y, x, data_range=1.0)), rel=1e-5)
    assert means["ms_ssim"] == pytest.approx(
        float(multiscale_structural_similarity_index_measure(y, x, data_range=1.0, betas=betas)), rel=1e-5
    )


def test_images_of_several_sizes_have_equal_weight() -> None:
    wide, square = pairs(3, 24, 48, seed=1), pairs(1, 32, 32, seed=2, noise=0.6)
    metrics = ReconstructionMetrics(scales=2)
    metrics.add(*wide)
    metrics.add(*square)
    separate = [ReconstructionMetrics(scales=2) for _ in range(2)]
    for of_one_size, pair in zip(separate, (wide, square), strict=True):
        of_one_size.add(*pair)
    for name, mean in metrics.means().items():
        assert mean == pytest.approx((3 * separate[0].means()[name] + separate[1].means()[name]) / 4, abs=1e-9)
        assert metrics.per_image[name].shape == (4,)
    assert metrics.means()["psnr"] == pytest.approx(reconstruction([wide, square])["psnr"])


def test_the_colour_bias_has_the_sign_and_size_of_the_shift() -> None:
    real = torch.zeros(2, 3, 16, 16)
    metrics = ReconstructionMetrics()
    metrics.add(real, real + torch.tensor([3.0, 0.0, -5.0])[:, None, None] / 127.5)  # redder and less blue
    means = metrics.means()
    assert (means["red"], means["green"], means["blue"]) == pytest.approx((3, 0, -5), abs=1e-4)


def test_a_nonfinite_image_is_counted_and_left_out_of_the_means() -> None:
    real, reconstructed = pairs(3, 32, 32)
    finite = ReconstructionMetrics()
    finite.add(real[:2], reconstructed[:2])
    reconstructed[2, 1, 5, 5] = torch.nan
    metrics = ReconstructionMetrics()
    metrics.add(real, reconstructed)
    assert (metrics.count, metrics.nonfinite) == (3, 1)
    assert metrics.per_image["psnr"].isnan().tolist() == [False, False, True]
    assert metrics.means() == pytest.approx(finite.means())
    # during training, the means must show it
    assert all(math.isnan(value) for value in reconstruction([(real, reconstructed)]).values())


@for_each(("side", "scales"), [(21, 0), (22, 2), (44, 3), (99, 4), (176, 5)])
def test_ms_ssim_uses_as_many_scales_as_fit_the_side(side: int, scales: int) -> None:
    assert max_scales(side) == scales
    assert max_scales(side - 1) < scales or not scales
    if scales:
        real, _ = pairs(1, side, side + 3)
        assert float(ms_ssim(real / 2 + 0.5, real / 2 + 0.5, scales)) == pytest.approx(1, abs=1e-5)


def test_bicubic_keeps_flat_colours_and_loses_detail_finer_than_its_factor() -> None:
    flat = torch.full((1, 3, 32, 32), 0.3)
    torch.testing.assert_close(Bicubic(8).decode(Bicubic(8).encode(flat)), flat)
    stripes = torch.tensor([-1.0, 1.0]).repeat(16).expand(1, 3, 32, 32)
    blurred = Bicubic(4).decode(Bicubic(4).encode(stripes))
    assert blurred.shape == stripes.shape
    assert float(blurred.std()) < 0.1


# ------------------------------------------------------------------------------------------------------ recommendations


@for_each(
    ("means", "std", "nonfinite", "expected", "reason"),
    [
        (GOOD, UNIT, 0, "keep", "PSNR 28.0 dB (bicubic 23.0), SSIM 0.850 (0.600)"),
        (GOOD | {"psnr": 24.0, "ssim": 0.62}, UNIT, 0, "tune the decoder", "too little detail"),
        (GOOD | {"psnr": 28.0, "ssim": 0.65}, UNIT, 0, "tune the decoder", "too little detail"),
        (GOOD | {"psnr": 22.0, "ssim": 0.59}, UNIT, 0, "retrain", "no better than shrinking images"),
        (GOOD | {"psnr": 22.0, "ssim": 0.62}, UNIT, 0, "tune the decoder", "too little detail"),
        (GOOD | {"blue": -2.4}, UNIT, 0, "tune the decoder", "R +0.1, G -0.2, B -2.4"),
        (GOOD | {"lpips": 0.2, "psnr": 23.5, "ssim": 0.61}, UNIT, 0, "keep", "LPIPS 0.200 (0.500)"),
        (GOOD | {"lpips": 0.4}, UNIT, 0, "tune the decoder", "LPIPS 0.400 (0.500)"),
        (GOOD | {"lpips": 0.4, "psnr": 22.0, "ssim": 0.5}, UNIT, 0, "tune the decoder", "LPIPS 0.400 (0.500)"),
        (GOOD | {"psnr": 41.0, "ssim": 0.99}, UNIT, 0, "keep", "PSNR 41.0"),
        (GOOD, torch.tensor([1.0, 0.01, 1.0, 5.0]), 0, "retrain", "channel 1 0.01, 3 5"),
        (GOOD, torch.tensor([1.0, torch.nan]), 0, "retrain", "channel 1 nan"),
        (GOOD, UNIT, 2, "retrain", "2 reconstructions have values that are not finite"),
        (dict.fromkeys(GOOD, torch.nan), UNIT, 3, "retrain", "3 reconstructions"),
    ],
)
def test_the_recommendation_follows_from_the_metrics(
    means: dict[str, float], std: torch.Tensor, nonfinite: int, expected: str, reason: str
) -> None:
    action, reasons = recommend_action(means, BICUBIC, std, nonfinite)
    assert action == expected
    assert reason in " ".join(reasons)


def test_an_exact_copy_is_kept_and_blurred_or_tinted_copies_are_not() -> None:
    real, _ = pairs(6, 64, 64)
    real = (real + 0.3 * torch.randn(real.shape, generator=torch.Generator().manual_seed(3))).clamp(-0.9, 0.9)
    bicubic = Bicubic(4)

    def recommended(reconstructed: torch.Tensor) -> str:
        metrics, baseline = ReconstructionMetrics(), ReconstructionMetrics()
        metrics.add(real, reconstructed)
        baseline.add(real, bicubic.decode(bicubic.encode(real)))
        return recommend_action(metrics.means(), baseline.means(), UNIT)[0]

    assert recommended(real) == "keep"
    assert recommended(F.avg_pool2d(real, 9, 1, 4)) == "retrain"
    assert recommended(0.35 * real + 0.65 * bicubic.decode(bicubic.encode(real))) != "retrain"
    assert recommended(real + torch.tensor([0.05, 0.0, 0.0])[:, None, None]) == "tune the decoder"
