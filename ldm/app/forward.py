"""The forward process in pictures: an image under each noise schedule, and the schedules as tables."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch
from PIL import Image

from ldm.data.images import to_pil, to_tensor
from ldm.diffusion.process import TIMESTEPS, DiffusionProcess
from ldm.diffusion.schedules import betas_of
from ldm.sampling.loop import initial_noise
from ldm.training.diffusion_process import learned_schedule

LEARNED = "learned"
PROCESSES = {
    "linear": DiffusionProcess("v", "linear"),
    "scaled_linear": DiffusionProcess("v", "scaled_linear"),
    "cosine": DiffusionProcess("v", "cosine"),
    "sigmoid": DiffusionProcess("v", "sigmoid"),
    "zero SNR": DiffusionProcess("v", "scaled_linear", zero_snr=True),
    "flow": DiffusionProcess("flow"),
}
FORMULAS = {
    "linear": (r"\beta_t = 10^{-4} + (0.02 - 10^{-4})\,\tfrac{t}{T-1}", "DDPM, arXiv 2006.11239, section 4"),
    "scaled_linear": (
        r"\sqrt{\beta_t} = \sqrt{0.00085} + (\sqrt{0.012} - \sqrt{0.00085})\,\tfrac{t}{T-1}",
        "Latent diffusion, arXiv 2112.10752",
    ),
    "cosine": (
        r"\bar\alpha(u) \propto \cos^2\!\left(\tfrac{u + 0.008}{1.008}\cdot\tfrac{\pi}{2}\right)",
        "Improved DDPM, arXiv 2102.09672, eq. 17",
    ),
    "sigmoid": (
        r"\bar\alpha(u) = \frac{s(3) - s(6u - 3)}{s(3) - s(-3)},\; s(x) = \tfrac{1}{1 + e^{-x}}",
        "arXiv 2212.11972",
    ),
    "zero SNR": (
        r"\sqrt{\bar\alpha'_t} = (\sqrt{\bar\alpha_t} - \sqrt{\bar\alpha_T})"
        r"\,\frac{\sqrt{\bar\alpha_1}}{\sqrt{\bar\alpha_1} - \sqrt{\bar\alpha_T}}",
        "arXiv 2305.08891, algorithm 1",
    ),
    "flow": (r"x_t = (1 - t)\,x_0 + t\,\varepsilon", "Rectified flow, arXiv 2209.03003, eq. 1"),
    LEARNED: (
        r"\log\mathrm{SNR}(t) = -\gamma_\eta(t),\; \gamma_\eta\ \text{a monotone network}",
        "Variational diffusion models, arXiv 2107.00630, appendix H",
    ),
}
"""The formula of each process, and its source."""


def learned(run: Path) -> DiffusionProcess:
    """The process of the schedule that a run has learned; UserError where its checkpoints are gone."""
    with torch.no_grad():
        log_snr = learned_schedule(run)(torch.arange(1, TIMESTEPS + 1) / TIMESTEPS)
    return DiffusionProcess("v", tuple(betas_of(log_snr.double().sigmoid()).tolist()))


def times(process: DiffusionProcess, shares: list[float]) -> torch.Tensor:
    """The process's times at these shares, in [0, 1], of the way to noise: `(N,)`."""
    share = torch.tensor(shares, dtype=torch.float64)
    if process.prediction_type == "flow":
        return share.clamp(1e-6, 1 - 1e-6)
    return (share * (process.timesteps - 1)).round().long()


def noised(image: Image.Image, process: DiffusionProcess, shares: list[float], seed: int = 0) -> list[Image.Image]:
    """The image with the noise of each share of the way, one draw of noise for all."""
    x0 = to_tensor(image)[None].expand(len(shares), -1, -1, -1)
    eps = initial_noise(x0.shape[1:], [seed])
    return to_pil(process.add_noise(x0, eps, times(process, shares)))


def coefficients(process: DiffusionProcess, share: float) -> tuple[float, float, float]:
    """α, σ and log-SNR at a share of the way."""
    t = times(process, [share])
    alpha, sigma = process.alpha_sigma(t)
    return float(alpha), float(sigma), float(process.log_snr(t))


def curves(processes: dict[str, DiffusionProcess], count: int = 101) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Tables of α² and of log-SNR, a column a schedule, over the share of the way from image to noise.

    On a chain α² is ᾱ. A flow has no ᾱ: for it α² / (α² + σ²) is shown, which is the same for a chain.
    """
    shares = [i / (count - 1) for i in range(count)]
    log_snr = {name: process.log_snr(times(process, shares)).double() for name, process in processes.items()}
    index = pd.Index(shares, name="t / T")
    return (
        pd.DataFrame({name: values.sigmoid().numpy() for name, values in log_snr.items()}, index=index),
        pd.DataFrame({name: values.numpy() for name, values in log_snr.items()}, index=index),
    )
