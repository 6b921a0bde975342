"""Distances, weights by noise level, learned uncertainty and learned variance, against papers and libraries."""

import math

import pytest
import torch
import torch.nn.functional as F
from cases import for_each

from ldm.diffusion.likelihood import bound
from ldm.diffusion.losses import DISTANCES, WEIGHTS, Uncertainty, distance, hybrid_loss, training_loss, weights
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.schedules import SCHEDULES

PROCESSES = [
    *(DiffusionProcess(target, schedule) for target in ("eps", "x0", "v") for schedule in SCHEDULES),
    *(DiffusionProcess(target, schedule, zero_snr=True) for target in ("x0", "v") for schedule in SCHEDULES),
    *(DiffusionProcess("v", schedule, timesteps=10, shift=2.0) for schedule in SCHEDULES),
    DiffusionProcess("flow"),
]


def draw(process: DiffusionProcess, n: int = 40) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, n, 2, 3, 3, generator=g)
    u = torch.linspace(0, 1 - 2**-24, n)  # including both ends, where schedules are extreme
    return x0, eps, process.time(u)


@for_each("kind", DISTANCES)
@for_each("weight", WEIGHTS)
@for_each("process", PROCESSES)
def test_every_schedule_target_weight_and_distance_gives_a_finite_loss_and_gradient(
    process: DiffusionProcess, weight: str, kind: str
) -> None:
    x0, eps, t = draw(process)
    prediction = torch.zeros_like(x0, requires_grad=True)
    loss = training_loss(process, prediction, x0, eps, t, kind, weight)
    loss.mean().backward()
    loss = loss.detach()
    assert loss.shape == (len(t),)
    assert bool((loss >= 0).all())
    assert float(loss.sum()) > 0
    assert bool(torch.isfinite(loss).all())
    assert prediction.grad is not None
    assert bool(torch.isfinite(prediction.grad).all())


@for_each("weight", [w for w in WEIGHTS if w != "uniform"])
@for_each("schedule", SCHEDULES)
def test_a_weight_gives_the_same_objective_for_every_prediction_type(weight: str, schedule: str) -> None:
    g = torch.Generator().manual_seed(0)
    x0, eps, wrong = torch.randn(3, 20, 1, 2, 2, generator=g, dtype=torch.float64)
    t = torch.arange(20, 940, 46)
    x_t = DiffusionProcess("v", schedule).add_noise(x0, eps, t)
    reference = DiffusionProcess("v", schedule)
    losses = [
        training_loss(process, reference.convert(wrong, x_t, t, process.prediction_type), x0, eps, t, weight=weight)
        for process in (DiffusionProcess(target, schedule) for target in ("eps", "x0", "v"))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(losses[0], losses[2], rtol=1e-5, atol=0)


def test_min_snr_equals_its_paper_for_every_prediction_type() -> None:
    """arXiv 2303.09556: min(SNR, γ) on x_0, over SNR on ε, over SNR + 1 on v."""
    t = torch.arange(0, 1000, 9)
    alpha_bar = DiffusionProcess("eps").chain().alpha_bar[t]
    snr = (alpha_bar / (1 - alpha_bar)).float()
    for target, divisor in (("x0", 1), ("eps", snr), ("v", snr + 1)):
        expected = snr.clamp(max=5) / divisor
        torch.testing.assert_close(weights("min_snr", DiffusionProcess(target), t), expected, rtol=1e-5, atol=0)


@for_each(("target", "objective"), [("eps", "pred_noise"), ("x0", "pred_x0"), ("v", "pred_v")])
def test_min_snr_equals_denoising_diffusion_pytorch(target: str, objective: str) -> None:
    package = pytest.importorskip("denoising_diffusion_pytorch.denoising_diffusion_pytorch")

    class Network(torch.nn.Module):
        channels = out_dim = 2
        self_condition = False

        def forward(self, x: torch.Tensor, t: torch.Tensor, _: None) -> torch.Tensor:
            return x / 2

    reference = package.GaussianDiffusion(
        Network(), image_size=3, objective=objective, beta_schedule="cosine", min_snr_loss_weight=True
    )
    process = DiffusionProcess(target, "cosine")
    t = torch.arange(0, 999, 27)
    torch.testing.assert_close(weights("min_snr", process, t), reference.loss_weight[t], rtol=1e-4, atol=1e-7)
    x0, eps = torch.randn(2, len(t), 2, 3, 3, generator=torch.Generator().manual_seed(0))
    loss = training_loss(process, process.add_noise(x0, eps, t) / 2, x0, eps, t, weight="min_snr")
    expected = reference.p_losses(x0, t, eps, loss_reduction="none")
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-6)


