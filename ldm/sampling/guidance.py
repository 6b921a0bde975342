"""Guidance: functions that turn one denoiser into another, which follows the condition more closely."""

from __future__ import annotations

from collections.abc import Callable

import torch

from ldm.diffusion.parameterization import predict_eps, predict_x0, target_from
from ldm.models.conditioning import Condition
from ldm.sampling.solvers import Level

PredictFn = Callable[[torch.Tensor, Level], torch.Tensor]  # (x_t, level) → prediction
Network = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]  # (x_t, t, condition) → prediction
MIN_ALPHA = 1e-3  # below it x_t is all noise, and shows no class
Gradient = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t) → ∇ log p(y | x_t), as x_t


def classifier_free(
    network: Network,
    condition: Condition,
    null: Condition | None,
    scale: float | torch.Tensor,
    *,
    rescale: float = 0.0,
    interval: tuple[float, float] = (0.0, 1.0),
    weaker: Network | None = None,
) -> PredictFn:
    """Classifier-free guidance, arXiv 2207.12598, in Imagen's form: ε_∅ + scale·(ε_c − ε_∅). Scale 1 is one forward.

    `network(x, t, condition)`; `null` is the unconditional condition, None if there is none. `scale` may be `(N,)`, one
    per image. `rescale` φ in [0, 1] moves the standard deviation of the guided prediction back towards that of the
    conditional one (arXiv 2305.08891, section 3.4). Only levels whose share of noise lies within `interval` are guided
    (arXiv 2404.07724). With a `weaker` network, a worse version of the same one, its conditional prediction takes the
    place of the unconditional one: autoguidance (arXiv 2406.02507, eq. 3).
    """
    if isinstance(scale, torch.Tensor):
        scale = float(scale[0]) if bool((scale == scale[0]).all()) else scale[:, None, None, None]

    def conditional_predict(x: torch.Tensor, level: Level) -> torch.Tensor:
        return network(x, level.t, condition)

    if (not isinstance(scale, torch.Tensor) and scale == 1) or (null is None and weaker is None):
        return conditional_predict
    both = null.of(condition) if null is not None else condition

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:
        if not interval[0] <= level.noise <= interval[1]:
            return conditional_predict(x, level)
        if weaker:
            unconditional, conditional = weaker(x, level.t, condition), conditional_predict(x, level)
        else:
            unconditional, conditional = network(torch.cat([x, x]), level.t, both).chunk(2)
        guided = unconditional + scale * (conditional - unconditional)
        if not rescale:
            return guided
        c = x.shape[1]  # channels beyond c are a learned variance
        return torch.cat([rescaled(guided[:, :c], conditional[:, :c], rescale), guided[:, c:]], dim=1)

    return denoise


def rescaled(guided: torch.Tensor, conditional: torch.Tensor, phi: float) -> torch.Tensor:
    """Guided predictions with the deviation of the conditional ones, mixed by φ; arXiv 2305.08891, eqs. 15 and 16."""
    dims = tuple(range(1, guided.ndim))
    full = guided * (conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
    return phi * full + (1 - phi) * guided


def thresholded(denoise: PredictFn, prediction_type: str, percentile: float) -> PredictFn:
    """Dynamic thresholding of the predicted x_0 in pixel space; Imagen, arXiv 2205.11487, section 2.3.

    s is the `percentile`, in (0, 1], of x_0's absolute values, at least 1; x_0 is clamped to [−s, s] and divided by s.
    """

    def thresholded_predict(x: torch.Tensor, level: Level) -> torch.Tensor:
        prediction, c = denoise(x, level), x.shape[1]
        x0 = predict_x0(prediction_type, prediction[:, :c], x, level.alpha, level.sigma)
        s = x0.flatten(1).abs().float().quantile(percentile, dim=1).clamp(min=1)[:, None, None, None]
        x0 = x0.clamp(-s, s) / s
        eps = predict_eps("x0", x0, x, level.alpha, level.sigma)
        return torch.cat([target_from(prediction_type, x0, eps, level.alpha, level.sigma), prediction[:, c:]], dim=1)

    return thresholded_predict


def by_classifier(denoise: PredictFn, prediction_type: str, gradient: Gradient, scale: float) -> PredictFn:
    """Classifier guidance of deterministic solvers: ε − √(1 − ᾱ)·s·∇ log p(y | x_t); arXiv 2105.05233, Algorithm 2.

    In terms of the other prediction types: x_0 = (x_t − σ·ε) / α changes with ε, so v and the flow's velocity change by
    1 / α as much as ε. In pure noise, which shows no class, nothing changes.
    """

    def guided_predict(x: torch.Tensor, level: Level) -> torch.Tensor:
        prediction = denoise(x, level)[:, : x.shape[1]]
        if level.alpha < MIN_ALPHA:
            return prediction
        change = -level.sigma * scale * gradient(x, level.t)
        return (
            prediction + {"eps": 1.0, "x0": -level.sigma / level.alpha}.get(prediction_type, 1 / level.alpha) * change
        )

    return guided_predict
