"""The forward process, its prediction targets and its posterior, against papers and libraries."""

from typing import Any

import pytest
import torch
from cases import for_each
from diffusers import DDIMScheduler, DDPMScheduler

from ldm.diffusion.likelihood import reverse_step
from ldm.diffusion.parameterization import PREDICTION_TYPES
from ldm.diffusion.process import TIMESTEPS, DiffusionProcess, betas, offset_noise, perturbed
from ldm.diffusion.schedules import SCHEDULES

CHAINS = [(target, schedule) for target in ("eps", "x0", "v") for schedule in ("linear", "scaled_linear", "cosine")]
EVERY = [*CHAINS, ("flow", "")]


def draw(process: DiffusionProcess, n: int = 64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 2, 3, 3, generator=g)
    return x0, eps, process.time(torch.rand(n, generator=g) * 0.9)


@for_each(("target", "schedule"), EVERY)
def test_a_perfect_prediction_gives_x0(target: str, schedule: str) -> None:
    process = DiffusionProcess(target, schedule)
    x0, eps, t = draw(process)
    x_t = process.add_noise(x0, eps, t)
    torch.testing.assert_close(process.predict_x0(process.target_from(x0, eps, t), x_t, t), x0, atol=2e-3, rtol=2e-3)


@for_each("schedule", ["linear", "scaled_linear", "cosine"])
def test_the_closed_form_equals_the_iterated_chain(schedule: str) -> None:
    """DDPM, eq. 2 step by step against eq. 4: mean and variance of x_t for x_0 = 1."""
    mean, variance = 1.0, 0.0
    process = DiffusionProcess("eps", schedule)
    for t, beta in enumerate(betas(schedule).tolist()):
        mean, variance = (1 - beta) ** 0.5 * mean, (1 - beta) * variance + beta
        if t % 111 == 0:
            alpha, sigma = process.alpha_sigma(torch.tensor([t]))
            assert float(alpha) == pytest.approx(mean, rel=1e-5)
            assert float(sigma) ** 2 == pytest.approx(variance, rel=1e-5)


