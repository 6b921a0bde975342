"""From noise to latents: the sampling loop, with inpainting inside it, and networks in tiles for larger images."""

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
    """Progress, for a callback, after one evaluation of the network."""

    number: int
    """From 1 to `total`; second-order solvers evaluate the network twice per step."""
    total: int
    x0: torch.Tensor
    """The latents that the network predicts from x_t, `(N, C, h, w)`."""
    x_t: torch.Tensor
    """The network's input, `(N, C, h, w)`."""


class InpaintMask(NamedTuple):
    """For inpainting with any model: latents `(N, C, h, w)` to keep where `mask` `(N, 1, h, w)` is 0, and noise."""

    x0: torch.Tensor
    mask: torch.Tensor
    eps: torch.Tensor


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """`(len(seeds), *shape)`; the noise of an image depends on its own seed alone, in any batch."""
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
    inpaint: InpaintMask | None = None,
    classifier: tuple[Gradient, float] | None = None,
    callback: Callable[[Step], None] | None = None,
) -> torch.Tensor:
    """Solves the reverse process from standard normal `noise` `(N, C, h, w)`; returns x_0.

    With `x0`, it starts at the step `first` from x0 with that step's noise. `generators`, one per image, are for
    solvers that add noise. `inpaint` restores the known latents after every step (RePaint without resampling, arXiv
    2201.09865, eq. 8). `classifier`, a gradient and its scale, moves ddpm's means (arXiv 2105.05233, Algorithm 1).
    `callback` is called after every evaluation of the network.
    """
    x = solver.begin(noise, x0, first)
    for i in range(first * solver.per_step, len(solver.levels)):
        level, model_input = solver.levels[i], solver.input(x, i)
        prediction = denoise(model_input, level)
        if not solver.ancestral:  # the other solvers don't use a learned variance
            prediction = prediction[:, : x.shape[1]]
        output = solver.output(prediction, model_input, i)
        x = solver.step(output, i, x, generators)
        if classifier:
            gradient, scale = classifier
            x = x + scale * solver.variance(output, i) * solver.input_scale(i) * gradient(model_input, level.t)
        if inpaint:
            x = torch.where(inpaint.mask > 0, x, solver.noised(inpaint.x0, inpaint.eps, i + 1))
        if callback:
            predicted_x0 = predict_x0(
                solver.prediction_type, prediction[:, : x.shape[1]], model_input, level.alpha, level.sigma
            )
            callback(Step(i + 1, len(solver.levels), predicted_x0, model_input))
    return x


def in_tiles(network: Network, side: int, overlap: float = 0.25) -> Network:
    """Extends a network for squares of `side` latents to any size: it predicts overlapping tiles, which are blended.

    Tiles overlap by at least the share `overlap` of `side`; their weight falls towards their edges. The condition's
    image is cropped in the same way (MultiDiffusion, arXiv 2302.08113, eq. 5).
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
            image = None if condition.image is None else condition.image[part]
            prediction = network(x[part], t, condition._replace(image=image))
            if total is None:
                total = prediction.new_zeros(*prediction.shape[:2], h, w)
            total[part] += window * prediction
            weight[part] += window
        assert total is not None, "there is at least one tile"
        return total / weight

    return tiled


def _starts(length: int, tile: int, overlap: float) -> list[int]:
    """Where tiles start that cover `length` evenly and overlap by at least the share `overlap`."""
    count = 1 if tile >= length else math.ceil((length - tile) / (tile * (1 - overlap))) + 1
    return [round(i * (length - tile) / max(1, count - 1)) for i in range(count)]


def _ramp(length: int, rise: float) -> torch.Tensor:
    """Weights `(length,)` that rise linearly from both ends of a tile to 1."""
    distance = torch.arange(length) + 0.5
    return (torch.minimum(distance, length - distance) / max(rise, 1.0)).clamp(max=1.0)


def slerp(a: torch.Tensor, b: torch.Tensor, share: float) -> torch.Tensor:
    """Noise a share of the way from a to b, `(C, h, w)`: spherical interpolation, which keeps its norm."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten(), b.flatten(), dim=0).clamp(-1, 1)
    angle = cosine.double().acos()
    if angle < 1e-4:
        return a + share * (b - a)
    return ((torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)).to(a)
