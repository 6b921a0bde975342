"""How well an autoencoder gives pictures back."""

from __future__ import annotations

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def reconstruction(real: torch.Tensor, rebuilt: torch.Tensor) -> dict[str, float]:
    """PSNR in dB and SSIM of `(N, 3, H, W)` pictures in [-1, 1], each the mean over pictures."""
    real, rebuilt = real / 2 + 0.5, (rebuilt / 2 + 0.5).clamp(0, 1)
    psnr = peak_signal_noise_ratio(rebuilt, real, data_range=1.0, reduction="elementwise_mean", dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(rebuilt, real, data_range=1.0)
    return {"psnr": float(psnr), "ssim": float(ssim)}  # type: ignore[arg-type]
