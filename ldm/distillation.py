"""Few steps instead of many: what a student learns from a teacher's steps. Pure functions, and the solvers' grids.

Progressive distillation, arXiv 2202.00512; latent consistency, arXiv 2310.04378.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler

from ldm.diffusion import Process
from ldm.solvers import scheduler


def first_order(process: Process) -> DPMSolverMultistepScheduler:
    """DDIM for a chain, Euler's step for a flow: DPM-Solver++ of first order is either.

    Its steps end exactly where the next ones begin. Those of diffusers' DDIMScheduler do so only where their number
    divides the chain's, and its last one may stop short of the picture.
    """
    return DPMSolverMultistepScheduler.from_config(scheduler(process, "dpm++").config, solver_order=1)


def consistent(process: Process, original_steps: int) -> LCMScheduler:
    """The sampler of a consistency model that was distilled from so many steps of the chain."""
    config = scheduler(process, "ddim").config
    return LCMScheduler.from_config(config, original_inference_steps=original_steps, clip_sample=False)


class Grid(NamedTuple):
    """The noise levels that `first_order` visits in N steps, noisiest first."""

    t: torch.Tensor
    """`(N,)`: times of the process."""
    told: torch.Tensor
    """`(N,)`: the same as the network is told them."""
    alpha: torch.Tensor
    """`(N + 1, 1, 1, 1)`, as σ: the last level, α = 1 and σ = 0, is the picture."""
    sigma: torch.Tensor


def grid(process: Process, steps: int, device: torch.device | None = None) -> Grid:
    """The grid of `steps` steps; that of half as many is every other level of it, for a chain up to rounding."""
    solver = first_order(process)
    solver.set_timesteps(steps)
    told = solver.timesteps.to(device)
    t = solver.sigmas[:-1].to(device) if process.target == "flow" else told
    alpha, sigma = process.alpha_sigma(t)
    return Grid(t, told, torch.cat([alpha, torch.ones_like(alpha[:1])]), torch.cat([sigma, 0 * sigma[:1]]))


def ddim_step(
    x0: torch.Tensor, z: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, alpha_to: torch.Tensor,
    sigma_to: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """From z = z_t to another noise level, deterministically, where x_0 is predicted; DDIM, eq. 12 with η = 0."""
    eps = (z - alpha * x0) / sigma
    return alpha_to * x0 + sigma_to * eps


def target_of_two(
    z: torch.Tensor, z_end: torch.Tensor, alpha: torch.Tensor, sigma: torch.Tensor, alpha_end: torch.Tensor,
    sigma_end: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The x_0 by which one DDIM step from z ends where the teacher's two did, in z_end."""
    ratio = sigma_end / sigma
    return (z_end - ratio * z) / (alpha_end - ratio * alpha)  # arXiv 2202.00512, Algorithm 2


def x0_weight(kind: str, alpha: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Of the squared error of x_0, by noise level: `snr_truncated` or `v` (the error of the velocity)."""
    snr = (alpha / sigma).square()
    return snr.clamp(min=1) if kind == "snr_truncated" else 1 + snr  # arXiv 2202.00512, section 4


def pseudo_huber(a: torch.Tensor, b: torch.Tensor, c: float) -> torch.Tensor:
    """√((a − b)² + c²) − c, the mean of each sample, `(N,)`: squared up to about c, absolute beyond."""
    return (((a - b).square() + c**2).sqrt() - c).flatten(1).mean(1)
