"""What a model sees and predicts at every noise level of one image: a look inside, apart from sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

from ldm.diffusion.parameterization import predict_eps, predict_x0
from ldm.sampling.guided_network import guided_network
from ldm.sampling.prepare import prepare
from ldm.sampling.request import SamplingRequest
from ldm.sampling.solvers import Level

if TYPE_CHECKING:
    from ldm.sampling.pipeline import LatentDiffusion


class Prediction(NamedTuple):
    """The network's input and output at one noise level; tensors are `(N, C, h, w)`."""

    level: Level
    x_t: torch.Tensor
    x0: torch.Tensor
    eps: torch.Tensor


class Predictions(NamedTuple):
    """The truth, `(N, C, h, w)` each, and what the network predicts from it, the noisiest level first."""

    x0: torch.Tensor
    eps: torch.Tensor
    at: list[Prediction]


@torch.no_grad()
def predict_at_levels(model: LatentDiffusion, request: SamplingRequest) -> Predictions:
    """The predictions for the request's image with its seed's noise, at each level of the request's solver.

    x_t = α·x_0 + σ·ε at each level, independently of the others: nothing is sampled. The request's guidance holds.
    UserError as for sampling; the request needs an image.
    """
    inputs = request.resolve(model)
    prepared = prepare(model, inputs)
    assert prepared.x0 is not None, "the request has an image"
    denoise, _ = guided_network(model, prepared, inputs)
    x0, eps, predictions = prepared.x0, prepared.noise, []
    for level in prepared.solver.levels:
        x_t = level.alpha * x0 + level.sigma * eps  # DDPM, eq. 4
        output = denoise(x_t, level)[:, : x0.shape[1]]  # the other channels are a learned variance
        args = (model.prediction_type, output, x_t, level.alpha, level.sigma)
        predictions.append(Prediction(level, x_t, predict_x0(*args), predict_eps(*args)))
    return Predictions(x0, eps, predictions)
