"""From noise to latents: the loop, and what is done within it to fill holes and to go beyond the network's size."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch

from ldm.diffusion.parameterization import predict_x0
from ldm.models.conditioning import Condition
from ldm.sampling.guidance import Gradient, Network, PredictFn
from ldm.sampling.solvers import Solver


class Step(NamedTuple):
    """What a callback gets after each evaluation of the network."""

    number: int
    """1 for the first, `total` for the last; solvers of second order take two of them a step."""
    total: int
    x0: torch.Tensor
    """The latents as the network sees them through the noise, `(N, C, h, w)`."""


class InpaintMask(NamedTuple):
    """What inpainting with any model keeps: latents `(N, C, h, w)` where the mask `(N, 1, h, w)` is 0, with noise."""

    x0: torch.Tensor
    mask: torch.Tensor
    eps: torch.Tensor


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """`(len(seeds), *shape)`; each picture's noise follows from its own seed, whatever the batch."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


@torch.no_grad()
def sample(
    denoise: PredictFn,
    solver: Solver,
    noise: torch.Tensor,
    generators: Sequence[torch.Generator] | None = None,
    *,
    x0: torch.Tensor | None = None,
    first: int = 0,
    kept: InpaintMask | None = None,
    pull: tuple[Gradient, float] | None = None,
    callback: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Solves the reverse process from standard normal `noise` `(N, C, h, w)`; returns x_0.

    From the step `first` on it starts from `x0` with noise. `generators`, one a picture, feed solvers that add noise.
    `kept` is put back after every step (RePaint without its returns, arXiv 2201.09865, eq. 8). `pull`, a classifier's
    gradient and its scale, moves ddpm's means (arXiv 2105.05233, Algorithm 1). `callback` is called after every
    evaluation.
    """
    x = solver.begin(noise, x0, first)
    for i in range(first * solver.per_step, len(solver.levels)):
        level, given = solver.levels[i], solver.input(x, i)
        prediction = denoise(given, level)
        if not solver.ancestral:  # a learned variance has no meaning to the others
            prediction = prediction[:, : x.shape[1]]
        output = solver.output(prediction, given, i)
        x = solver.step(output, i, x, generators)
        if pull:
            gradient, scale = pull
            x = x + scale * solver.variance(output, i) * solver.slope(i) * gradient(given, level.t)
        if kept:
            x = torch.where(kept.mask > 0, x, solver.noised(kept.x0, kept.eps, i + 1))
        if callback:
            known = prediction[:, : x.shape[1]], given, level.alpha, level.sigma
            callback(Step(i + 1, len(solver.levels), predict_x0(solver.prediction_type, *known)))
    return x


def in_tiles(network: Network, side: int, overlap: float = 0.25) -> Network:
    """A network on latents of any size, from one that knows squares of `side`: overlapping tiles, blended each time.

    Tiles overlap by at least that share of `side`, and count the less the nearer their edge is; what stands beside x_t
    is cut alike (MultiDiffusion, arXiv 2302.08113, eq. 5).
    """

    @cache
    def window_of(tall: int, wide: int, device: torch.device) -> torch.Tensor:
        return torch.outer(_ramp(tall, side * overlap), _ramp(wide, side * overlap)).to(device)

    def tiled(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        h, w = x.shape[2:]
        tall, wide = min(side, h), min(side, w)
        if (tall, wide) == (h, w):
            return network(x, t, condition)
        window = window_of(tall, wide, x.device)
        total: torch.Tensor | None = None
        weight = torch.zeros(h, w, device=x.device)
        for top, left in itertools.product(_starts(h, tall, overlap), _starts(w, wide, overlap)):
            part = (..., slice(top, top + tall), slice(left, left + wide))
            beside = None if condition.image is None else condition.image[part]
            found = network(x[part], t, condition._replace(image=beside))
            if total is None:
                total = found.new_zeros(*found.shape[:2], h, w)
            total[part] += window * found
            weight[part] += window
        assert total is not None, "there is at least one tile"
        return total / weight

    return tiled


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles begin that cover a length evenly and overlap by at least that share."""
    count = 1 if tile >= length else math.ceil((length - tile) / (tile * (1 - overlap))) + 1
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def _ramp(length: int, rise: float) -> torch.Tensor:
    """Weights that rise from the ends of a tile."""
    distance = torch.arange(length) + 0.5
    return (torch.minimum(distance, length - distance) / max(rise, 1.0)).clamp(max=1.0)


def between(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Noise a share of the way from one to another, `(C, h, w)`: spherical, so that it stays noise."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = cosine.double().acos()
    if angle < 1e-4:
        return a + share * (b - a)
    return ((torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)).to(a)