def test_soft_min_snr_is_half_the_harmonic_mean_of_snr_and_gamma() -> None:
    process, t = DiffusionProcess("x0"), torch.arange(0, 1000, 9)
    snr = process.log_snr(t).exp()
    torch.testing.assert_close(weights("soft_min_snr", process, t, gamma=4), 1 / (1 / snr + 1 / 4), rtol=1e-4, atol=0)


def test_p2_equals_its_paper() -> None:
    process, t = DiffusionProcess("eps"), torch.arange(0, 1000, 9)
    snr = process.log_snr(t).exp()
    torch.testing.assert_close(weights("p2", process, t), 1 / (1 + snr), rtol=1e-4, atol=0)
    torch.testing.assert_close(weights("p2", process, t, gamma=0.5, k=2), (2 + snr) ** -0.5, rtol=1e-4, atol=0)


@for_each("schedule", ["linear", "cosine", "sigmoid"])
def test_the_sigmoid_weight_has_the_same_integral_over_log_snr_on_every_schedule(schedule: str) -> None:
    """arXiv 2303.00848: ∫ sigmoid(b − λ) dλ = softplus(b − λ_min) − softplus(b − λ_max), for any schedule."""
    process, t = DiffusionProcess("eps", schedule), torch.arange(1, 990)  # the last steps are clipped and jump
    log_snr = process.log_snr(t)
    total = weights("sigmoid", process, t, bias=-1.0).double().sum() / 1000
    ends = F.softplus(-1 - log_snr[[-1, 0]].double())
    assert float(total) == pytest.approx(float(ends[0] - ends[1]), rel=0.02)


def test_the_sigmoid_weight_of_a_flow_has_the_slope_of_its_log_snr() -> None:
    t = torch.linspace(0.01, 0.99, 50)
    step = 1e-3
    flow = DiffusionProcess("flow")
    slope = (flow.log_snr(t - step) - flow.log_snr(t + step)) / (2 * step)
    expected = torch.sigmoid(2 - flow.log_snr(t)) * slope * (1 - t) ** 2
    torch.testing.assert_close(weights("sigmoid", flow, t, bias=2), expected, rtol=1e-2, atol=1e-4)


def test_distances_equal_torchs_losses_per_sample() -> None:
    a, b = torch.randn(2, 5, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    for kind, reference in (("l2", F.mse_loss), ("l1", F.l1_loss), ("huber", F.smooth_l1_loss)):
        expected = torch.stack([reference(x, y) for x, y in zip(a, b, strict=True)])
        torch.testing.assert_close(distance(kind, a, b), expected)
    assert distance("l2", a.bfloat16(), b.bfloat16()).dtype == torch.float32


def test_unknown_names_are_refused() -> None:
    a = torch.zeros(1, 1, 1, 1)
    with pytest.raises(ValueError, match="distance: 'l3'; give l2, l1 or huber"):
        distance("l3", a, a)
    with pytest.raises(ValueError, match="loss_weighting: 'snr'; give uniform, min_snr"):
        weights("snr", DiffusionProcess("eps"), torch.tensor([1]))


def test_uncertainty_starts_as_the_identity_and_learns_the_size_of_the_loss() -> None:
    module = Uncertainty(features=32)
    log_snr = torch.linspace(-6, 6, 64)
    loss = 0.1 + torch.sigmoid(log_snr)
    assert torch.equal(module.weighted(loss, log_snr), loss)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.02)
    for _ in range(800):
        optimizer.zero_grad()
        module.weighted(loss, log_snr).mean().backward()
        optimizer.step()
    assert float((module(log_snr).detach().exp() / loss - 1).abs().mean()) < 0.1
    assert bool(torch.isfinite(module(torch.tensor([-20.0, 20.0]))).all())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(module(log_snr), module(log_snr.double()))
        assert module(log_snr).dtype == torch.float32


