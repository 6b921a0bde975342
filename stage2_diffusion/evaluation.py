"""`stage2.evaluate`: FID and other figures of generated images while stage two trains, with the EMA weights."""

from __future__ import annotations

from functools import partial

import torch

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.data.stream import Stream
from ldm.distributed.launch import on_main
from ldm.evaluation import distances
from ldm.evaluation.features import Features
from ldm.evaluation.figures import Figure
from ldm.evaluation.generation import MAX_REAL_IMAGES, GenerationPlan, generated_features, real_features
from ldm.evaluation.model_figures import measure
from ldm.evaluation.networks import load_network
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.trainer import Trainer
from ldm.utils.errors import UserError


class Evaluation:
    """Figures by `stage2.evaluate`, logged as `evaluate/<network>/<metric>`; nothing where that is null.

    Generated images are compared with the training images. Prompts, noise and batches are the same each time, so that
    `scripts/evaluate.py` gives the same numbers for the same weights.
    """

    def __init__(self, config: Config, data: Index | Stream, model: LatentDiffusion, device: torch.device):
        self.model, self.options = model, config.stage2.evaluate
        if not self.options or not isinstance(data, Index):  # the configuration allows no stream here
            return
        options, conditions = self.options, config.stage2.conditions
        sampling = Sampling(num_inference_steps=options.steps, guidance_scale=options.guidance)
        self.plan = GenerationPlan.of(data, conditions, options.images, batch=options.batch, options=sampling)
        self.network = load_network(options.network, device, options.weights, model.autoencoder)
        images = data.select("train").subset(MAX_REAL_IMAGES)
        self.real = partial(real_features, images, config.data.size, self.network, config.cache_dir)

    def __call__(self, trainer: Trainer) -> dict[str, Figure]:
        """Draws the images, on all processes, and logs their figures; returns them by metric."""
        if not self.options:
            return {}
        callback = trainer.dry_run.evaluated if trainer.dry_run else None
        with trainer.ema_weights("an evaluation"), torch.no_grad():
            generated = generated_features(self.plan, self.model, self.network, callback)
            real = self.real()
        if trainer.dry_run:  # whose images are too few
            return {}
        figures = on_main(lambda: self._measure(real, generated))
        trainer.log_values(logged(self.network.name, figures))
        return figures

    def _measure(self, real: Features | None, generated: Features) -> dict[str, Figure]:
        assert self.options and real is not None, "on the main process"
        return measure(self.options.metrics, real, generated, self.network, self.plan.prompts)


def check_real_images(config: Config, data: Index | Stream) -> None:
    """UserError where there are too few training images for a metric of `stage2.evaluate`."""
    if not (options := config.stage2.evaluate):
        return
    count = len(data.select("train")) if isinstance(data, Index) else 0
    for name in options.metrics:
        if count < (least := max(distances.METRICS[name].min_images, 2)):
            raise UserError(
                f"stage2.evaluate.metrics: {name} compares with {least} training images or more, and there are {count}; "
                "leave it out"
            )


def logged(network: str, figures: dict[str, Figure]) -> dict[str, float]:
    """Figures as lines of metrics have them: `evaluate/<network>/<metric>`, and its interval's ends."""
    values: dict[str, float] = {}
    for name, figure in figures.items():
        ends = {"": figure.value, "_low": figure.low, "_high": figure.high}
        values |= {f"evaluate/{network}/{name}{end}": value for end, value in ends.items() if value is not None}
    return values
