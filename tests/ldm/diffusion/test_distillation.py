"""What a student of few steps learns, on data whose perfect denoiser is known."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler

from ldm.diffusion.distillation import ddim_step, progressive_target, pseudo_huber, x0_weight
from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.few_steps import first_order_scheduler, grid, lcm_scheduler
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
MEAN, SPREAD = 0.4, 0.7  # of the data, which are Gaussian


def perfect(process: DiffusionProcess, z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """E[x_0 | z_t]."""
    alpha, sigma = process.alpha_sigma(t)
    return MEAN + alpha * SPREAD**2 * (z - alpha * MEAN) / (alpha**2 * SPREAD**2 + sigma**2)


def noise(count: int) -> torch.Tensor:
    return torch.randn(count, 2, 4, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("process", PROCESSES)
def test_one_step_to_the_target_ends_where_the_teachers_two_did(process: DiffusionProcess) -> None:
    (t, _, alpha, sigma), half = grid(process, 4), grid(process, 8)
    i, z = torch.arange(4), noise(4)
    x0 = perfect(process, z, t)
    middle = ddim_step(x0, z, alpha[:4], sigma[:4], half.alpha[1::2], half.sigma[1::2])
    x0 = perfect(process, middle, half.t[1::2])
    end = ddim_step(x0, middle, half.alpha[1::2], half.sigma[1::2], alpha[i + 1], sigma[i + 1])
    found = progressive_target(z, end, alpha[:4], sigma[:4], alpha[i + 1], sigma[i + 1])
    torch.testing.assert_close(ddim_step(found, z, alpha[:4], sigma[:4], alpha[i + 1], sigma[i + 1]), end)
    torch.testing.assert_close(found[-1], x0[-1])  # two steps that end in a picture
    assert (found - perfect(process, z, t)).abs().max() > 0.01  # one step of the perfect denoiser ends elsewhere


@pytest.mark.parametrize("process", PROCESSES)
def test_the_grid_is_what_the_exported_scheduler_visits(process: DiffusionProcess) -> None:
    visited, levels = [], grid(process, 5)

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        visited.append(level.t)
        i = torch.full((len(x),), len(visited) - 1)
        x0 = perfect(process, x, levels.t[i])
        return process.target_from(x0, (x - levels.alpha[i] * x0) / levels.sigma[i], levels.t[i])

    found = sample(denoise, Solver(first_order_scheduler(process), 5, noise(3).device), noise(3))
    assert torch.equal(torch.stack(visited), levels.model_time)
    z = noise(3)
    for i, t in enumerate(levels.t):
        at = levels.alpha[i], levels.sigma[i], levels.alpha[i + 1], levels.sigma[i + 1]
        z = ddim_step(perfect(process, z, t.expand(3)), z, *at)
    torch.testing.assert_close(found, z, rtol=0, atol=1e-3 if process.zero_snr else 1e-5)  # they have α = 2⁻¹² for 0


@pytest.mark.parametrize("process", PROCESSES)
def test_half_as_many_steps_visit_every_other_level(process: DiffusionProcess) -> None:
    half, whole = grid(process, 5), grid(process, 10)
    for few, many in zip(half, whole, strict=True):
        torch.testing.assert_close(few, many[::2])
    assert (float(whole.alpha[-1]), float(whole.sigma[-1])) == (1, 0)


def test_steps_of_a_chain_are_those_of_diffusers_ddim_where_they_divide_it() -> None:
    process = DiffusionProcess("v", "cosine")

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        at = level.t.expand(len(x))
        x0 = perfect(process, x, at)
        alpha, sigma = process.alpha_sigma(at)
        return process.target_from(x0, (x - alpha * x0) / sigma, at)

    theirs = scheduler(process, "ddim")
    assert isinstance(theirs, DDIMScheduler)
    found, expected = (
        sample(denoise, Solver(rule, 8, noise(2).device), noise(2)) for rule in (first_order_scheduler(process), theirs)
    )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_weighted_errors_of_x0_are_those_of_v_or_of_the_larger_of_x0_and_eps() -> None:
    process, t = DiffusionProcess("v"), torch.tensor([5, 300, 700, 999])
    x0, z = noise(4), noise(4).flip(0)
    alpha, sigma = process.alpha_sigma(t)
    error = (perfect(process, z, t) - x0).square()
    of_eps = ((z - alpha * x0) / sigma - (z - alpha * perfect(process, z, t)) / sigma).square()
    of_v = [(process.target_from(x, (z - alpha * x) / sigma, t)) for x in (x0, perfect(process, z, t))]
    torch.testing.assert_close(x0_weight("v", alpha, sigma) * error, (of_v[0] - of_v[1]).square())
    torch.testing.assert_close(x0_weight("snr_truncated", alpha, sigma) * error, torch.maximum(error, of_eps))


def test_a_consistency_model_is_sampled_as_its_process_says() -> None:
    process = DiffusionProcess("v", "cosine", zero_snr=True)
    solver = lcm_scheduler(process, 20)
    solver.set_timesteps(4)
    t = solver.timesteps
    torch.testing.assert_close(solver.alphas_cumprod[t].sqrt(), process.alpha_sigma(t)[0].flatten(), rtol=0, atol=1e-5)
    assert solver.config.prediction_type == "v_prediction"
    assert {int(each) % 50 for each in t} == {49}  # each 50th of 1000 is one of the teacher's 20
    assert solver.get_scalings_for_boundary_condition_discrete(0) == (1, 0)


def test_the_pseudo_huber_loss_is_squared_near_and_absolute_far() -> None:
    zero = torch.zeros(1, 1, 1, 1)
    near, far = (pseudo_huber(zero + d, zero, 0.1) for d in (1e-3, 100.0))
    torch.testing.assert_close(near, torch.tensor([1e-6 / 0.2]), rtol=1e-2, atol=0)
    torch.testing.assert_close(far, torch.tensor([100.0]), rtol=1e-2, atol=0)
