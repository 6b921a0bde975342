"""Gaussian data, x_0 ~ N(m, s²), with its closed-form perfect denoiser, for tests of solvers and guidance."""

import torch

from ldm.diffusion.parameterization import target_from
from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.guidance import PredictFn
from ldm.sampling.loop import sample
from ldm.sampling.solvers import Level, Solver, scheduler, with_solver

M, S = 0.7, 0.3


def perfect(target: str, mean: float = M, deviation: float = S) -> PredictFn:
    """E[target | x_t]: from E[x_0 | x_t] = m + α s² (x_t − α m) / (α² s² + σ²)."""

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        alpha, sigma = level.alpha, level.sigma
        x0 = mean + alpha * deviation**2 * (x - alpha * mean) / (alpha**2 * deviation**2 + sigma**2)
        return target_from(target, x0, (x - alpha * x0) / sigma, alpha, sigma)

    return denoise


def solver_of(process: DiffusionProcess, name: str, steps: int, spacing: str | None = None, eta: float = 0.0) -> Solver:
    """The solver `name`, built as by a pipeline that was saved with dpm++."""
    rule = with_solver(scheduler(process, "dpm++"), name, spacing)
    return Solver(rule, steps, torch.device("cpu"), process.prediction_type, eta)


def drawn(process: DiffusionProcess, name: str, steps: int, noise: torch.Tensor, **options: object) -> torch.Tensor:
    """x_0 sampled from noise `(N, 1, 1, 1)`; below 100 samples each has its own generator, otherwise all share one."""
    generators = [torch.Generator().manual_seed(i) for i in range(len(noise) if len(noise) < 100 else 1)]
    return sample(perfect(process.prediction_type), solver_of(process, name, steps, **options), noise, generators)
