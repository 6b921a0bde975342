"""Likelihood of images under a model: the variational bound, the exact density of its ODE, the bound's variance.

    python -m stage2_diffusion.likelihood runs/openmoji

Measures held-out images with their captions, or training images if the run holds none out. Figures are nats per
dimension of the latents, and bits per dimension of the pixels; lower is better. A bound of few steps is that of
sampling with as many steps.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import ldm.utils.openmp  # noqa: F401  # before torch

import torch

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import index
from ldm.data.dataset import evaluation_batch
from ldm.data.records import HELD_OUT
from ldm.diffusion import likelihood
from ldm.diffusion.losses import bound_integrand
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.schedules import LOG_SNR
from ldm.models.conditioning import Condition, predict
from ldm.models.unet import UNet
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.diffusion_process import diffusion_process, learned_schedule
from ldm.utils.errors import Parser, UserError, command
from ldm.utils.rng import normal, uniform
from stage2_diffusion.conditions import Conditions

LATENT_CLIP = 5.0  # standard deviations; predicted latents are clipped to it, as pixels are to [-1, 1]
POINT_LOG_VARIANCE = -50.0  # below it a posterior is a point
NoiseLevels = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]  # uniform times → log-SNR, −d log-SNR / dt


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="stage2_diffusion.likelihood", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--count", type=int, default=32, help="images to measure")
    parser.add_argument("--steps", type=int, nargs="+", help="timesteps of the bound; default: all, 100 and 25")
    parser.add_argument("--ode-steps", type=int, default=50, help="steps of the probability-flow ODE; 0 leaves it out")
    args = parser.parse_args(arguments)
    for option, number, least in (("--count", args.count, 1), ("--ode-steps", args.ode_steps, 0)):
        if number < least:
            raise UserError(f"{option}: {number}; give {least} or more")
    settings = loader.load_run(args.run)
    stage, process = settings.stage2, diffusion_process(settings.stage2)
    if stage.image:
        raise UserError(
            f"{args.run}: made for {', '.join(stage.conditions)}; the bound needs a model that makes complete images"
        )
    step_counts = args.steps or [process.timesteps, *(n for n in (100, 25) if n < process.timesteps)]
    for steps in step_counts:
        if process.prediction_type != "flow" and not 1 <= steps <= process.timesteps:
            raise UserError(f"--steps: {steps}; give 1 to {process.timesteps}, the training timesteps")
    model = LatentDiffusion.load(args.run / "pipeline")
    task = EvaluationTask.of(settings, model, args.count)
    x0, split = task.x0, "held-out" if task.held_out else "training"
    print(f"{len(x0)} {split} images, {x0[0].numel():,} dimensions, {task.unit}")
    if process.prediction_type != "flow":
        print_bounds(task, stage.variance == "learned", step_counts)
    if args.ode_steps:
        probes = torch.sign(normal(0, "probe", range(len(x0)), x0.shape[1:]))[None].to(x0)
        log_p = likelihood.log_density(process, task.denoise(process), x0, args.ode_steps, probes)
        print(f"{args.ode_steps:>6} ODE       {-(log_p / x0[0].numel()).mean():8.3f} nats/dim of the density")
    if process.prediction_type != "flow":
        print_variances(task, learned_levels(args.run) if stage.beta_schedule == "learned" else None)


@dataclass(frozen=True)
class EvaluationTask:
    """The model to evaluate, and the images to evaluate it on."""

    process: DiffusionProcess
    unet: UNet
    pixels: torch.Tensor  # (N, 3, H, W)
    condition: Condition
    x0: torch.Tensor  # (N, C, h, w), drawn from the autoencoder's posterior
    log_variance: torch.Tensor  # of that posterior
    rebuilt: torch.Tensor | None  # x0 decoded; None in pixel space, and where the posterior is a point
    held_out: bool

    @property
    def in_pixel_space(self) -> bool:
        return self.x0.shape == self.pixels.shape

    @property
    def unit(self) -> str:
        return "bits/dim" if self.in_pixel_space else "nats/dim"

    @classmethod
    def of(cls, settings: Config, model: LatentDiffusion, count: int) -> EvaluationTask:
        data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
        held_out = data.select(*HELD_OUT)
        chosen = (held_out if len(held_out) else data).subset(count)
        conditions = Conditions(settings, model.autoencoder, None, len(model.classes))
        batch, mean, log_variance, states = evaluation_batch(
            chosen,
            range(len(chosen)),
            model.autoencoder,
            model.text,
            model.classes,
            model.unet.device,
            [conditions.draws],
        )
        condition = conditions(batch, mean, states)[0]
        pixels, x0, rebuilt = batch["pixels"], mean, None
        if float(log_variance.max()) > POINT_LOG_VARIANCE:
            x0 = mean + (0.5 * log_variance).exp() * normal(0, "posterior", range(len(mean)), mean.shape[1:]).to(mean)
            rebuilt = model.autoencoder.decode(x0)
        process = diffusion_process(settings.stage2)
        return cls(process, model.unet, pixels, condition, x0, log_variance, rebuilt, bool(len(held_out)))

    def denoise(self, process: DiffusionProcess, variance: bool = False) -> likelihood.ModelFn:
        """The network as a function of x_t and the process's t; with its learned variance only if `variance` is set."""

        def predicted(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            output = predict(self.unet, x, process.model_time(t).to(x), self.condition)
            return output if variance else output[:, : x.shape[1]]

        return predicted


def print_bounds(task: EvaluationTask, learned_variance: bool, step_counts: Sequence[int]) -> None:
    """Prints a row per number of steps and kind of variance."""
    x0 = task.x0
    print(f"{'steps':>6} {'variance':9} {'bound':>9} {'prior':>8} {'decoder':>8} {'bits/dim of pixels':>19}")
    for steps in step_counts:
        chain = task.process.respaced(steps)
        for variance in ("small", "large", "learned")[: 3 if learned_variance else 2]:
            bound = likelihood.bound(
                chain,
                task.denoise(chain, variance == "learned"),
                x0,
                lambda t: normal(0, f"bound {t}", range(len(x0)), x0.shape[1:]).to(x0),
                variance,
                "discrete" if task.in_pixel_space else "gaussian",
                1.0 if task.in_pixel_space else LATENT_CLIP,
            )
            pixel_bits = ""
            if task.rebuilt is not None:
                error = float((task.rebuilt - task.pixels).square().mean())
                bits = likelihood.through_autoencoder(bound.total, task.log_variance, task.pixels, task.rebuilt, error)
                pixel_bits = f"{bits.mean():19.3f}"
            terms = f"{bound.total.mean():9.3f} {bound.prior.mean():8.4f} {bound.steps[:, 0].mean():8.3f}"
            print(f"{steps:>6} {variance:9} {terms} {pixel_bits}".rstrip(), flush=True)


def print_variances(task: EvaluationTask, learned: NoiseLevels | None) -> None:
    """Prints a line per noise schedule: mean and variance of the bound's one-sample estimate."""
    print("The bound by one random noise level, which a schedule draws:")
    endpoints = log_snr_endpoints(task.process)
    schedules = (
        ("log_linear", partial(log_linear_levels, endpoints=endpoints)),
        ("cosine", partial(cosine_levels, endpoints=endpoints)),
        ("learned", learned),
    )
    for name, levels in schedules:
        if levels:
            draws = one_sample_bounds(task.process, task.denoise(task.process), task.x0, levels)
            error = float(draws.std() / math.sqrt(draws.numel()))
            print(f"  {name:11} mean {draws.mean():.3f} ± {error:.3f} nats/dim, variance {draws.var():.3f}", flush=True)


# ------------------------------------------------------------------------------- the variance of the bound's estimate


def log_snr_endpoints(process: DiffusionProcess) -> tuple[float, float]:
    """The log-SNRs of a chain's first and last step, limited to the range of learned schedules."""
    log_snr = process.chain().log_snr
    return min(LOG_SNR[0], float(log_snr[0])), max(LOG_SNR[1], float(log_snr[-1]))


def log_linear_levels(u: torch.Tensor, endpoints: tuple[float, float] = LOG_SNR) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-SNR linear in time."""
    high, low = endpoints
    return high + (low - high) * u, torch.full_like(u, high - low)


def cosine_levels(u: torch.Tensor, endpoints: tuple[float, float] = LOG_SNR) -> tuple[torch.Tensor, torch.Tensor]:
    """The cosine schedule, α = cos(πt/2), between the same log-SNRs: log-SNR = −2·log tan(πt/2)."""
    first, last = (2 / math.pi * math.atan(math.exp(-end / 2)) for end in endpoints)
    t = first + (last - first) * u
    slope = (last - first) * 2 * math.pi / torch.sin(math.pi * t)
    return -2 * torch.log(torch.tan(math.pi * t / 2)), slope


def learned_levels(run: Path) -> NoiseLevels:
    """The noise levels of the schedule that a run has learned; UserError as `learned_schedule`."""
    schedule = learned_schedule(run)

    def levels(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        log_snr, slope = schedule.draw(u.cpu())
        return log_snr.detach().to(u), slope.detach().to(u)

    return levels


@torch.no_grad()
def one_sample_bounds(
    process: DiffusionProcess, denoise: likelihood.ModelFn, x0: torch.Tensor, levels: NoiseLevels, draws: int = 64
) -> torch.Tensor:
    """Estimates `(draws, N)` of the bound's diffusion term, one noise level each, nats per dimension.

    ½·(−dλ/dt)·mean (ε − ε̂)², arXiv 2107.00630, eq. 17. Schedules with the same endpoints have the same mean but
    different variances.
    """
    estimates = []
    for k in range(draws):
        positions = range(k * len(x0), (k + 1) * len(x0))
        log_snr, slope = levels(uniform(0, "level", positions).to(x0))
        t = process.time_at(log_snr)
        eps = normal(0, "level noise", positions, x0.shape[1:]).to(x0)
        x_t = process.add_noise(x0, eps, t)
        predicted_eps = process.predict_eps(denoise(x_t, t), x_t, t)
        estimates.append(bound_integrand(predicted_eps, eps, slope))
    return torch.stack(estimates)


if __name__ == "__main__":
    sys.exit(main(None))
