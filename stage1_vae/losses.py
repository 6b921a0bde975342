"""What the autoencoder is trained on. Everything is a mean, so the learning rate does not depend on the resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def gradient_loss(rebuilt: torch.Tensor, real: torch.Tensor, scales: int = 3) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical differences, over an average pyramid: edges stay sharp.

    `(N, C, H, W)` each → scalar. After the gradient difference loss of Mathieu et al., arXiv 1511.05440, eq. 6.
    """
    loss = rebuilt.new_zeros(())
    for _ in range(scales):
        error = rebuilt - real  # a difference of differences is the difference of the error
        loss = loss + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        rebuilt, real = F.avg_pool2d(rebuilt, 2), F.avg_pool2d(real, 2)
    return loss / scales


def kl_loss(mean: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """KL(N(mean, exp logvar) ‖ N(0, 1)), mean over elements. Kingma & Welling, arXiv 1312.6114, appendix B."""
    return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
