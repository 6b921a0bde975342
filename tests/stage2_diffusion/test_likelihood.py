"""Likelihood bounds: the table of a finished run, and the terms of the bounds against closed forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from cases import for_each

import train_ldm
from ldm.config import loader
from ldm.diffusion.likelihood import gaussian_nll, through_autoencoder
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.schedules import LOG_SNR, LearnedSchedule
from ldm.models.autoencoder import Autoencoder
from stage2_diffusion import likelihood

pytestmark = pytest.mark.usefixtures("two_noise_levels")  # of the validation; the bounds have their own
RUNS: dict[str, tuple[tuple[str, ...], set[str]]] = {
    "ddpm": (("stage2.prediction_type=v", "stage2.conditions=[text, class, size]"), {"small", "large"}),
    "learned variance": (("stage2.process=improved-ddpm", "sample.solver=ddpm"), {"small", "large", "learned"}),
    "learned schedule": (("stage2.process=variational",), {"small", "large"}),
    "flow": (("stage2.prediction_type=flow", "stage2.conditions=[]"), set()),
    "pixels": (
        (
            "stage2.prediction_type=eps",
            "stage1.pretrained=null",
            "stage1.model=identity",
            "stage1.channels=[3]",
            "stage1.latent_channels=3",
        ),
        {"small", "large"},
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.drill if name in ("ddpm", "learned schedule") else ()) for name in RUNS],
)
def test_every_kind_of_run_gets_a_table(
    name: str, root: Path, tmp_path: Path, small: list[str], vae: Autoencoder, capsys: pytest.CaptureFixture[str]
) -> None:
    vae.save(tmp_path / "vae")
    keys, variances = RUNS[name]
    run = tmp_path / "run"
    shared = [*small, f"run.dir={run}", f"stage1.pretrained={tmp_path / 'vae'}"]
    shared += [] if name == "flow" else ["stage2.timesteps=8"]
    assert train_ldm.main(["--config", str(root / "configs/tiny.yaml"), *shared, *keys]) == 0
    capsys.readouterr()
    options = ["--count", "3", "--steps", "8", "4", "--ode-steps", "3"]
    status, captured = likelihood.main([str(run), *options]), capsys.readouterr()
    assert status == 0, captured.err
    lines = [line for line in captured.out.splitlines() if not line.startswith("data ")]
    dimensions, unit = ("768", "bits/dim") if name == "pixels" else ("256", "nats/dim")
    assert lines[0] == f"3 held-out images, {dimensions} dimensions, {unit}"
    rows = [
        line.split() for line in lines if line.split()[1] in ("small", "large", "learned") and len(line.split()) < 7
    ]
    assert [tuple(row[:2]) for row in rows] == [
        (steps, kind) for steps in ("8", "4") for kind in ("small", "large", "learned") if kind in variances
    ]
    for row in rows:
        assert len(row) == (5 if name == "pixels" else 6)  # with an autoencoder, also bits per pixel dimension
        assert all(math.isfinite(float(value)) for value in row[2:])
    (ode,) = [line.split() for line in lines if "ODE" in line]
    assert math.isfinite(float(ode[2]))
    drawn = [line.split()[0] for line in lines if "mean" in line]
    schedules = ["log_linear", "cosine", "learned"] if name == "learned schedule" else ["log_linear", "cosine"]
    assert drawn == ([] if name == "flow" else schedules)
    assert "nan" not in captured.out


def random_schedule(seed: int) -> likelihood.NoiseLevels:
    torch.manual_seed(seed)
    schedule = LearnedSchedule()
    with torch.no_grad():
        for parameter in schedule.parameters():
            parameter += 0.5 * torch.randn_like(parameter) * parameter.abs().clamp(min=0.05)
    return lambda u: tuple(tensor.detach() for tensor in schedule.draw(u))


@for_each("target", ["eps", "v", "x0"])
@for_each("levels", [likelihood.log_linear_levels, likelihood.cosine_levels, random_schedule(0), random_schedule(1)])
def test_the_mean_bound_does_not_depend_on_the_schedule(target: str, levels: likelihood.NoiseLevels) -> None:
    """½∫(1 − σ²)dλ = ½∫sigmoid(λ)dλ between the ends, for standard normal data, whose ε̂ is σ·x_t."""
    process = DiffusionProcess(target, "log_linear", timesteps=4000)

    def perfect(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        alpha, sigma = process.alpha_sigma(t)
        return process.target_from(alpha * x, sigma * x, t)

    x0 = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    bounds = likelihood.one_sample_bounds(process, perfect, x0, levels)
    assert bounds.shape == (64, 64)
    high, low = (torch.nn.functional.softplus(torch.tensor(end)) for end in LOG_SNR)
    standard_error = float(bounds.std()) / math.sqrt(bounds.numel())
    assert float(bounds.mean()) == pytest.approx(float(high - low) / 2, abs=4 * standard_error + 0.01)
    assert standard_error < 0.2


@for_each("levels", [likelihood.log_linear_levels, likelihood.cosine_levels, random_schedule(2)])
def test_the_slope_of_a_schedule_is_its_derivative_and_its_ends_are_fixed(levels: likelihood.NoiseLevels) -> None:
    u = torch.linspace(0, 1, 2001, dtype=torch.float64)
    if levels not in (likelihood.log_linear_levels, likelihood.cosine_levels):
        u = u.float()
    log_snr, slope = levels(u)
    assert (float(log_snr[0]), float(log_snr[-1])) == pytest.approx(LOG_SNR, abs=1e-3)
    assert bool((slope > 0).all())
    steps = -(log_snr[2:] - log_snr[:-2]) / (u[2:] - u[:-2])
    torch.testing.assert_close(steps[200:-200], slope[1:-1][200:-200], rtol=0.02, atol=0.05)


def linear_gaussian(n: int) -> tuple[torch.Tensor, ...]:
    """Pixels x = w·z + noise, where each of 12 standard normal z determines 16 pixels; the posterior is exact."""
    g = torch.Generator().manual_seed(0)
    spread = 0.05
    w = 0.1 * torch.rand(3, 8, 8, generator=g, dtype=torch.float64) + 0.05

    def decode(z: torch.Tensor) -> torch.Tensor:
        return w * torch.nn.functional.interpolate(z, scale_factor=4.0)

    z = torch.randn(n, 3, 2, 2, generator=g, dtype=torch.float64)
    x = decode(z) + spread * torch.randn(n, 3, 8, 8, generator=g, dtype=torch.float64)
    x = ((x + 1) * 127.5).round().clamp(0, 255) / 127.5 - 1  # 8 bits

    def pooled(value: torch.Tensor) -> torch.Tensor:
        return 16 * torch.nn.functional.avg_pool2d(value, 4)

    precision = 1 + pooled(w**2)[None] / spread**2
    mean = pooled(w * x) / spread**2 / precision
    # log N(x; 0, w·wᵀ + spread²), block by block, with the determinant and the inverse of a rank-one update
    square = pooled(x**2) / spread**2 - mean**2 * precision
    log_p = -0.5 * (square + precision.log() + 16 * math.log(2 * math.pi * spread**2)).flatten(1).sum(1)
    exact = -(log_p / math.log(2) / x[0].numel() + math.log2(2 / 255))  # of bins 2/255 wide
    return x, mean, (1 / precision).log().expand_as(mean), exact, torch.tensor(spread**2), w


def bits(
    x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, error: float, w: torch.Tensor
) -> torch.Tensor:
    """The exact expectation over the posterior: both terms are quadratic in z, so mean ± std are enough."""
    bounds = []
    for sign in (-1, 1):
        z = mean + sign * (0.5 * log_variance).exp()
        zero = torch.zeros_like(z)
        latent = gaussian_nll(z, zero, zero).flatten(1).mean(1)
        rebuilt = w * torch.nn.functional.interpolate(z, scale_factor=4.0)
        bounds.append(through_autoencoder(latent, log_variance, x, rebuilt, error))
    return torch.stack(bounds).mean(0)


def test_with_the_exact_posterior_the_bound_through_an_autoencoder_is_the_likelihood() -> None:
    x, mean, log_variance, exact, error, w = linear_gaussian(32)
    torch.testing.assert_close(bits(x, mean, log_variance, float(error), w), exact, rtol=0, atol=5e-3)


@for_each(("shift", "scale"), [(0.5, 1.0), (0.0, 2.0), (0.0, 0.5), (-1.0, 3.0)])
def test_a_wrong_posterior_costs_its_kl_divergence_from_the_exact_one(shift: float, scale: float) -> None:
    x, mean, log_variance, exact, error, w = linear_gaussian(32)
    wrong = mean + shift * (0.5 * log_variance).exp(), log_variance + 2 * math.log(scale)
    bounds = bits(x, *wrong, float(error), w)
    assert bool((bounds > exact).all())
    nats = mean[0].numel() * (0.5 * (scale**2 + shift**2 - 1) - math.log(scale))
    torch.testing.assert_close(bounds - exact, torch.full_like(exact, nats / math.log(2) / 192), rtol=0.05, atol=5e-3)


@pytest.fixture
def finished(root: Path, tmp_path: Path) -> Callable[..., str]:
    """A folder that looks like a finished run."""

    def write(*overrides: str) -> str:
        settings = loader.load(root / "configs/tiny.yaml", overrides)
        (tmp_path / "pipeline").mkdir()
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({"configuration": loader.dump(settings)}))
        return str(tmp_path)

    return write


DDPM, INPAINT = ("stage2.prediction_type=v", "stage2.timesteps=50"), ("stage2.conditions=[text, inpaint]",)


@pytest.mark.parametrize(
    ("overrides", "options", "message"),
    [
        (INPAINT, (), "made for text, inpaint; the bound needs a model that makes complete images"),
        (DDPM, ("--steps", "0"), "--steps: 0; give 1 to 50"),
        (DDPM, ("--steps", "10", "51"), "--steps: 51; give 1 to 50"),
        (DDPM, ("--steps", "10", "--count", "0"), "--count: 0"),
        (DDPM, ("--steps", "10", "--ode-steps", "-1"), "--ode-steps: -1"),
        (DDPM, ("--steps", "ten"), "invalid int value: 'ten'"),
    ],
)
def test_a_mistake_is_one_line(
    overrides: tuple[str, ...],
    options: tuple[str, ...],
    message: str,
    finished: Callable[..., str],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert likelihood.main([finished(*overrides), *options]) == 2
    stderr = capsys.readouterr().err
    assert message in stderr
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1


def test_a_folder_without_a_finished_run_is_refused(
    tmp_path: Path, finished: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        assert likelihood.main([str(folder)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {folder}: no finished run (it has no pipeline)")
    finished(*DDPM)
    (tmp_path / "config.yaml").unlink()
    assert likelihood.main([str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no finished run (it has no config.yaml)")
