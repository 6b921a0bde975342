"""The schedulers of distilled models, and the noise levels that they evaluate."""

from __future__ import annotations

from typing import NamedTuple

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler

from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.solvers import scheduler


def first_order_scheduler(process: DiffusionProcess) -> DPMSolverMultistepScheduler:
    """DPM-Solver++ of first order: it is DDIM for a chain, and Euler's method for a flow.

    Each of its steps ends exactly where the next one begins. With diffusers' DDIMScheduler that holds only where the
    number of steps divides that of the chain, and its last step may stop short of the image.
    """
    return DPMSolverMultistepScheduler.from_config(scheduler(process, "dpm++").config, solver_order=1)


def lcm_scheduler(process: DiffusionProcess, original_steps: int) -> LCMScheduler:
    """The scheduler of a consistency model that was distilled from `original_steps` steps of the chain."""
    config = scheduler(process, "ddim").config
    return LCMScheduler.from_config(config, original_inference_steps=original_steps, clip_sample=False)


class NoiseLevels(NamedTuple):
    """The noise levels that `first_order_scheduler` evaluates in N steps, noisiest first."""

    t: torch.Tensor
    """`(N,)`: times of the process."""
    model_time: torch.Tensor
    """`(N,)`: the times that the network gets there."""
    alpha: torch.Tensor
    """`(N + 1, 1, 1, 1)`, as σ is; the last level, α = 1 and σ = 0, is the image."""
    sigma: torch.Tensor


def noise_levels(process: DiffusionProcess, steps: int, device: torch.device | None = None) -> NoiseLevels:
    """The noise levels of `steps` steps. Half as many steps use every other one (on a chain, up to rounding)."""
    solver = first_order_scheduler(process)
    solver.set_timesteps(steps)
    model_time = solver.timesteps.to(device)
    t = solver.sigmas[:-1].to(device) if process.prediction_type == "flow" else model_time
    alpha, sigma = process.alpha_sigma(t)
    return NoiseLevels(t, model_time, torch.cat([alpha, torch.ones_like(alpha[:1])]), torch.cat([sigma, 0 * sigma[:1]]))
