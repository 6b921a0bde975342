"""The schedulers of distilled models, and the noise levels that they visit."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler

from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.solvers import scheduler


def first_order(process: DiffusionProcess) -> DPMSolverMultistepScheduler:
    """DDIM for a chain, Euler's step for a flow: DPM-Solver++ of first order is either.

    Its steps end exactly where the next ones begin. Those of diffusers' DDIMScheduler do so only where their number
    divides the chain's, and its last one may stop short of the picture.
    """
    return DPMSolverMultistepScheduler.from_config(scheduler(process, "dpm++").config, solver_order=1)


def consistent(process: DiffusionProcess, original_steps: int) -> LCMScheduler:
    """The sampler of a consistency model that was distilled from so many steps of the chain."""
    config = scheduler(process, "ddim").config
    return LCMScheduler.from_config(config, original_inference_steps=original_steps, clip_sample=False)


class Grid(NamedTuple):
    """The noise levels that `first_order` visits in N steps, noisiest first."""

    t: torch.Tensor
    """`(N,)`: times of the process."""
    model_time: torch.Tensor
    """`(N,)`: the same as the network takes them."""
    alpha: torch.Tensor
    """`(N + 1, 1, 1, 1)`, as σ: the last level, α = 1 and σ = 0, is the picture."""
    sigma: torch.Tensor


def grid(process: DiffusionProcess, steps: int, device: torch.device | None = None) -> Grid:
    """The grid of `steps` steps; that of half as many is every other level of it, for a chain up to rounding."""
    solver = first_order(process)
    solver.set_timesteps(steps)
    model_time = solver.timesteps.to(device)
    t = solver.sigmas[:-1].to(device) if process.prediction_type == "flow" else model_time
    alpha, sigma = process.alpha_sigma(t)
    return Grid(t, model_time, torch.cat([alpha, torch.ones_like(alpha[:1])]), torch.cat([sigma, 0 * sigma[:1]]))
