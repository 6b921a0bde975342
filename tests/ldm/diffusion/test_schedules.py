"""Noise schedules against the libraries that define them, and their identities."""

import pytest
import torch
from cases import for_each
from diffusers import DDIMScheduler, DDPMScheduler

from ldm.diffusion.losses import bound_integrand
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.schedules import (
    SCHEDULES,
    LearnedSchedule,
    alpha_sigma,
    betas,
    lower_variance,
    shift_snr,
    shift_time,
    zero_terminal_snr,
)

DIFFUSERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "scaled_linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


@for_each("zero_snr", [False, True])
@for_each("scheduler", [DDPMScheduler, DDIMScheduler])
@for_each("schedule", DIFFUSERS)
def test_float32_schedules_equal_diffusers_bit_for_bit(schedule: str, scheduler: type, zero_snr: bool):
    reference = scheduler(**DIFFUSERS[schedule], rescale_betas_zero_snr=zero_snr)
    beta = betas(schedule, dtype=torch.float32)
    beta = zero_terminal_snr(beta) if zero_snr else beta
    assert torch.equal(beta, reference.betas)
    assert torch.equal((1 - beta).cumprod(0), reference.alphas_cumprod)


@for_each("timesteps", [1, 7, 100, 4000])
def test_a_cosine_schedule_of_any_length_equals_diffusers(timesteps: int) -> None:
    reference = DDPMScheduler(timesteps, **DIFFUSERS["cosine"])
    assert torch.equal(betas("cosine", timesteps, torch.float32), reference.betas)


@for_each("timesteps", [50, 250, 1000])
@for_each("schedule", ["linear", "cosine", "sigmoid"])
def test_schedules_of_any_length_equal_denoising_diffusion_pytorch(schedule: str, timesteps: int) -> None:
    package = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")
    reference = getattr(package, f"{schedule}_beta_schedule")(timesteps).clamp(max=0.999)
    # The package's sigmoid computes its ends in float32.
    torch.testing.assert_close(
        betas(schedule, timesteps), reference, rtol=1e-3 if schedule == "sigmoid" else 1e-9, atol=0
    )


@for_each("timesteps", [1, 2, 10, 333, 1000])
@for_each("schedule", SCHEDULES)
def test_betas_lie_between_0_and_1_and_alpha_bar_falls(schedule: str, timesteps: int) -> None:
    beta = betas(schedule, timesteps)
    assert beta.shape == (timesteps,)
    assert beta.dtype == torch.float64
    assert float(beta.min()) > 0
    assert float(beta.max()) < 1
    assert bool(((1 - beta).cumprod(0).diff() < 0).all())


@for_each("schedule", SCHEDULES)
def test_the_final_noise_level_hardly_depends_on_the_number_of_steps(schedule: str) -> None:
    ends = [float((1 - betas(schedule, timesteps)).prod()) for timesteps in (250, 1000, 4000)]
    assert max(ends) < 0.01
    assert max(ends) < 5 * min(ends) or max(ends) < 1e-4


@for_each("shift", [1.0, 2.0])
@for_each("schedule", SCHEDULES)
def test_zero_terminal_snr_is_exactly_0_and_keeps_the_first_step(schedule: str, shift: float) -> None:
    table = DiffusionProcess("v", schedule, zero_snr=True, shift=shift).chain()
    unscaled = DiffusionProcess("v", schedule, shift=shift).chain()
    assert float(table.alpha_bar[-1]) == 0
    assert float(table.alpha_bar[0]) == pytest.approx(float(unscaled.alpha_bar[0]), abs=1e-12)
    assert bool(torch.isfinite(table.log_snr).all())


@for_each("schedule", ["linear", "scaled_linear", "cosine"])
def test_a_resolution_shift_moves_log_snr_by_twice_the_logarithm_of_the_ratio(schedule: str) -> None:
    unshifted, shifted = ((1 - beta).cumprod(0) for beta in (betas(schedule), shift_snr(betas(schedule), 2.0)))
    keep = slice(0, 990)  # without cosine's last, clipped steps
    difference = torch.logit(shifted)[keep] - torch.logit(unshifted)[keep]
    torch.testing.assert_close(difference, torch.full_like(difference, -2 * torch.log(torch.tensor(2.0)).item()))
    assert torch.equal(shift_snr(betas(schedule), 1.0), betas(schedule))