@for_each(
    ("schedule", "diffusers_schedule"),
    [("linear", "linear"), ("scaled_linear", "scaled_linear"), ("cosine", "squaredcos_cap_v2")],
)
def test_schedules_and_targets_equal_diffusers(schedule: str, diffusers_schedule: str) -> None:
    start, end = (0.0001, 0.02) if schedule == "linear" else (0.00085, 0.012)
    reference = DDPMScheduler(beta_schedule=diffusers_schedule, beta_start=start, beta_end=end)
    process = DiffusionProcess("v", schedule)
    x0, eps, t = draw(process)
    torch.testing.assert_close(betas(schedule).float(), reference.betas, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(process.add_noise(x0, eps, t), reference.add_noise(x0, eps, t), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(
        process.target_from(x0, eps, t), reference.get_velocity(x0, eps, t), atol=1e-3, rtol=1e-3
    )


def test_the_flow_target_is_the_derivative_of_its_path() -> None:
    process = DiffusionProcess("flow")
    x0, eps, t = (value.double() for value in draw(process))
    h = 1e-4
    slope = (process.add_noise(x0, eps, t + h) - process.add_noise(x0, eps, t - h)) / (2 * h)
    torch.testing.assert_close(slope, process.target_from(x0, eps, t))


def test_training_timesteps_cover_their_range() -> None:
    u = (torch.arange(10000) + 0.5) / 10000
    chain = DiffusionProcess("eps").time(u)
    assert chain.min() == 0
    assert chain.max() == TIMESTEPS - 1
    assert torch.bincount(chain).unique().tolist() == [10]
    flow = DiffusionProcess("flow", logit_mean=0.5, logit_std=0.8).time(u)
    logit = torch.logit(flow)
    assert float(logit.mean()) == pytest.approx(0.5, abs=0.01)
    assert float(logit.std()) == pytest.approx(0.8, abs=0.01)


@for_each(
    "process",
    [
        DiffusionProcess("flow", logit_mean=0.5),
        DiffusionProcess("flow", shift=3.0),
        DiffusionProcess("v", timestep_sampling="logit_normal"),
    ],
)
def test_a_timestep_is_the_same_in_any_batch(process: DiffusionProcess) -> None:
    u = torch.rand(64, generator=torch.Generator().manual_seed(0))
    for size in (1, 3, 8, 16, 40):
        assert torch.equal(torch.cat([process.time(part) for part in u.split(size)]), process.time(u)), size


def chain_batch(n: int = 32, timesteps: int = 1000) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x_0, ε in float64 and timesteps of the chain, the first and the last among them."""
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, n, 2, 3, 3, generator=g, dtype=torch.float64)
    t = torch.randint(timesteps, (n,), generator=g)
    t[:2] = torch.tensor([0, timesteps - 1])
    return x0, eps, t


def diffusers_scheduler(process: DiffusionProcess, kind: type, **options: object) -> Any:
    """diffusers' scheduler with a process's own tables, in float64."""
    reference = kind(process.timesteps, clip_sample=False, **options)
    table = process.chain()
    reference.betas, reference.alphas, reference.alphas_cumprod = table.beta, 1 - table.beta, table.alpha_bar
    reference.one = reference.final_alpha_cumprod = torch.ones((), dtype=torch.float64)
    reference.set_timesteps(process.timesteps)
    return reference


CHAIN_PROCESSES = [
    DiffusionProcess(target, schedule, timesteps=timesteps, zero_snr=zero_snr, shift=shift)
    for target in ("eps", "x0", "v")
    for schedule in SCHEDULES
    for timesteps, zero_snr, shift in [(1000, False, 1.0), (50, False, 2.0), (100, True, 1.0), (30, True, 2.0)]
    if not (zero_snr and target == "eps")
]
CHAIN_IDS = [f"{p.prediction_type}-{p.beta_schedule}-{p.timesteps}{'-zero' * p.zero_snr}" for p in CHAIN_PROCESSES]


@for_each("process", CHAIN_PROCESSES)
def test_noising_and_velocity_equal_diffusers_bit_for_bit(process: DiffusionProcess) -> None:
    x0, eps, t = chain_batch(timesteps=process.timesteps)
    reference = diffusers_scheduler(process, DDPMScheduler)
    assert torch.equal(process.add_noise(x0, eps, t), reference.add_noise(x0, eps, t))
    assert torch.equal(process.target_from(x0, eps, t, "v"), reference.get_velocity(x0, eps, t))


@for_each("process", CHAIN_PROCESSES)
def test_predictions_give_the_same_x0_and_noise_as_diffusers(process: DiffusionProcess) -> None:
    x0, eps, t = chain_batch(timesteps=process.timesteps)
    names = {"eps": "epsilon", "x0": "sample", "v": "v_prediction"}
    reference = diffusers_scheduler(
        process, DDIMScheduler, prediction_type=names[process.prediction_type], set_alpha_to_one=True
    )
    x_t, prediction = process.add_noise(x0, eps, t), process.target_from(x0, eps, t)
    x0_pred, eps_pred = process.predict_x0(prediction, x_t, t), process.predict_eps(prediction, x_t, t)
    before = process.chain().alpha_bar_before
    for i in range(len(t)):
        result = reference.step(prediction[i], int(t[i]), x_t[i])
        assert torch.equal(x0_pred[i], result.pred_original_sample)
        # DDIM, eq. 12 without noise
        previous = before[t[i]].sqrt() * x0_pred[i] + (1 - before[t[i]]).sqrt() * eps_pred[i]
        torch.testing.assert_close(previous, result.prev_sample, rtol=1e-9, atol=1e-9)


@for_each("process", CHAIN_PROCESSES)
def test_the_posterior_equals_a_step_of_diffusers_ddpm(process: DiffusionProcess) -> None:
    """Mean and variance; diffusers computes β from the quotient of two ᾱ, so they are equal up to rounding."""
    x0, eps, t = chain_batch(timesteps=process.timesteps)
    reference = diffusers_scheduler(process, DDPMScheduler, prediction_type="sample")
    x_t = process.add_noise(x0, eps, t)
    mean, variance, log_variance = process.posterior(x0, x_t, t)
    for i in range(len(t)):
        g = torch.Generator().manual_seed(i)
        previous = reference.step(x0[i], int(t[i]), x_t[i], generator=g).prev_sample
        if t[i] == 0:
            torch.testing.assert_close(mean[i], previous, rtol=1e-9, atol=1e-9)
            assert float(variance[i]) == 0
            continue
        noise = torch.randn(x0[i].shape, generator=torch.Generator().manual_seed(i), dtype=torch.float64)
        torch.testing.assert_close(mean[i] + variance[i].sqrt() * noise, previous, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(variance[i].squeeze(), reference._get_variance(int(t[i])), rtol=1e-8, atol=0)
        torch.testing.assert_close(log_variance[i].exp(), variance[i], rtol=1e-12, atol=0)


@for_each("process", CHAIN_PROCESSES)
def test_the_posterior_follows_from_bayes_rule(process: DiffusionProcess) -> None:
    """q(x_{t-1} | x_0)·q(x_t | x_{t-1}), two Gaussians, against q(x_t | x_0)·q(x_{t-1} | x_t, x_0), at any x_{t-1}."""
    x0, eps, t = chain_batch(timesteps=process.timesteps)
    t = t.clamp(min=1)
    x_t = process.add_noise(x0, eps, t)
    mean, variance, _ = process.posterior(x0, x_t, t)
    beta, alpha_bar, before = (table[t][:, None, None, None] for table in process.chain()[:3])

    def log_density(x: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor) -> torch.Tensor:
        return -0.5 * ((x - mean) ** 2 / variance + variance.log())

    x_before = mean + 0.7 * variance.sqrt()
    forwards = log_density(x_before, before.sqrt() * x0, 1 - before) + log_density(
        x_t, (1 - beta).sqrt() * x_before, beta
    )
    backwards = log_density(x_t, alpha_bar.sqrt() * x0, 1 - alpha_bar) + log_density(x_before, mean, variance)
    torch.testing.assert_close(forwards, backwards, rtol=1e-8, atol=1e-8)


@for_each("zero_snr", [False, True])
def test_single_steps_accumulate_to_the_closed_form(zero_snr: bool) -> None:
    """The mean and the variance of DDPM, eq. 2, iterated from x_0 = 1, against eq. 4."""
    process = DiffusionProcess("v", "cosine", timesteps=40, zero_snr=zero_snr)
    mean, variance = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for step in range(40):
        beta = process.chain().beta[step]
        mean, variance = (1 - beta).sqrt() * mean, (1 - beta) * variance + beta
        alpha, sigma = process.alpha_sigma(torch.tensor([step]), torch.float64)
        torch.testing.assert_close(mean, alpha, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(variance, sigma**2, rtol=1e-12, atol=1e-12)


@for_each("process", [*CHAIN_PROCESSES, DiffusionProcess("flow")])
@for_each("to", PREDICTION_TYPES)
def test_a_prediction_converts_to_every_other_target(process: DiffusionProcess, to: str) -> None:
    x0, eps, t = chain_batch(timesteps=process.timesteps)
    t = (
        process.time(torch.linspace(0.001, 0.999, len(t), dtype=torch.float64))
        if process.prediction_type == "flow"
        else t
    )
    x_t = process.add_noise(x0, eps, t)
    converted = process.convert(process.target_from(x0, eps, t), x_t, t, to)
    # x0 and eps divide by alpha and sigma, which are as small as 2e-5 and 6e-3
    torch.testing.assert_close(converted, process.target_from(x0, eps, t, to), rtol=1e-9, atol=1e-9)


def test_at_zero_terminal_snr_v_is_minus_x0_and_eps_is_refused() -> None:
    x0, eps, _ = chain_batch()
    process, last = DiffusionProcess("v", zero_snr=True), torch.full((len(x0),), 999)
    x_t = process.add_noise(x0, eps, last)
    assert torch.equal(x_t, eps)
    assert torch.equal(process.target_from(x0, eps, last), -x0)
    assert torch.equal(process.predict_x0(-x0, x_t, last), x0)
    assert torch.equal(process.predict_eps(-x0, x_t, last), eps)
    with pytest.raises(ValueError, match="'eps' can't be used with zero_snr"):
        DiffusionProcess("eps", zero_snr=True)


def test_impossible_processes_are_refused() -> None:
    with pytest.raises(ValueError, match="prediction_type: 'noise'; give eps, x0, v or flow"):
        DiffusionProcess("noise")
    with pytest.raises(ValueError, match="beta_schedule: 'quadratic'"):
        DiffusionProcess("eps", "quadratic")
    with pytest.raises(ValueError, match="timestep_sampling: 'often'"):
        DiffusionProcess("eps", timestep_sampling="often")
    with pytest.raises(ValueError, match="shift: 0"):
        DiffusionProcess("flow", shift=0)
    with pytest.raises(ValueError, match="a flow has no chain"):
        DiffusionProcess("flow").chain()
    with pytest.raises(ValueError, match="prediction_type: 'noise'"):
        DiffusionProcess("eps").target_from(*chain_batch(), "noise")


@for_each("schedule", ["linear", "cosine", "sigmoid"])
@for_each(("target", "objective"), [("eps", "pred_noise"), ("x0", "pred_x0"), ("v", "pred_v")])
def test_the_process_equals_denoising_diffusion_pytorch(target: str, objective: str, schedule: str) -> None:
    package = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")

    class Network(torch.nn.Module):
        channels = out_dim = 2
        self_condition = False

    reference = package.GaussianDiffusion(Network(), image_size=3, objective=objective, beta_schedule=schedule)
    process = DiffusionProcess(target, schedule)
    x0, eps, t = chain_batch()
    x0, eps = x0.float(), eps.float()
    x_t = process.add_noise(x0, eps, t)
    tolerance = {"rtol": 2e-4, "atol": 2e-4} if schedule == "sigmoid" else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(x_t, reference.q_sample(x0, t, eps), **tolerance)
    torch.testing.assert_close(process.target_from(x0, eps, t, "v"), reference.predict_v(x0, t, eps), **tolerance)
    mean, variance, log_variance = process.posterior(x0, x_t, t)
    expected_mean, expected_variance, expected_log_variance = reference.q_posterior(x0, x_t, t)
    torch.testing.assert_close(mean, expected_mean, **tolerance)
    torch.testing.assert_close(variance, expected_variance, rtol=1e-3, atol=0)
    later = t > 0  # at 0 the package takes the logarithm of 1e-20; Improved DDPM, as here, that of the next variance
    torch.testing.assert_close(log_variance[later], expected_log_variance[later], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        process.predict_x0(eps, x_t, t)[t < 900],
        {
            "eps": reference.predict_start_from_noise,
            "x0": lambda x_t, t, value: value,
            "v": reference.predict_start_from_v,
        }[target](x_t, t, eps)[t < 900],
        rtol=1e-2,
        atol=1e-2,
    )


def test_training_timesteps_stay_on_a_chain_of_any_length() -> None:
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    assert DiffusionProcess("v", timesteps=7).time(u).tolist() == [0, 3, 6]
    assert DiffusionProcess("v", timesteps=1).time(u).tolist() == [0, 0, 0]
    assert DiffusionProcess("v", timestep_sampling="logit_normal").time(u).tolist() == [8, 500, 991]
    assert DiffusionProcess("flow", timestep_sampling="uniform").time(u).tolist() == pytest.approx(
        [0, 0.5, 1], abs=2e-6
    )
    assert DiffusionProcess("flow", timestep_sampling="uniform", shift=3.0).time(u)[1] == 0.75
    assert bool(
        torch.isfinite(
            DiffusionProcess("flow", timestep_sampling="uniform").log_snr(
                DiffusionProcess("flow", timestep_sampling="uniform").time(u)
            )
        ).all()
    )


def test_offset_noise_and_perturbation_add_their_variance() -> None:
    g = torch.Generator().manual_seed(0)
    eps, xi = torch.randn(2, 4000, 1, 4, 4, generator=g)
    shifted = offset_noise(eps, torch.randn(4000, 1, 1, 1, generator=g), 0.5)
    assert float(shifted.var()) == pytest.approx(1 + 0.25, rel=0.02)
    assert float(shifted.mean((1, 2, 3)).var()) == pytest.approx(1 / 16 + 0.25, rel=0.05)
    assert float(perturbed(eps, xi, 0.5).mean((1, 2, 3)).var()) == pytest.approx(1.25 / 16, rel=0.1)


def test_a_learned_variance_lies_between_its_two_bounds() -> None:
    """Improved DDPM, eq. 15, against diffusers' `learned_range`."""
    process = DiffusionProcess("eps", "cosine", timesteps=100)
    reference = diffusers_scheduler(process, DDPMScheduler, variance_type="learned_range")
    v = torch.linspace(-1, 1, 18, dtype=torch.float64).reshape(1, 2, 3, 3)
    for step in (1, 50, 98):
        log_variance = process.learned_log_variance(v, torch.tensor([step]))
        torch.testing.assert_close(
            log_variance, reference._get_variance(step, predicted_variance=v), rtol=1e-6, atol=1e-6
        )
        small, large = process.log_variances(torch.tensor([step]), torch.float64)
        assert float(log_variance.flatten()[0]) == pytest.approx(float(small))
        assert float(log_variance.flatten()[-1]) == pytest.approx(float(large))


@for_each(
    "process", [DiffusionProcess("eps", "cosine"), DiffusionProcess("v", "scaled_linear", zero_snr=True, shift=2.0)]
)
def test_a_respaced_chain_keeps_noise_levels_and_their_model_timesteps(
    process: DiffusionProcess,
) -> None:
    alpha_bar = process.chain().alpha_bar
    for steps in (1, 7, 50, 1000):
        few = process.respaced(steps)
        model_timesteps = few.model_time(torch.arange(steps))
        assert int(model_timesteps[-1]) == process.timesteps - 1  # the noisiest, where sampling starts
        torch.testing.assert_close(few.chain().alpha_bar, alpha_bar[model_timesteps], atol=1e-12, rtol=1e-9)
    twice = process.respaced(100).respaced(10)
    assert twice.model_timesteps == process.respaced(10).model_timesteps
    for steps in (0, 1001):
        with pytest.raises(ValueError, match=f"steps: {steps}; give 1 to 1000"):
            process.respaced(steps)


def test_a_respaced_chain_equals_diffusers_trailing_ddpm() -> None:
    process, x = (
        DiffusionProcess("eps", "scaled_linear"),
        torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0)),
    )
    eps = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    noise_scheduler = DDPMScheduler(
        trained_betas=process.chain().beta.tolist(), timestep_spacing="trailing", clip_sample=False
    )
    noise_scheduler.set_timesteps(20)
    few = process.respaced(20)
    assert few.model_timesteps == tuple(noise_scheduler.timesteps.flip(0).tolist())
    for i in (1, 10, 19):
        mean, log_variance = reverse_step(few, eps, x, torch.full((2,), i))
        noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
        expected = noise_scheduler.step(
            eps, few.model_timesteps[i], x, generator=torch.Generator().manual_seed(2)
        ).prev_sample
        torch.testing.assert_close(mean + (0.5 * log_variance).exp() * noise, expected, atol=1e-5, rtol=1e-4)


@for_each(
    "process", [DiffusionProcess("eps", "cosine"), DiffusionProcess("x0", "log_linear"), DiffusionProcess("flow")]
)
def test_the_time_of_a_log_snr_has_that_log_snr(process: DiffusionProcess) -> None:
    log_snr = torch.linspace(-6, 6, 25)
    t = process.time_at(log_snr)
    tolerance = 1e-4 if process.prediction_type == "flow" else 0.1  # a chain's timesteps are integers
    torch.testing.assert_close(process.log_snr(t), log_snr, atol=tolerance, rtol=0)
