"""Bounds and densities on Gaussian data, whose entropy, density and optimal denoiser have closed forms."""

import math
from collections.abc import Callable

import pytest
import torch
from cases import for_each

from ldm.diffusion.likelihood import (
    bound,
    discrete_nll,
    gaussian_kl,
    gaussian_nll,
    log_density,
    reverse_step,
    step_kl,
)
from ldm.diffusion.process import DiffusionProcess

ENTROPY = 0.5 * math.log(2 * math.pi * math.e)  # of a standard normal number, in nats
CHAINS = [
    DiffusionProcess(target, schedule, timesteps=timesteps, zero_snr=zero_snr)
    for target in ("eps", "x0", "v")
    for schedule in ("linear", "cosine", "sigmoid")
    for timesteps, zero_snr in ((20, False), (20, True))
    if not (zero_snr and target == "eps")
] + [DiffusionProcess("eps", "scaled_linear", timesteps=200)]


def optimal_denoiser(process: DiffusionProcess, std: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The optimal denoiser of data N(0, std²): E[target | x_t], linear in x_t."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.alpha_sigma(t, x_t.dtype)
        variance = alpha**2 * std**2 + sigma**2
        x0, eps = alpha * std**2 / variance * x_t, sigma / variance * x_t
        return process.target_from(x0, eps, t)

    return denoise


def signs(std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and ε at ±std × ±1: the mean over them is the exact Gaussian expectation of any quadratic."""
    x0 = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)[:, None, None, None]
    eps = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)[:, None, None, None]
    return std * x0, eps


@for_each("process", CHAINS)
def test_the_bound_of_standard_normal_data_is_its_entropy(process: DiffusionProcess) -> None:
    """For this data the reverse steps have variance β exactly and the prior is exact: no bound is tighter."""
    x0, eps = signs(1.0)
    result = bound(process, optimal_denoiser(process, 1.0), x0, lambda t: eps, variance="large")
    assert float(result.total.mean()) == pytest.approx(ENTROPY, abs=1e-8)
    assert float(result.prior.mean()) + float(result.steps.mean(0).sum()) == pytest.approx(ENTROPY, abs=1e-8)
    assert result.steps.shape == (4, process.timesteps)


@for_each("process", CHAINS)
@for_each("std", [0.3, 1.7])
def test_a_learned_variance_reaches_the_entropy_of_any_gaussian(process: DiffusionProcess, std: float) -> None:
    """With the exact variance of q(x_{t-1} | x_t) the bound's only gap is the prior's mismatch, in closed form."""
    denoise = optimal_denoiser(process, std)

    def output(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        beta, alpha_bar, before = (table[t][:, None, None, None] for table in process.chain()[:3])
        x0_coefficient = beta * before.sqrt() / (1 - alpha_bar)
        posterior_variance = std**2 * (1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar)  # of x_0 given x_t
        variance = beta * (1 - before) / (1 - alpha_bar) + x0_coefficient**2 * posterior_variance
        small, large = process.log_variances(t, x_t.dtype)
        v = 2 * (variance.log() - small) / (large - small) - 1
        return torch.cat([denoise(x_t, t), v.expand_as(x_t)], 1)

    x0, eps = signs(std)
    result = bound(process, output, x0, lambda t: eps, variance="learned")
    last = process.chain().alpha_bar[-1]
    end = torch.log(last * std**2 + 1 - last)  # log-variance of x_T
    zero = torch.zeros((), dtype=torch.float64)
    mismatch = float(gaussian_kl(zero, end, zero, zero))
    assert float(result.total.mean()) == pytest.approx(ENTROPY + math.log(std) + mismatch, abs=1e-6)
    for fixed in ("small", "large"):
        assert float(bound(process, denoise, x0, lambda t: eps, fixed).total.mean()) > float(result.total.mean())


def test_a_worse_denoiser_has_a_worse_bound() -> None:
    process = DiffusionProcess("v", "cosine", timesteps=50)
    x0, eps = signs(1.0)
    good = optimal_denoiser(process, 1.0)
    bounds = [
        float(bound(process, lambda x, t, error=error: good(x, t) + error * x, x0, lambda t: eps, "large").total.mean())
        for error in (0.0, 0.1, 0.3)
    ]
    assert bounds == sorted(bounds)
    assert bounds[0] < bounds[1] < bounds[2]


def test_bits_per_pixel_are_just_above_the_entropy() -> None:
    """Gaussian data rounded to 256 levels; the gap is the noise of x_1, a bin wide."""
    process, std = DiffusionProcess("eps", "linear"), 0.2
    g = torch.Generator().manual_seed(0)
    values = torch.linspace(-1, 1, 256, dtype=torch.float64)
    code = discrete_nll(values, torch.zeros(()).double(), torch.tensor(2 * math.log(std)).double()) / math.log(2)
    samples = torch.multinomial(0.5**code, 4 * 256, replacement=True, generator=g)

    def noise(step: int) -> torch.Tensor:
        return torch.randn(4, 1, 16, 16, generator=g, dtype=torch.float64)

    pixels = values[samples].reshape(4, 1, 16, 16)
    result = bound(process, optimal_denoiser(process, std), pixels, noise, "large", "discrete")
    entropy = float(code[samples].mean())
    assert entropy < float(result.total.mean()) < entropy + 0.1


@for_each("mean", [-1.5, -0.3, 0.0, 0.7, 1.0])
@for_each("log_variance", [-12.0, -6.0, 0.0])
def test_the_discrete_decoders_probabilities_sum_to_1(mean: float, log_variance: float) -> None:
    x = torch.linspace(-1, 1, 256, dtype=torch.float64)
    nll = discrete_nll(x, torch.tensor(mean).double(), torch.tensor(log_variance).double())
    assert bool(torch.isfinite(nll).all())
    assert float(torch.exp(-nll).sum()) == pytest.approx(1, abs=1e-9)


def test_the_discrete_decoder_is_symmetric_and_finite_far_from_the_mean() -> None:
    x = torch.linspace(-1, 1, 256)
    log_variance = torch.tensor(-9.0)
    left, right = discrete_nll(x, torch.tensor(-0.4), log_variance), discrete_nll(-x, torch.tensor(0.4), log_variance)
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    assert bool(torch.isfinite(discrete_nll(x, torch.tensor(30.0), log_variance)).all())


def test_the_decoder_and_kl_equal_denoising_diffusion_pytorch() -> None:
    """The package approximates the normal CDF by a tanh."""
    package = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion")
    g = torch.Generator().manual_seed(0)
    x = (torch.randint(256, (500,), generator=g).double() / 255) * 2 - 1
    mean, log_variance = x + 0.2 * torch.rand(500, generator=g) - 0.1, torch.full((500,), -5.0).double()
    expected = -package.discretized_gaussian_log_likelihood(x, means=mean, log_scales=log_variance / 2)
    torch.testing.assert_close(discrete_nll(x, mean, log_variance), expected, rtol=0.02, atol=0.02)
    a, b, c, d = torch.randn(4, 50, generator=g)
    torch.testing.assert_close(gaussian_kl(a, b, c, d), package.normal_kl(a, b, c, d))


def test_gaussian_terms_equal_torch_distributions() -> None:
    a, b, c, d, x = torch.randn(5, 50, generator=torch.Generator().manual_seed(0))
    p, q = torch.distributions.Normal(a, (b / 2).exp()), torch.distributions.Normal(c, (d / 2).exp())
    torch.testing.assert_close(gaussian_kl(a, b, c, d), torch.distributions.kl_divergence(p, q))
    torch.testing.assert_close(gaussian_nll(x, a, b), -p.log_prob(x))


def test_a_step_with_the_true_image_has_no_kl() -> None:
    process = DiffusionProcess("x0", "cosine", timesteps=50)
    x0, eps = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([1, 5, 20, 40, 49])
    x_t = process.add_noise(x0, eps, t)
    mean, log_variance = reverse_step(process, x0, x_t, t)
    assert float(step_kl(process, mean, log_variance, x0, x_t, t).abs().max()) == 0
    with pytest.raises(ValueError, match="variance: 'tiny'"):
        reverse_step(process, x0, x_t, t, "tiny")
    with pytest.raises(ValueError, match="needs 4 output channels, and there are 2"):
        reverse_step(process, x0, x_t, t, "learned")
    with pytest.raises(ValueError, match="decoder: 'pixels'"):
        bound(process, lambda x, t: x, x0, lambda t: eps, decoder="pixels")


def normal_log_density(x: torch.Tensor, std: float) -> torch.Tensor:
    return torch.distributions.Normal(0, std).log_prob(x).flatten(1).sum(1)


STDS = (0.5, 1.5)
ODES = [
    DiffusionProcess("eps", "linear"),
    DiffusionProcess("x0", "cosine"),
    DiffusionProcess("v", "cosine", zero_snr=True),
    DiffusionProcess("v", "sigmoid", timesteps=400),
    DiffusionProcess("flow"),
]


@pytest.mark.parametrize(
    ("process", "std"),
    [
        pytest.param(process, std, marks=() if std == STDS[i % 2] else pytest.mark.drill)  # both, in turn
        for i, process in enumerate(ODES)
        for std in (*STDS, 1.0)
    ],
    ids=str,
)
def test_the_probability_flow_odes_density_of_gaussian_data_equals_its_closed_form(
    process: DiffusionProcess, std: float
) -> None:
    x0 = std * torch.randn(4, 1, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # What remains: the prior's mismatch where the chain stops short of noise, the first step's time, Heun's error.
    tolerance = 5e-3 if process.beta_schedule == "sigmoid" else 5e-4
    torch.testing.assert_close(
        log_density(process, optimal_denoiser(process, std), x0, steps=400),
        normal_log_density(x0, std),
        rtol=0,
        atol=tolerance,
    )


def test_the_densitys_error_falls_with_the_square_of_the_steps() -> None:
    process, std = DiffusionProcess("flow"), 0.5
    x0 = std * torch.randn(4, 1, 2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    denoise = optimal_denoiser(process, std)
    errors = [
        float((log_density(process, denoise, x0, steps) - normal_log_density(x0, std)).abs().max())
        for steps in (10, 20, 40)
    ]
    assert errors[1] < errors[0] / 3
    assert errors[2] < errors[1] / 3


def test_sign_probes_give_the_exact_divergence_of_a_diagonal_jacobian() -> None:
    process = DiffusionProcess("v", "cosine", timesteps=50)
    x0 = torch.randn(3, 1, 2, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    probes = torch.randint(2, (1, *x0.shape), generator=torch.Generator().manual_seed(1)).double() * 2 - 1
    denoise = optimal_denoiser(process, 0.7)
    torch.testing.assert_close(log_density(process, denoise, x0, probes=probes), log_density(process, denoise, x0))


def test_probes_estimate_the_divergence_without_bias() -> None:
    """A denoiser that mixes an image's values; averaged over all sign patterns the estimate is exact."""
    process = DiffusionProcess("flow")
    x0 = torch.randn(2, 1, 3, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mix = torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x.flatten(1) @ mix).reshape(x.shape)

    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 3).reshape(8, 1, 1, 3, 1)
    exact = log_density(process, denoise, x0, steps=4)
    torch.testing.assert_close(log_density(process, denoise, x0, 4, patterns.expand(8, 2, 1, 3, 1)), exact)
    single = log_density(process, denoise, x0, 4, patterns[:1].expand(1, 2, 1, 3, 1))
    assert float((single - exact).abs().max()) > 1e-3
