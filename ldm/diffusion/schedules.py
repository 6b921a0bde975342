"""Noise schedules: how much of the image is left after t steps. Pure functions, in float64 by default."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import nn

from ldm.utils.errors import unknown_choice

TIMESTEPS = 1000  # of the discrete chain; a flow's network gets its time in thousandths too
SCHEDULES = ("linear", "scaled_linear", "cosine", "sigmoid", "log_linear")
LOG_SNR = (9.0, -9.0)  # of log_linear and learned schedules, first at the data, then at the noise


def betas(beta_schedule: str, timesteps: int = TIMESTEPS, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """β_t of a discrete noise schedule, `(timesteps,)` in (0, 1).

    `linear` and `scaled_linear` are defined for 1000 steps; for other numbers β is scaled by 1000 / timesteps, so that
    the chain ends in the same noise. `dtype` is that of the arithmetic: float32 gives diffusers' betas bit for bit.
    """
    if timesteps < 1:
        raise ValueError(f"timesteps: {timesteps} is not a number of steps; give 1 or more")
    scale = 1000 / timesteps
    if beta_schedule == "linear":  # DDPM, arXiv 2006.11239, section 4
        return (torch.linspace(1e-4, 0.02, timesteps, dtype=dtype) * scale).clamp(max=0.999)
    if beta_schedule == "scaled_linear":  # linear in sqrt(β); latent diffusion, arXiv 2112.10752
        root = torch.linspace(0.00085**0.5, 0.012**0.5, timesteps, dtype=dtype)
        return (root.square() * scale).clamp(max=0.999)
    t = torch.linspace(0, 1, timesteps + 1, dtype=torch.float64)
    if beta_schedule == "cosine":  # Improved DDPM, arXiv 2102.09672, eq. 17, with β clipped at 0.999
        alpha_bar = torch.cos((t + 0.008) / 1.008 * math.pi / 2).square()
    elif beta_schedule == "log_linear":  # log-SNR falls evenly; arXiv 2107.00630, section 3.2
        alpha_bar = (LOG_SNR[0] + (LOG_SNR[1] - LOG_SNR[0]) * t).sigmoid()
        alpha_bar[0] = 1  # before the first step is the image itself
    elif beta_schedule == "sigmoid":  # arXiv 2212.11972, from -3 to 3 at temperature 1
        ends = torch.tensor([-3.0, 3.0], dtype=torch.float64).sigmoid()
        alpha_bar = (ends[1] - (6 * t - 3).sigmoid()) / (ends[1] - ends[0])
    else:
        raise unknown_choice("beta_schedule", beta_schedule, SCHEDULES)
    return (1 - alpha_bar[1:] / alpha_bar[:-1]).clamp(max=0.999).to(dtype)


def zero_terminal_snr(beta: torch.Tensor) -> torch.Tensor:
    """β of the same chain, shifted and scaled so that the last step is pure noise; arXiv 2305.08891, algorithm 1.

    `(T,)` in (0, 1), T at least 2, to the same shape in (0, 1]. ᾱ_0 is kept, ᾱ_{T-1} is exactly 0.
    """
    if len(beta) < 2:
        raise ValueError("zero terminal SNR needs 2 steps at least: the first keeps its noise, the last is all noise")
    root = (1 - beta).cumprod(0).sqrt()
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    return betas_of(root**2)


def shift_snr(beta: torch.Tensor, ratio: float) -> torch.Tensor:
    """β of the chain whose log-SNR is lower by 2·log(ratio), for images `ratio` times as large; arXiv 2301.11093.

    An image of twice the side averages noise over four times the pixels; ratio 2 makes up for that. `(T,)` in (0, 1] to
    the same; ratio > 0, where 1 changes nothing.
    """
    if ratio <= 0:
        raise ValueError(f"shift: {ratio} is not a ratio of two sides; give more than 0")
    if ratio == 1:
        return beta
    alpha_bar = (1 - beta).cumprod(0)
    return betas_of(alpha_bar / (alpha_bar + ratio**2 * (1 - alpha_bar)))  # SNR' = SNR / ratio²


def shift_time(t: torch.Tensor, ratio: float) -> torch.Tensor:
    """A flow's time with the noise of an image `ratio` times as large; arXiv 2403.03206, eq. 23.

    t in [0, 1], 1 being noise, to the same. `ratio` > 0 is sqrt(m/n), m and n being the two numbers of pixels.
    """
    if ratio <= 0:
        raise ValueError(f"shift: {ratio} is not a ratio of two sides; give more than 0")
    return t if ratio == 1 else ratio * t / (1 + (ratio - 1) * t)


def betas_of(alpha_bar: torch.Tensor) -> torch.Tensor:
    """β_t = 1 − ᾱ_t / ᾱ_{t-1}, `(T,)`: the inverse of the cumulative product."""
    return 1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])


class Chain(NamedTuple):
    """The tables of a discrete chain, `(T,)` float64 each; index t is the paper's t + 1."""

    beta: torch.Tensor
    alpha_bar: torch.Tensor
    """ᾱ_t = ∏ (1 − β_s) over s ≤ t; DDPM, below eq. 3."""
    alpha_bar_before: torch.Tensor
    """ᾱ_{t-1}; the first is 1."""
    log_snr: torch.Tensor
    """log(ᾱ_t / (1 − ᾱ_t)), clamped to ±20: at zero terminal SNR the last would be −∞."""
    variance: torch.Tensor
    """β̃_t, the variance of q(x_{t-1} | x_t, x_0); DDPM, eq. 7. The first is 0."""
    log_variance: torch.Tensor
    """log β̃_t; the first is replaced by the second, as in Improved DDPM's code."""


