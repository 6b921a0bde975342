"""The mathematics of diffusion: how pictures become noise, and what the network learns to predict. Pure functions.

Everywhere x_t = α(t)·x_0 + σ(t)·ε with ε ~ N(0, 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

TIMESTEPS = 1000  # of the discrete chain; a flow's time is in thousandths too when the network sees it


def betas(schedule: str, timesteps: int = TIMESTEPS) -> torch.Tensor:
    """β_t of a discrete noise schedule, `(timesteps,)` float64 in (0, 1)."""
    if schedule == "linear":  # DDPM, arXiv 2006.11239, section 4
        return torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    if schedule == "scaled_linear":  # linear in sqrt(β); latent diffusion, arXiv 2112.10752
        return torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=torch.float64).square()
    if schedule == "cosine":  # Improved DDPM, arXiv 2102.09672, eq. 17, with β clipped at 0.999
        t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
        alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
        return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999)
    raise ValueError(f"schedule: {schedule!r} is not linear, scaled_linear or cosine")


@lru_cache
def alpha_bars(schedule: str, device: torch.device) -> torch.Tensor:
    """ᾱ_t = ∏ (1 − β_s) over s ≤ t, `(1000,)` float64; DDPM, below eq. 3."""
    return (1 - betas(schedule)).cumprod(0).to(device)


@dataclass(frozen=True)
class Process:
    """A forward process and the network's target.

    `target`: `eps`, `x0`, `v` (over the discrete chain `schedule`) or `flow` (the straight path; `schedule` is unused).
    Times t are whole numbers in [0, 1000) on the chain, and real numbers in (0, 1) for a flow, 1 being noise.
    """

    target: str
    schedule: str = "scaled_linear"
    time_mean: float = 0.0
    time_std: float = 1.0

    def time(self, u: torch.Tensor) -> torch.Tensor:
        """Training times `(N,)` from uniform numbers u in [0, 1)."""
        if self.target == "flow":  # logit-normal, arXiv 2403.03206, eq. 19
            return torch.sigmoid(self.time_mean + self.time_std * torch.special.ndtri(u.clamp(1e-6, 1 - 1e-6)))
        return (u * TIMESTEPS).long()

    def network_time(self, t: torch.Tensor) -> torch.Tensor:
        """t as the network is told it: in [0, 1000)."""
        return t * TIMESTEPS if self.target == "flow" else t

    def alpha_sigma(self, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """α(t) and σ(t), `(N, 1, 1, 1)` each."""
        if self.target == "flow":  # the straight path, arXiv 2209.03003, eq. 1
            alpha, sigma = 1 - t, t
        else:  # α² = ᾱ_t, σ² = 1 - ᾱ_t: DDPM, eq. 4
            alpha_bar = alpha_bars(self.schedule, t.device)[t]
            alpha, sigma = alpha_bar.sqrt().float(), (1 - alpha_bar).sqrt().float()
        return alpha[:, None, None, None], sigma[:, None, None, None]

    def add_noise(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """x_t, a draw of q(x_t | x_0); DDPM, eq. 4. Shapes `(N, C, h, w)`, t `(N,)`."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha * x0 + sigma * eps

    def target_of(self, x0: torch.Tensor, eps: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """What the network should answer to (x_t, t)."""
        if self.target == "eps":  # DDPM, eq. 14
            return eps
        if self.target == "x0":
            return x0
        if self.target == "v":  # progressive distillation, arXiv 2202.00512, appendix D
            alpha, sigma = self.alpha_sigma(t)
            return alpha * eps - sigma * x0
        return eps - x0  # dx_t/dt of the straight path

    def x0_of(self, prediction: torch.Tensor, x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """The picture that a prediction stands for: the inverse of `target_of`, given x_t."""
        alpha, sigma = self.alpha_sigma(t)
        if self.target == "eps":
            return (x_t - sigma * prediction) / alpha
        if self.target == "x0":
            return prediction
        if self.target == "v":
            return alpha * x_t - sigma * prediction
        return x_t - sigma * prediction
