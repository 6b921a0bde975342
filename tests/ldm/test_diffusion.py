"""The forward process and its targets."""

import pytest
import torch
from diffusers import DDPMScheduler

from ldm.diffusion import TIMESTEPS, Process, betas

CHAINS = [(target, schedule) for target in ("eps", "x0", "v") for schedule in ("linear", "scaled_linear", "cosine")]
EVERY = [*CHAINS, ("flow", "")]


def draw(process: Process, n: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 2, 3, 3, generator=g)
    return x0, eps, process.time(torch.rand(n, generator=g) * 0.9)


@pytest.mark.parametrize(("target", "schedule"), EVERY)
def test_a_perfect_prediction_gives_the_picture_back(target: str, schedule: str) -> None:
    process = Process(target, schedule)
    x0, eps, t = draw(process)
    x_t = process.add_noise(x0, eps, t)
    torch.testing.assert_close(process.x0_of(process.target_of(x0, eps, t), x_t, t), x0, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("schedule", ["linear", "scaled_linear", "cosine"])
def test_the_closed_form_is_the_chain_iterated(schedule: str) -> None:
    """DDPM, eq. 2 step by step against eq. 4: mean and variance of x_t for x_0 = 1."""
    mean, variance = 1.0, 0.0
    process = Process("eps", schedule)
    for t, beta in enumerate(betas(schedule).tolist()):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        if t % 111 == 0:
            alpha, sigma = process.alpha_sigma(torch.tensor([t]))
            assert float(alpha) == pytest.approx(mean, rel=1e-5)
            assert float(sigma) ** 2 == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")]
)
def test_schedules_and_targets_are_those_of_diffusers(ours: str, theirs: str) -> None:
    start, end = (0.0001, 0.02) if ours == "linear" else (0.00085, 0.012)
    reference = DDPMScheduler(beta_schedule=theirs, beta_start=start, beta_end=end)
    process = Process("v", ours)
    x0, eps, t = draw(process)
    torch.testing.assert_close(betas(ours).float(), reference.betas, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(process.add_noise(x0, eps, t), reference.add_noise(x0, eps, t), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(process.target_of(x0, eps, t), reference.get_velocity(x0, eps, t), atol=1e-3, rtol=1e-3)


def test_the_flow_target_is_the_derivative_of_its_path() -> None:
    process = Process("flow")
    x0, eps, t = (value.double() for value in draw(process))
    h = 1e-4
    slope = (process.add_noise(x0, eps, t + h) - process.add_noise(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(slope, process.target_of(x0, eps, t))


def test_training_times_cover_their_range() -> None:
    u = (torch.arange(10000) + 0.5) / 10000
    chain = Process("eps").time(u)
    assert chain.min() == 0
    assert chain.max() == TIMESTEPS - 1
    assert torch.bincount(chain).unique().tolist() == [10]
    flow = Process("flow", time_mean=0.5, time_std=0.8).time(u)
    logit = torch.logit(flow)
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(logit.std()) == pytest.approx(0.8, abs=0.01)
