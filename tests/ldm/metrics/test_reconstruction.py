"""Reconstruction figures."""

import pytest
import torch

from ldm.metrics.reconstruction import reconstruction


def test_psnr_is_its_definition_and_the_mean_over_pictures() -> None:
    real = torch.zeros(2, 3, 32, 32)
    rebuilt = real.clone()
    rebuilt[0] += 0.2  # 0.1 of the range: 20 dB
    rebuilt[1] += 0.02  # 0.01 of the range: 40 dB
    assert reconstruction([(real[:1], rebuilt[:1]), (real[1:], rebuilt[1:])])["psnr"] == pytest.approx(30, abs=1e-3)


def test_a_perfect_copy_has_ssim_one_and_clipping_is_applied() -> None:
    real = torch.randn(2, 3, 32, 32).clamp(-1, 1)
    assert reconstruction([(real, real)])["ssim"] == pytest.approx(1, abs=1e-5)
    white = torch.ones(1, 3, 32, 32)
    assert reconstruction([(white, white + 0.01 * torch.rand(1, 3, 32, 32))])["ssim"] == pytest.approx(1, abs=1e-5)
