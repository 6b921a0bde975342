"""Keys of `python -m stage2_diffusion.distillation.train`."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.schema.training import Decay, Training


class DistillConfig(Training):
    """Keys of `python -m stage2_diffusion.distillation.train`, which distils a run's model into one of few steps."""

    steps: PositiveInt = 1000
    """Optimizer steps of each halving, or of the whole consistency distillation."""
    batch: PositiveInt = 64
    """Global batch: the images of one optimizer step, over all processes."""
    lr_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the learning rate rises linearly from 0."""
    lr_scheduler: Literal["constant", "cosine", "linear"] = "linear"
    """Schedule of the learning rate in each halving; `cosine` and `linear` end at 0."""
    ema_decay: Decay = 0.99
    """Decay of the averaged weights: the next teacher, what is exported, and a consistency model's own target."""
    guidance_from: float = Field(default=1.0, ge=1)
    """Smallest guidance scale that the student is conditioned on."""
    guidance_to: float | None = Field(default=None, gt=1)
    """Largest guidance scale; default: twice the run's `sample.guidance`."""
    guidance_steps: PositiveInt = 1000
    """Progressive: optimizer steps that distil guidance, before the first halving."""
    blended: float = Field(default=0.5, ge=0, le=1)
    """Fraction of captions that are blended with another, so that students generalise as their teacher does."""
    steps_from: PositiveInt = 64
    """Progressive: solver steps of the first teacher."""
    steps_to: PositiveInt = 4
    """Solver steps of the last student; of a consistency model, the default number."""
    loss: Literal["snr_truncated", "v"] = "snr_truncated"
    """Progressive: weight of the error of x_0: max(SNR, 1), or 1 + SNR, the error of v."""
    original_steps: PositiveInt = 50
    """Consistency: steps of the teacher over the training timesteps, one of which lies between student and target."""
    huber: float = Field(default=0.001, gt=0)
    """Consistency: c of the pseudo-Huber loss."""
    evaluate_every: PositiveInt = 500
    """Steps between evaluations of the loss on a batch of held-out images, always with the same noise."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.DISTILLATION)

    def halvings(self) -> list[int]:
        """Solver steps of each student, `steps_to` last; ValueError where halving does not lead there."""
        ratio = self.steps_from // self.steps_to
        if ratio < 2 or ratio & (ratio - 1) or self.steps_from != ratio * self.steps_to:
            raise ValueError(
                f"steps_to: {self.steps_to} is not reached by halving steps_from, {self.steps_from}; "
                f"steps_from={16 * self.steps_to} would lead there"
            )
        return [self.steps_from >> i for i in range(1, ratio.bit_length())]
