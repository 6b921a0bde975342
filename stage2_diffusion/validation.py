"""The loss by noise level, on held-out images and on ones trained on: does it generalise, or overfit?"""

from __future__ import annotations

from typing import Any

import torch

from ldm.config.schema import Config
from ldm.data.dataset import evaluation_batch
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.data.stream import Stream
from ldm.diffusion.losses import pixel_mean, pixel_weights
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import predict
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.evaluation_sizes import VALIDATION_BATCH
from ldm.training.trainer import Trainer
from ldm.utils.rng import normal
from stage2_diffusion.conditions import Conditions

EVAL_LOG_SNRS = (-5.0, -3.0, -1.0, 1.0, 3.0, 5.0)  # log-SNRs


def velocity_error(
    process: DiffusionProcess,
    unet: Any,
    x0: torch.Tensor,
    eps: torch.Tensor,
    log_snr: float,
    condition: Any,
    pixel_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Mean squared error of the velocity v at a noise level, `(N,)`: comparable over prediction types and schedules.

    v is that of arXiv 2202.00512: with α² + σ² = 1, ‖v − v̂‖² = (1 + SNR)·‖x_0 − x̂_0‖². The trivial predictions, x_0 = 0
    at noise and x_0 = x_t at the data, cost about 1. `pixel_weight`, `(N, 1, h, w)`, is that of the training's masks.
    """
    t = process.time_at(torch.full((len(x0),), log_snr, device=x0.device))
    x_t = process.add_noise(x0, eps, t)
    prediction = predict(unet, x_t, process.model_time(t), condition)[:, : x0.shape[1]]
    error = pixel_mean((process.predict_x0(prediction.float(), x_t, t) - x0).square(), pixel_weight)
    return error * (1 + process.log_snr(t).exp())


class Validation:
    """Evaluates some held-out images and as many of training, always the same, with the same noise.

    Held out are the splits `reconstruction` and `combination`; a stream has neither, and is not evaluated.
    """

    def __init__(
        self,
        config: Config,
        data: Index | Stream,
        model: LatentDiffusion,
        conditions: Conditions,
        process: DiffusionProcess,
    ):
        self.config, self.model, self.conditions, self.process = config, model, conditions, process
        held = data.select(*HELD_OUT)
        self.sets: dict[str, Index] = {}
        if isinstance(data, Index) and isinstance(held, Index) and len(held):
            for name, part in (("held_out", held), ("trained_on", data.select("train"))):
                if len(part):
                    self.sets[name] = part.subset(config.stage2.evaluate_images)

    def __call__(self, trainer: Trainer) -> dict[str, float]:
        """Logs `held_out_loss` and `trained_on_loss`, means over the noise levels, and each level of the former."""
        values, accelerator = dict[str, float](), trainer.accelerator
        if not self.sets:
            return values
        with trainer.ema_weights("a validation"), torch.no_grad():
            for name, index in self.sets.items():
                sums = torch.zeros(len(EVAL_LOG_SNRS) + 1, dtype=torch.float64)
                batch = min(VALIDATION_BATCH, trainer.accumulation.images)
                starts = range(0, len(index), batch)
                for first in range(0, len(starts), accelerator.num_processes):
                    own = first + accelerator.process_index
                    start = starts[min(own, len(starts) - 1)]  # a sharded U-Net is called by all, or by none
                    errors = self._errors(index, range(start, min(start + batch, len(index))))
                    if own < len(starts):
                        sums += errors
                sums = trainer.sum(sums)
                levels = (sums[:-1] / sums[-1]).tolist()
                values[f"{name}_loss"] = sum(levels) / len(levels)
                if name == "held_out":
                    values |= {
                        f"held_out_loss_at_{log_snr:+.0f}": loss
                        for log_snr, loss in zip(EVAL_LOG_SNRS, levels, strict=True)
                    }
        trainer.log_values(values)
        return values

    def _errors(self, index: Index, numbers: range) -> torch.Tensor:
        """Sums of the errors at each level, and their count."""
        model, stage = self.model, self.config.stage2
        assert model.text or not stage.text, "the configuration asks for text"
        text, device = model.text if stage.text else None, model.device
        batch, x0, _, states = evaluation_batch(
            index, numbers, model.autoencoder, text, model.classes, device, [self.conditions.draws]
        )
        condition = self.conditions(batch, x0, None)[0]
        if states:  # also where training has tokens
            condition = condition.with_text(states)
        eps = normal(self.config.run.seed, "validation", batch["position"], x0.shape[1:]).to(device)
        weight = pixel_weights(batch["mask"], stage.unmasked_weight) if "mask" in batch else None
        arguments = (self.process, model.unet, x0, eps)
        errors = [velocity_error(*arguments, level, condition, weight).sum() for level in EVAL_LOG_SNRS]
        return torch.stack([*errors, torch.tensor(float(len(numbers)))]).double().cpu()