def test_a_shifted_flow_time_has_a_log_snr_lower_by_twice_the_logarithm_of_the_ratio() -> None:
    """arXiv 2403.03206 derives eq. 23 from the standard deviation of a mean; in log-SNR it is the same shift."""
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    difference = -2 * torch.logit(shift_time(t, 3.0)) + 2 * torch.logit(t)
    torch.testing.assert_close(difference, torch.full_like(difference, -2 * torch.log(torch.tensor(3.0)).item()))
    assert torch.equal(shift_time(t, 1.0), t)
    assert shift_time(torch.tensor([0.0, 1.0]), 3.0).tolist() == [0, 1]


def test_impossible_schedules_are_refused() -> None:
    with pytest.raises(
        ValueError, match="beta_schedule: 'quadratic'; give linear, scaled_linear, cosine, sigmoid or log_linear"
    ):
        betas("quadratic")
    with pytest.raises(ValueError, match="timesteps: 0"):
        betas("linear", 0)
    with pytest.raises(ValueError, match="2 steps at least"):
        zero_terminal_snr(betas("cosine", 1))
    with pytest.raises(ValueError, match="shift: -1"):
        shift_snr(betas("cosine"), -1)
    with pytest.raises(ValueError, match="shift: 0"):
        shift_time(torch.ones(1), 0)


def test_a_learned_schedule_falls_between_its_ends_for_any_weights() -> None:
    t = torch.linspace(0, 1, 101)
    for seed in range(5):
        schedule = LearnedSchedule(8.0, -6.0, width=16)
        g = torch.Generator().manual_seed(seed)
        for parameter in schedule.parameters():
            parameter.data = torch.randn(parameter.shape, generator=g)
        log_snr, slope = (value.detach() for value in schedule.draw(t))
        assert float(log_snr[0]) == pytest.approx(8)
        assert float(log_snr[-1]) == pytest.approx(-6)
        assert bool((log_snr.diff() < 0).all())
        assert bool((slope > 0).all())
        alpha, sigma = alpha_sigma(log_snr)
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones_like(alpha))


def test_training_a_schedule_lowers_the_variance_of_the_bound_but_not_its_mean() -> None:
    """arXiv 2107.00630, section 5.1, on standard normal data: the optimal ε̂ is σ·x_t, and its expected error α²."""
    u = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    schedule = LearnedSchedule(5.0, -5.0, width=16).double()
    optimizer = torch.optim.Adam(schedule.parameters(), lr=0.05)
    means, stds = [], []
    for _ in range(150):
        log_snr, slope = schedule.draw(u)
        error = torch.sigmoid(log_snr).sqrt()[:, None]
        loss = bound_integrand(torch.zeros_like(error), error, slope)
        means.append(float(loss.detach().mean()))
        stds.append(float(loss.detach().std()))
        optimizer.zero_grad()
        loss.square().mean().backward()
        optimizer.step()
    ends = torch.nn.functional.softplus(torch.tensor([5.0, -5.0])).tolist()
    exact = 0.5 * (ends[0] - ends[1])  # ½ ∫ sigmoid(λ) dλ from -5 to 5
    assert means == pytest.approx([exact] * 150, rel=1e-3)
    assert stds[-1] < 0.5 * stds[0]


def test_a_single_backward_pass_gives_the_networks_and_the_schedules_gradients() -> None:
    """The network's gradient is that of the mean loss, the schedule's that of the mean squared loss."""
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, 16, 1, 2, 2, generator=g, dtype=torch.float64)
    u = torch.rand(16, generator=g, dtype=torch.float64)
    schedule = LearnedSchedule(width=8).double()
    weight = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)

    def losses() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        log_snr, slope = schedule.draw(u)
        alpha, sigma = alpha_sigma(log_snr)
        model_time = schedule.chain_time(log_snr, 1000)[:, None, None, None] / 1000
        prediction = weight[0] * (alpha * x0 + sigma * eps) + weight[1] * model_time
        return bound_integrand(prediction, eps, slope), log_snr, slope

    parameters = list(schedule.parameters())
    square_grads = torch.autograd.grad(losses()[0].square().mean(), parameters)
    (loss_grad,) = torch.autograd.grad(losses()[0].mean(), weight)
    values, log_snr, slope = losses()
    lower_variance(values, log_snr, slope)
    values.mean().backward()
    torch.testing.assert_close(weight.grad, loss_grad)
    for (name, parameter), expected in zip(schedule.named_parameters(), square_grads, strict=True):
        assert float(expected.abs().max()) > 0, name
        torch.testing.assert_close(parameter.grad, expected)


def test_a_learned_schedules_chain_time_is_its_timestep_on_the_log_linear_chain() -> None:
    schedule = LearnedSchedule()
    chain = DiffusionProcess("eps", "log_linear", timesteps=200)
    t = torch.arange(200)
    torch.testing.assert_close(schedule.chain_time(chain.log_snr(t), 200), t.float(), atol=2e-3, rtol=0)
