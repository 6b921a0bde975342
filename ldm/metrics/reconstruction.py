"""How well an autoencoder gives pictures back."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure


def reconstruction(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """PSNR in dB and SSIM, each the mean over pictures, of batches of real and rebuilt ones.

    A batch is `(N, 3, H, W)` in [-1, 1]; batches may differ in size.
    """
    psnr, ssim, count = 0.0, 0.0, 0
    for real, rebuilt in pairs:
        real, rebuilt = real / 2 + 0.5, (rebuilt / 2 + 0.5).clamp(0, 1)
        each = peak_signal_noise_ratio(rebuilt, real, data_range=1.0, reduction="none", dim=(1, 2, 3))
        psnr += float(each.sum())
        ssim += float(structural_similarity_index_measure(rebuilt, real, data_range=1.0)) * len(real)  # type: ignore[arg-type]
        count += len(real)
    return {"psnr": psnr / count, "ssim": ssim / count}
