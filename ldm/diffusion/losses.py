"""Training losses: the distance, its weight by noise level, and the term that trains a learned variance."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn

from ldm.diffusion.likelihood import decoder_nll, step_kl
from ldm.diffusion.process import DiffusionProcess
from ldm.utils.errors import unknown_choice

DISTANCES = ("l2", "l1", "huber")
WEIGHTS = ("uniform", "min_snr", "soft_min_snr", "p2", "sigmoid")


def pixel_weights(mask: torch.Tensor, unmasked: float = 0.0) -> torch.Tensor:
    """The weight of each pixel's loss, `(N, 1, h, w)`, of masks in [0, 1]: from `unmasked` where one is 0 to 1."""
    return unmasked + (1 - unmasked) * mask


def pixel_mean(errors: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
    """Mean over each sample's pixels, `(N,)`, of errors `(N, …)`, each multiplied by its `weight`, `(N, 1, …)`.

    The mean is over all pixels, Σ w·d / (C·h·w), as in kohya's scripts and OneTrainer's default; not over the learned
    ones, Σ w·d / Σ w. So a mask takes terms out of the loss and changes no other: the gradient of a learned pixel is
    that of a training without masks, and the learning rate carries over. Divided by its area, a face on a hundredth of
    an image would weigh a hundred times what it does there, from as many fewer values, and so with more noise; and a
    crop that the mask leaves nothing of would be 0 / 0. A small subject counts for more with `data.source.repeats`, or
    in tighter crops.
    """
    if weight is not None:
        errors = errors * weight
    return errors.flatten(1).mean(1)


def bound_integrand(
    prediction: torch.Tensor, eps: torch.Tensor, slope: torch.Tensor, pixel_weight: torch.Tensor | None = None
) -> torch.Tensor:
    """The continuous-time bound's integrand, nats per dimension, `(N,)`: ½·(−dλ/dt)·mean (ε − ε̂)².

    Its mean over uniform t is the diffusion term of the bound, for every schedule; arXiv 2107.00630, section 5. That
    holds pixel by pixel, also where `pixel_weight`, `(N, 1, h, w)`, multiplies them.
    """
    return 0.5 * slope * pixel_mean((eps - prediction).square(), pixel_weight)


def distance(
    kind: str,
    prediction: torch.Tensor,
    target: torch.Tensor,
    delta: float = 1.0,
    pixel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean error of each sample, `(N,)` float32 or float64, of `(N, …)` against `(N, …)`: see `pixel_mean`.

    `l2` is the square, `l1` the absolute value, `huber` half the square up to `delta` and linear beyond.
    """
    if prediction.dtype != torch.float64:
        prediction, target = prediction.float(), target.float()  # half precision can't hold a mean of many squares
    if kind == "l2":
        errors = F.mse_loss(prediction, target, reduction="none")
    elif kind == "l1":
        errors = F.l1_loss(prediction, target, reduction="none")
    elif kind == "huber":
        errors = F.huber_loss(prediction, target, reduction="none", delta=delta)
    else:
        raise unknown_choice("distance", kind, DISTANCES)
    return pixel_mean(errors, pixel_weight)


def weights(
    kind: str, process: DiffusionProcess, t: torch.Tensor, gamma: float | None = None, k: float = 1.0, bias: float = 0.0
) -> torch.Tensor:
    """Weight of each sample's loss by its noise level, `(N,)` float32, finite and not negative.

    A weight is defined on the error of ε. What the process predicts has an error that is a known multiple of it, and
    the weight is converted, so that the same name means the same objective for every prediction type. `uniform` alone
    is 1 on the error of the prediction itself.

    | kind | on the error of ε | source |
    |---|---|---|
    | `min_snr` | min(1, γ / SNR) | arXiv 2303.09556; γ 5 by default |
    | `soft_min_snr` | γ / (SNR + γ) | arXiv 2401.11605; γ 5 by default |
    | `p2` | 1 / (k + SNR)^γ | arXiv 2204.00227; k and γ 1 by default |
    | `sigmoid` | sigmoid(bias − log SNR) · (−d log SNR / dt) | arXiv 2303.00848, 2410.19324 |

    `sigmoid` is a function of log-SNR whatever the schedule, hence the slope. That is exact for uniform times; others
    multiply it by their density. Without the slope it would be `soft_min_snr` with γ = exp(bias). Use it with v, x0 or
    flow: with eps the noisiest steps have weights of thousands, with which training is unstable.
    """
    if kind == "uniform":
        return torch.ones(len(t), device=t.device)
    gamma = gamma if gamma is not None else 1.0 if kind == "p2" else 5.0
    log_snr = process.log_snr(t).double()
    snr = log_snr.exp()
    if kind == "min_snr":
        of_eps = (gamma / snr).clamp(max=1)
    elif kind == "soft_min_snr":
        of_eps = gamma / (snr + gamma)
    elif kind == "p2":
        of_eps = (k + snr) ** -gamma
    elif kind == "sigmoid":
        of_eps = torch.sigmoid(bias - log_snr) * _log_snr_slope(process, t)
    else:
        raise unknown_choice("loss_weighting", kind, WEIGHTS)
    return (of_eps * _eps_error(process, t)).float()


def _eps_error(process: DiffusionProcess, t: torch.Tensor) -> torch.Tensor:
    """‖ε − ε̂‖² where the prediction's squared error is 1, `(N,)` float64: see `DiffusionProcess.predict_eps`."""
    if process.prediction_type == "eps":
        return torch.ones(len(t), dtype=torch.float64, device=t.device)
    alpha, sigma = (value.double().flatten() for value in process.alpha_sigma(t, torch.float64))
    return (alpha / sigma) ** 2 if process.prediction_type == "x0" else alpha**2


def _log_snr_slope(process: DiffusionProcess, t: torch.Tensor) -> torch.Tensor:
    """−d log-SNR / dt for t in [0, 1], `(N,)` float64: exact for a flow, by central differences on a chain."""
    if process.prediction_type == "flow":
        return 2 / (t * (1 - t)).double()
    log_snr = process.chain(t.device).log_snr
    if len(log_snr) < 2:
        raise ValueError("loss_weighting: 'sigmoid' needs 2 timesteps at least, to see how fast the noise grows")
    (slope,) = torch.gradient(log_snr, spacing=1 / process.timesteps)
    return -slope[t]


class Uncertainty(nn.Module):
    """Learns how large the loss is at each noise level, so that all levels contribute alike: EDM2, arXiv 2312.02696.

    log-SNR `(N,)` to u `(N,)`. `weighted` returns loss·exp(−u) + u, which is minimal where exp(u) is the expected loss.
    It starts at u = 0, where the loss is unchanged. For training alone: it is no part of the exported model.
    """

    frequencies: torch.Tensor
    phases: torch.Tensor

    def __init__(self, features: int = 128):
        super().__init__()
        # Cosines of random frequencies from a fixed seed, so that the run's seed doesn't change what can be learned.
        g = torch.Generator().manual_seed(0)
        self.register_buffer("frequencies", torch.randn(features, generator=g) * 2 * math.pi)
        self.register_buffer("phases", torch.rand(features, generator=g) * 2 * math.pi)
        self.weight, self.bias = nn.Parameter(torch.zeros(features)), nn.Parameter(torch.zeros(()))

    def forward(self, log_snr: torch.Tensor) -> torch.Tensor:
        c_noise = log_snr.float()[:, None] / -8  # log(σ) / 4, EDM's table 1
        features = math.sqrt(2) * torch.cos(c_noise * self.frequencies + self.phases)
        return (features * self.weight).sum(1) + self.bias  # not a matrix product, which autocast would round

    def weighted(self, loss: torch.Tensor, log_snr: torch.Tensor) -> torch.Tensor:
        """`(N,)` losses to `(N,)`."""
        u = self(log_snr)
        return loss * torch.exp(-u) + u


def training_loss(
    process: DiffusionProcess,
    prediction: torch.Tensor,
    x0: torch.Tensor,
    eps: torch.Tensor,
    t: torch.Tensor,
    kind: str = "l2",
    weight: str = "uniform",
    pixel_weight: torch.Tensor | None = None,
    **options: float,
) -> torch.Tensor:
    """Each sample's loss, `(N,)`; training minimises its mean. `options` are those of `weights`.

    `pixel_weight`, `(N, 1, h, w)`, multiplies the errors of single pixels.
    """
    target = process.target_from(x0, eps, t)
    return weights(weight, process, t, **options) * distance(kind, prediction, target, pixel_weight=pixel_weight)


def hybrid_loss(
    process: DiffusionProcess,
    output: torch.Tensor,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    eps: torch.Tensor,
    t: torch.Tensor,
    share: float = 0.001,
    decoder: str = "gaussian",
    pixel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each sample's loss for a network with learned variance, `(N,)`: simple + share·bound; Improved DDPM, eq. 16.

    `output` `(N, 2C, h, w)` is the prediction and the interpolation v of the variance. The bound is T times its term at
    t, in bits per dimension, with the mean detached, so that it trains the variance alone. `decoder` is `discrete` for
    pixels in [−1, 1], `gaussian` for latents. `pixel_weight`, `(N, 1, h, w)`, multiplies both terms pixel by pixel.
    """
    prediction, v = output.chunk(2, dim=1)
    log_variance = process.learned_log_variance(v, t)
    predicted_x0 = process.predict_x0(prediction.detach(), x_t, t)
    mean, _, _ = process.posterior(predicted_x0, x_t, t)
    kl = step_kl(process, mean, log_variance, x0, x_t, t)
    first = (t == 0).view(-1, *[1] * (kl.ndim - 1))
    terms = torch.where(first, decoder_nll(decoder, x0, mean, log_variance), kl)
    bound = pixel_mean(terms, pixel_weight) / math.log(2)
    simple = distance("l2", prediction, process.target_from(x0, eps, t), pixel_weight=pixel_weight)
    return simple + share * process.timesteps * bound
