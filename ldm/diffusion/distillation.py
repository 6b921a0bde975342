"""Distillation to few steps: what a student learns from its teacher's steps. Pure functions.

Progressive distillation, arXiv 2202.00512; latent consistency, arXiv 2310.04378.
"""

from __future__ import annotations

import torch


def ddim_step(
    x0: torch.Tensor,
    z: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    alpha_to: torch.Tensor,
    sigma_to: torch.Tensor,
) -> torch.Tensor:
    """From z = z_t to another noise level, deterministically, where x_0 is predicted; DDIM, eq. 12 with η = 0."""
    eps = (z - alpha * x0) / sigma
    return alpha_to * x0 + sigma_to * eps


def progressive_target(
    z: torch.Tensor,
    z_end: torch.Tensor,
    alpha: torch.Tensor,
    sigma: torch.Tensor,
    alpha_end: torch.Tensor,
    sigma_end: torch.Tensor,
) -> torch.Tensor:
    """The x_0 with which one DDIM step from z ends in z_end, where the teacher's two steps ended."""
    ratio = sigma_end / sigma
    return (z_end - ratio * z) / (alpha_end - ratio * alpha)  # arXiv 2202.00512, Algorithm 2


def x0_weight(kind: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Weight of x_0's squared error by noise level: `snr_truncated`, or `v`, which makes it the error of v."""
    snr = (alpha / sigma).square()
    return snr.clamp(min=1) if kind == "snr_truncated" else 1 + snr  # arXiv 2202.00512, section 4


def pseudo_huber(a: torch.Tensor, b: torch.Tensor, c: float) -> torch.Tensor:
    """√((a − b)² + c²) − c, averaged over each sample, `(N,)`: quadratic up to about c, linear beyond."""
    return (((a - b).square() + c**2).sqrt() - c).flatten(1).mean(1)