def test_uncertainty_does_not_depend_on_the_runs_seed() -> None:
    before = torch.random.get_rng_state()
    torch.manual_seed(1)
    first = Uncertainty()
    torch.manual_seed(2)
    second = Uncertainty()
    torch.random.set_rng_state(before)
    assert torch.equal(first.frequencies, second.frequencies)
    assert torch.equal(first.phases, second.phases)


def learned_variance_batch(
    n: int = 6,
) -> tuple[DiffusionProcess, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    process = DiffusionProcess("eps", "cosine", timesteps=50)
    g = torch.Generator().manual_seed(0)
    x0, eps, guess, v = torch.randn(4, n, 2, 3, 3, generator=g)
    t = torch.arange(n) * 9
    return process, torch.cat([guess, v / 3], 1).requires_grad_(), x0, process.add_noise(x0, eps, t), eps, t


@for_each("decoder", ["gaussian", "discrete"])
def test_the_bound_trains_only_the_variance(decoder: str) -> None:
    """Improved DDPM, section 3.1: the mean's gradient is that of the simple loss, as without the bound."""
    process, output, x0, x_t, eps, t = learned_variance_batch()
    simple = distance("l2", output[:, :2], eps)
    (simple_grad,) = torch.autograd.grad(simple.sum(), output)
    (hybrid_grad,) = torch.autograd.grad(hybrid_loss(process, output, x0, x_t, eps, t, decoder=decoder).sum(), output)
    assert torch.equal(simple_grad[:, :2], hybrid_grad[:, :2])
    assert float(simple_grad[:, 2:].abs().max()) == 0
    assert bool((hybrid_grad[:, 2:].abs().flatten(1).sum(1) > 0).all())


@for_each("decoder", ["gaussian", "discrete"])
def test_the_hybrid_loss_is_the_simple_loss_plus_a_share_of_the_full_bound(decoder: str) -> None:
    """Over all t, T times the term at t is on average the bound's sum: arXiv 2102.09672, eqs. 4 and 16."""
    process, t = DiffusionProcess("v", "cosine", timesteps=50), torch.arange(50)
    g = torch.Generator().manual_seed(1)
    x0, eps = torch.randn(2, 1, 2, 3, 3, generator=g, dtype=torch.float64).expand(2, 50, 2, 3, 3).clone()
    x0 = x0.clamp(-1, 1).add(1).mul(127.5).round().div(127.5).sub(1)
    output = torch.randn(50, 4, 3, 3, generator=g, dtype=torch.float64) / 3
    loss = hybrid_loss(process, output, x0, process.add_noise(x0, eps, t), eps, t, share=0.01, decoder=decoder)
    simple = distance("l2", output[:, :2], process.target_from(x0, eps, t))
    full_bound = bound(process, lambda x, t: output[t], x0[:1], lambda t: eps[:1], "learned", decoder)
    bits = float(full_bound.steps.sum()) / (math.log(2) if decoder == "gaussian" else 1)
    assert float((loss - simple).mean()) == pytest.approx(0.01 * bits, rel=1e-9)


def test_the_hybrid_loss_equals_denoising_diffusion_pytorchs_with_the_bound_times_the_steps() -> None:
    """The package weights a single term of the bound, the paper the sum of T; at t = 0 it clips differently."""
    package = pytest.importorskip("denoising_diffusion_pytorch.learned_gaussian_diffusion")
    process, output, x0, x_t, eps, t = learned_variance_batch()

    class Network(torch.nn.Module):
        channels, out_dim = 2, 4
        self_condition = False

        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return output.detach()

    reference = package.LearnedGaussianDiffusion(
        Network(), 0.001 * 50, image_size=3, timesteps=50, objective="pred_noise", beta_schedule="cosine"
    )
    loss = hybrid_loss(process, output.detach(), x0, x_t, eps, t)
    expected = reference.p_losses(x0, t, eps, loss_reduction="none")
    torch.testing.assert_close(loss[1:], expected[1:], rtol=1e-3, atol=1e-4)
    assert math.isfinite(float(loss[0]))
