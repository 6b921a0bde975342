"""A model's network with all that guides its predictions: classifier-free guidance, thresholding, a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ldm.models.conditioning import Condition, predict
from ldm.models.unet import UNet
from ldm.sampling.guidance import Gradient, Network, PredictFn, by_classifier, classifier_free, thresholded
from ldm.sampling.loop import in_tiles
from ldm.sampling.prepare import Prepared, guidance_scale
from ldm.sampling.request import SamplingInputs

if TYPE_CHECKING:
    from ldm.sampling.pipeline import LatentDiffusion


def guided_network(
    model: LatentDiffusion, prepared: Prepared, inputs: SamplingInputs
) -> tuple[PredictFn, tuple[Gradient, float] | None]:
    """The guided denoiser; for ddpm with a classifier also its gradient and scale, which move each step's mean."""
    options = inputs.options
    weaker = None if options.weaker is None else network_of(model, options.weaker)
    guided = classifier_free(
        network_of(model, model.unet),
        prepared.condition,
        prepared.unconditional,
        guidance_scale(model, inputs),
        rescale=options.guidance_rescale,
        interval=options.interval,
        weaker=weaker,
    )
    if options.threshold is not None:
        guided = thresholded(guided, model.prediction_type, options.threshold)
    if options.classifier is None or not options.classifier_scale:
        return guided, None

    def gradient(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        label = prepared.classifier_label
        return options.classifier.gradient(x, t.expand(len(x)), label)  # type: ignore[no-any-return]

    if prepared.solver.ancestral:
        return guided, (gradient, options.classifier_scale)
    return by_classifier(guided, model.prediction_type, gradient, options.classifier_scale), None


def network_of(model: LatentDiffusion, unet: UNet) -> Network:
    """A U-Net computed in its own precision, float32 outside; an upscaler runs in tiles of its training size."""

    def network(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return predict(unet, x, t, condition).to(torch.float32, copy=True)  # CUDA graphs reuse the output's memory

    return in_tiles(network, model.side // model.autoencoder.factor) if model.task == "upscale" else network