@lru_cache
def chain(
    beta_schedule: str | tuple[float, ...], timesteps: int, zero_snr: bool, shift: float, device: torch.device
) -> Chain:
    """The tables of a named schedule, or of given betas: shifted first, so that a zero terminal SNR stays zero."""
    own = (
        torch.tensor(beta_schedule, dtype=torch.float64)
        if isinstance(beta_schedule, tuple)
        else betas(beta_schedule, timesteps)
    )
    beta = shift_snr(own, shift)
    beta = zero_terminal_snr(beta) if zero_snr else beta
    alpha_bar = (1 - beta).cumprod(0)
    before = torch.cat([torch.ones_like(alpha_bar[:1]), alpha_bar[:-1]])
    log_snr = torch.logit(alpha_bar).clamp(-20, 20)
    variance = beta * (1 - before) / (1 - alpha_bar)
    log_variance = torch.cat([variance[1:2] if timesteps > 1 else beta, variance[1:]]).log()
    return Chain(*(table.to(device) for table in (beta, alpha_bar, before, log_snr, variance, log_variance)))


class LearnedSchedule(nn.Module):
    """A noise schedule that is trained: log-SNR as a monotone network of the time; arXiv 2107.00630, appendix H.

    t `(N,)` in [0, 1], 1 being noise, to log-SNR `(N,)`, falling from `log_snr_max` at 0 to `log_snr_min` at 1. The
    ends are fixed. What lies between them changes the variance of the bound's estimate alone, never its mean; the
    schedule is trained to minimise that variance.
    """

    def __init__(self, log_snr_max: float = LOG_SNR[0], log_snr_min: float = LOG_SNR[1], width: int = 128):
        super().__init__()
        if not log_snr_max > log_snr_min:
            raise ValueError(f"log-SNR must fall with time; it goes from {log_snr_max} to {log_snr_min}")
        self.log_snr_max, self.log_snr_min = log_snr_max, log_snr_min
        # Absolute values of the weights make the network monotone.
        self.slope = nn.Parameter(torch.ones(()))
        self.inner = nn.Parameter(torch.linspace(1, 10, width))
        self.bias = nn.Parameter(-torch.linspace(1, 10, width) * torch.linspace(0, 1, width))
        self.outer = nn.Parameter(torch.full((width,), 1e-3))

    def _rise(self, t: torch.Tensor) -> torch.Tensor:
        hidden = torch.sigmoid(t[..., None] * self.inner.abs() + self.bias)
        return self.slope.abs() * t + (hidden * self.outer.abs()).sum(-1)

    def forward(self, t: torch.Tensor) -> torch.Tensor:
        low, high = self._rise(torch.zeros_like(t[:1])), self._rise(torch.ones_like(t[:1]))
        normalized = (self._rise(t) - low) / (high - low)
        return self.log_snr_max + (self.log_snr_min - self.log_snr_max) * normalized

    def draw(self, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """log-SNR at uniform times u `(N,)`, and −d log-SNR / dt, `(N,)` each; both carry gradients to the schedule."""
        with torch.enable_grad():
            u = u.detach().requires_grad_()
            log_snr = self(u)
            (slope,) = torch.autograd.grad(log_snr.sum(), u, create_graph=True)
        return log_snr, -slope

    def chain_time(self, log_snr: torch.Tensor, timesteps: int) -> torch.Tensor:
        """The time of a log-SNR on the `log_linear` chain of `timesteps` steps: real numbers in [-1, timesteps - 1].

        The network gets this time, so that it can be sampled on that chain whatever schedule it was trained with.
        """
        normalized = (log_snr - self.log_snr_max) / (self.log_snr_min - self.log_snr_max)
        return normalized * timesteps - 1


def alpha_sigma(log_snr: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """α and σ of a log-SNR `(N,)`, `(N, 1, 1, 1)` each, with α² + σ² = 1."""
    log_snr = log_snr[:, None, None, None]
    return torch.sigmoid(log_snr).sqrt(), torch.sigmoid(-log_snr).sqrt()


def lower_variance(losses: torch.Tensor, *drawn: torch.Tensor) -> None:
    """Makes a backward pass of losses `(N,)` train a schedule on their squares: `drawn` are its outputs, `(N,)` each.

    A schedule doesn't change the bound's mean, so minimising the mean square minimises the variance. The network's
    gradient stays that of the loss, and one backward pass does both (arXiv 2107.00630, appendix I.2).
    """
    values = losses.detach()
    for tensor in drawn:
        tensor.register_hook(lambda gradient: 2 * values * gradient)
