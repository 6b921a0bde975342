"""Targets, grids and weights of few-step distillation, on Gaussian data whose optimal denoiser is known."""

from __future__ import annotations

import torch
from cases import for_each
from diffusers import DDIMScheduler

from ldm.diffusion.distillation import ddim_step, progressive_target, pseudo_huber, x0_weight
from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.few_steps import first_order_scheduler, lcm_scheduler, noise_levels
from ldm.sampling.loop import sample
from ldm.sampling.solvers import Level, Solver, scheduler

PROCESSES = [
    DiffusionProcess("flow"),
    DiffusionProcess("flow", shift=3.0),
    DiffusionProcess("v"),
    DiffusionProcess("x0", "cosine"),
    DiffusionProcess("v", "cosine", zero_snr=True),
    DiffusionProcess("x0", zero_snr=True, timesteps=100),
]
MEAN, STD = 0.4, 0.7  # of the data


def optimal_x0(process: DiffusionProcess, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """The optimal denoiser, E[x_0 | z_t]."""
    alpha, sigma = process.alpha_sigma(t)
    return MEAN + alpha * STD**2 * (z - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@for_each("process", PROCESSES)
def test_a_step_to_the_progressive_target_ends_where_the_teachers_two_steps_end(process: DiffusionProcess) -> None:
    (t, _, alpha, sigma), half = noise_levels(process, 4), noise_levels(process, 8)
    i, z = torch.arange(4), noise(4)
    x0 = optimal_x0(process, z, t)
    middle = ddim_step(x0, z, alpha[:4], sigma[:4], half.alpha[1::2], half.sigma[1::2])
    x0 = optimal_x0(process, middle, half.t[1::2])
    end = ddim_step(x0, middle, half.alpha[1::2], half.sigma[1::2], alpha[i + 1], sigma[i + 1])
    target = progressive_target(z, end, alpha[:4], sigma[:4], alpha[i + 1], sigma[i + 1])
    torch.testing.assert_close(ddim_step(target, z, alpha[:4], sigma[:4], alpha[i + 1], sigma[i + 1]), end)
    torch.testing.assert_close(target[-1], x0[-1])  # the last two steps end in an image
    assert (target - optimal_x0(process, z, t)).abs().max() > 0.01  # a step of the optimal denoiser ends elsewhere


@for_each("process", PROCESSES)
def test_the_exported_scheduler_visits_these_noise_levels(process: DiffusionProcess) -> None:
    visited, levels = [], noise_levels(process, 5)

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        visited.append(level.t)
        i = torch.full((len(x),), len(visited) - 1)
        x0 = optimal_x0(process, x, levels.t[i])
        return process.target_from(x0, (x - levels.alpha[i] * x0) / levels.sigma[i], levels.t[i])

    samples = sample(denoise, Solver(first_order_scheduler(process), 5, noise(3).device), noise(3))
    assert torch.equal(torch.stack(visited), levels.model_time)
    z = noise(3)
    for i, t in enumerate(levels.t):
        alphas_sigmas = levels.alpha[i], levels.sigma[i], levels.alpha[i + 1], levels.sigma[i + 1]
        z = ddim_step(optimal_x0(process, z, t.expand(3)), z, *alphas_sigmas)
    # diffusers sets α = 2⁻¹² for 0
    torch.testing.assert_close(samples, z, rtol=0, atol=1e-3 if process.zero_snr else 1e-5)


@for_each("process", PROCESSES)
def test_a_grid_of_half_as_many_steps_has_every_other_level(process: DiffusionProcess) -> None:
    half, full = noise_levels(process, 5), noise_levels(process, 10)
    for few, many in zip(half, full, strict=True):
        torch.testing.assert_close(few, many[::2])
    assert (float(full.alpha[-1]), float(full.sigma[-1])) == (1, 0)


def test_steps_that_divide_the_chain_equal_diffusers_ddim() -> None:
    process = DiffusionProcess("v", "cosine")

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        t = level.t.expand(len(x))
        x0 = optimal_x0(process, x, t)
        alpha, sigma = process.alpha_sigma(t)
        return process.target_from(x0, (x - alpha * x0) / sigma, t)

    ddim = scheduler(process, "ddim")
    assert isinstance(ddim, DDIMScheduler)
    samples, expected = (
        sample(denoise, Solver(noise_scheduler, 8, noise(2).device), noise(2))
        for noise_scheduler in (first_order_scheduler(process), ddim)
    )
    torch.testing.assert_close(samples, expected, rtol=0, atol=1e-5)


def test_the_x0_weights_give_the_error_of_v_or_the_larger_error_of_x0_and_eps() -> None:
    process, t = DiffusionProcess("v"), torch.tensor([5, 300, 700, 999])
    x0, z = noise(4), noise(4).flip(0)
    alpha, sigma = process.alpha_sigma(t)
    error = (optimal_x0(process, z, t) - x0).square()
    eps_error = ((z - alpha * x0) / sigma - (z - alpha * optimal_x0(process, z, t)) / sigma).square()
    v = [(process.target_from(x, (z - alpha * x) / sigma, t)) for x in (x0, optimal_x0(process, z, t))]
    torch.testing.assert_close(x0_weight("v", alpha, sigma) * error, (v[0] - v[1]).square())
    torch.testing.assert_close(x0_weight("snr_truncated", alpha, sigma) * error, torch.maximum(error, eps_error))


def test_the_lcm_scheduler_has_the_noise_levels_and_target_of_its_process() -> None:
    process = DiffusionProcess("v", "cosine", zero_snr=True)
    solver = lcm_scheduler(process, 20)
    solver.set_timesteps(4)
    t = solver.timesteps
    torch.testing.assert_close(solver.alphas_cumprod[t].sqrt(), process.alpha_sigma(t)[0].flatten(), rtol=0, atol=1e-5)
    assert solver.config.prediction_type == "v_prediction"
    assert {int(timestep) % 50 for timestep in t} == {49}  # every 50th of 1000 is a step of the teacher's 20
    assert solver.get_scalings_for_boundary_condition_discrete(0) == (1, 0)


def test_the_pseudo_huber_loss_is_squared_for_small_errors_and_absolute_for_large() -> None:
    zero = torch.zeros(1, 1, 1, 1)
    near, far = (pseudo_huber(zero + d, zero, 0.1) for d in (1e-3, 100.0))
    torch.testing.assert_close(near, torch.tensor([1e-6 / 0.2]), rtol=1e-2, atol=0)
    torch.testing.assert_close(far, torch.tensor([100.0]), rtol=1e-2, atol=0)
