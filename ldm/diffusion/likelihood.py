"""The likelihood of data under a model: the variational bound, and the exact density of the probability-flow ODE.

Everything takes `denoise(x_t, t) → prediction` with x_t `(N, C, h, w)` and the process's time t `(N,)`; wrap a network
so that it gets `process.model_time(t)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch

from ldm.diffusion.process import DiffusionProcess
from ldm.utils.errors import unknown_choice

ModelFn = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
VARIANCES = ("small", "large", "learned")
DECODERS = ("discrete", "gaussian")


def gaussian_kl(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """KL(N(mean, …) ‖ N(other_mean, …)) elementwise, in nats; shapes broadcast."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    )


def gaussian_nll(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """−log density of x under N(mean, exp(log_variance)) elementwise, in nats."""
    return 0.5 * (math.log(2 * math.pi) + log_variance + (x - mean) ** 2 * torch.exp(-log_variance))


def discrete_nll(x: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor, levels: int = 256) -> torch.Tensor:
    """−log probability of the bin of x elementwise, in nats; DDPM, eq. 13.

    x lies in [−1, 1] on `levels` equally spaced values. The outermost bins reach to infinity, so that all sum to 1.
    """
    half = 1 / (levels - 1)
    scale = torch.exp(-0.5 * log_variance)
    low = torch.where(x <= -1 + half, -math.inf, (x - half - mean) * scale)
    high = torch.where(x >= 1 - half, math.inf, (x + half - mean) * scale)
    # In the upper tail both cumulative probabilities round to 1; by symmetry, compute the bin in the lower tail.
    upper = ((x > mean) | (high == math.inf)) & (low != -math.inf)
    low, high = torch.where(upper, -high, low), torch.where(upper, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    # 1 - cdf(low) / cdf(high); where it rounds to 0, the smallest number keeps its logarithm finite.
    ratio = -torch.expm1(log_low - log_high)
    return -(log_high + torch.log(ratio.clamp(min=torch.finfo(x.dtype).tiny)))


def decoder_nll(kind: str, x0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """−log p(x_0 | x_1) elementwise, in nats: `discrete` for pixels in [−1, 1], `gaussian` for latents."""
    if kind not in DECODERS:
        raise unknown_choice("decoder", kind, DECODERS)
    return (discrete_nll if kind == "discrete" else gaussian_nll)(x0, mean, log_variance)


def step_kl(
    process: DiffusionProcess,
    mean: torch.Tensor,
    log_variance: torch.Tensor,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
) -> torch.Tensor:
    """KL(q(x_{t-1} | x_t, x_0) ‖ N(mean, exp(log_variance))) elementwise, in nats: L_{t-1} of DDPM, eq. 5."""
    true_mean, _, true_log_variance = process.posterior(x0, x_t, t)
    return gaussian_kl(true_mean, true_log_variance, mean, log_variance)


def reverse_step(
    process: DiffusionProcess,
    output: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    variance: str = "small",
    clip: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean `(N, C, h, w)` and log-variance, which broadcasts to it, of p(x_{t-1} | x_t), for any prediction type.

    DDPM, eq. 11. `variance`: `small` is β̃, `large` is β, `learned` reads it from the second half of `output`'s 2C
    channels. `clip` bounds the predicted x_0, for data in [−clip, clip].
    """
    if variance not in VARIANCES:
        raise unknown_choice("variance", variance, VARIANCES)
    if variance == "learned":
        if output.shape[1] != 2 * x_t.shape[1]:
            raise ValueError(
                f"variance: 'learned' needs {2 * x_t.shape[1]} output channels, and there are {output.shape[1]}"
            )
        output, v = output.chunk(2, dim=1)
        log_variance = process.learned_log_variance(v, t)
    else:
        # In half precision exp(log β) would be off by a tenth.
        small, large = process.log_variances(t, torch.float64 if x_t.dtype == torch.float64 else torch.float32)
        log_variance = small if variance == "small" else large
    x0 = process.predict_x0(output, x_t, t)
    mean, _, _ = process.posterior(x0 if clip is None else x0.clamp(-clip, clip), x_t, t)
    return mean, log_variance


class Bound(NamedTuple):
    """A variational bound on −log p(x_0), per dimension: bits for the discrete decoder, nats for the Gaussian."""

    total: torch.Tensor
    """`(N,)`: the prior plus the sum over all steps."""
    prior: torch.Tensor
    """`(N,)`: KL(q(x_T | x_0) ‖ N(0, 1)), which does not depend on the network."""
    steps: torch.Tensor
    """`(N, T)`: entry t is L_t; entry 0 is the decoder's term."""


@torch.no_grad()
def bound(
    process: DiffusionProcess,
    denoise: ModelFn,
    x0: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    variance: str = "small",
    decoder: str = "gaussian",
    clip: float | None = None,
) -> Bound:
    """The variational bound over all T steps, with the prior's and the decoder's terms; DDPM, eq. 5.

    x0 `(N, C, h, w)`; `noise(t)` is the ε of step t, of x0's shape. `decoder`: `discrete` for pixels in [−1, 1] (bits
    per dimension), `gaussian` for latents (nats per dimension of the density, negative where it exceeds 1). An
    unbiased estimate: average it over data and noise. For chains; a flow has `log_density` instead.
    """
    unit = math.log(2) if decoder == "discrete" else 1.0
    last = process.chain(x0.device).alpha_bar[-1].to(x0.dtype)
    # KL(N(sqrt(ᾱ) x_0, 1 − ᾱ) ‖ N(0, 1)), finite for ᾱ = 0
    prior = 0.5 * (last * x0**2 - last - torch.log1p(-last))
    steps = []
    for step in range(process.timesteps):
        t = torch.full((len(x0),), step, device=x0.device)
        x_t = process.add_noise(x0, noise(step), t)
        mean, log_variance = reverse_step(process, denoise(x_t, t), x_t, t, variance, clip)
        if step > 0:
            term = step_kl(process, mean, log_variance, x0, x_t, t)
        else:
            term = decoder_nll(decoder, x0, mean, log_variance)
        steps.append(term.flatten(1).mean(1) / unit)
    prior, terms = prior.flatten(1).mean(1) / unit, torch.stack(steps, dim=1)
    return Bound(prior + terms.sum(1), prior, terms)


def through_autoencoder(
    latent_bound: torch.Tensor,
    log_variance: torch.Tensor,
    pixels: torch.Tensor,
    rebuilt: torch.Tensor,
    error: float,
) -> torch.Tensor:
    """The bound on the images themselves, in bits per dimension of the pixels, `(N,)`: arXiv 2106.05931, eq. 1.

    −log P(x) ≤ E_q[−log P(x | z)] − H(q(z | x)) + the bound of z. `latent_bound` `(N,)`, in nats per dimension, is the
    bound of latents z drawn from q(z | x); `log_variance` `(N, c, h, w)` is q's; `rebuilt` is z decoded, for 8-bit
    `pixels` `(N, 3, H, W)` in [−1, 1]. P(x | z) is the discretised Gaussian about `rebuilt` with variance `error`: the
    mean squared error on images other than these, or on so many that these don't matter.
    """
    decoded = discrete_nll(pixels, rebuilt, torch.tensor(error, device=pixels.device).log()).flatten(1).sum(1)
    entropy = 0.5 * (1 + math.log(2 * math.pi) + log_variance).flatten(1).sum(1)
    dimensions = pixels[0].numel()
    return (decoded - entropy + latent_bound * log_variance[0].numel()) / (dimensions * math.log(2))


def log_density(
    process: DiffusionProcess,
    denoise: ModelFn,
    x0: torch.Tensor,
    steps: int | None = None,
    probes: torch.Tensor | None = None,
) -> torch.Tensor:
    """log p(x_0) of the probability-flow ODE, in nats, `(N,)`; arXiv 2011.13456, appendix D.2.

    x0 `(N, C, h, w)`. `probes` `(P, N, C, h, w)`, of ±1 or standard normal numbers, estimate the divergence
    (Hutchinson: unbiased, P backward passes per step). Without probes it is exact, with C·h·w backward passes per step.
    `steps` of Heun's method: at most T on a chain, where the default is T; 100 by default for a flow.

    On the chain the ODE is solved in the angle φ with cos φ = α, sin φ = σ, where it is dx/dφ = v: finite from data to
    pure noise. On the straight path it is dx/dt = the flow's velocity. For pixel values k of 256, dequantised to
    (k + u) / 128 − 1, bits per dimension are 7 − log p / (C·h·w·log 2).
    """
    nodes, times = _path(process, steps, x0)
    x, total = x0, torch.zeros(len(x0), dtype=x0.dtype, device=x0.device)
    for i in range(len(nodes) - 1):
        h = nodes[i + 1] - nodes[i]
        slope, divergence = _velocity(process, denoise, x, times[i], probes)
        next_slope, next_divergence = _velocity(process, denoise, x + h * slope, times[i + 1], probes)
        x = x + h / 2 * (slope + next_slope)
        total = total + h / 2 * (divergence + next_divergence)
    return total - gaussian_nll(x, torch.zeros_like(x), torch.zeros_like(x)).flatten(1).sum(1)


def _path(process: DiffusionProcess, steps: int | None, like: torch.Tensor) -> tuple[list[float], torch.Tensor]:
    """The variable of integration at each node, and the time at which the denoiser is evaluated there."""
    if process.prediction_type == "flow":
        nodes = torch.linspace(0, 1, (steps or 100) + 1, dtype=torch.float64)
        # At either end one of the conversions is 0/0; the velocity is finite, so evaluate just inside.
        return nodes.tolist(), nodes.clamp(1e-4, 1 - 1e-4).to(like)
    last = process.timesteps - 1
    if process.prediction_type == "eps":  # v = (ε − σ·x_t) / α amplifies its errors in nearly pure noise
        last = max(1, int((process.chain().log_snr > -9).sum()) - 1)
    count = min(steps or process.timesteps, process.timesteps)
    times = torch.linspace(0, last, count).round().long().unique()
    alpha_bar = process.chain().alpha_bar[times]
    angles = torch.atan2((1 - alpha_bar).sqrt(), alpha_bar.sqrt()).tolist()
    # The data are at angle 0, just before the lowest noise level that the network knows.
    return [0.0, *angles], torch.cat([times[:1], times]).to(like.device)


def _velocity(
    process: DiffusionProcess, denoise: ModelFn, x: torch.Tensor, time: torch.Tensor, probes: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The ODE's right side at x `(N, C, h, w)`, and its divergence `(N,)`."""
    t = time.expand(len(x))
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        velocity = process.convert(denoise(x, t), x, t, "flow" if process.prediction_type == "flow" else "v")
        if probes is None:
            flat = velocity.flatten(1)
            diagonal = [
                torch.autograd.grad(flat[:, d].sum(), x, retain_graph=True)[0].flatten(1)[:, d]
                for d in range(flat.shape[1])
            ]
            divergence = torch.stack(diagonal).sum(0)
        else:
            estimates = [
                (torch.autograd.grad((velocity * z).sum(), x, retain_graph=True)[0] * z).flatten(1).sum(1)
                for z in probes
            ]
            divergence = torch.stack(estimates).mean(0)
    return velocity.detach(), divergence.detach()
