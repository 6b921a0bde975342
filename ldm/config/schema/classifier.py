"""Keys of `python -m stage2_diffusion.classifier.train`."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.schema.training import Training


class ClassifierConfig(Training):
    """The classifier of classifier guidance, which `python -m stage2_diffusion.classifier.train` trains.

    Network, learning rate and weight decay are by default those of ADM's code for 64 × 64 (arXiv 2105.05233).
    """

    batch: PositiveInt = 64
    """Global batch: the images of one optimizer step, over all processes."""
    lr: float = Field(default=3e-4, gt=0)
    """Learning rate, not scaled by batch or processes."""
    weight_decay: float = Field(default=0.05, ge=0)
    """Decoupled weight decay, as AdamW's."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""
    half: Literal[0, 1] | None = None
    """Trains on this half of the training images, so that a classifier of the other half can evaluate; default: all."""
    channels: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (128, 256, 384, 512)
    """Width of each level; each level after the first halves the resolution."""
    layers: PositiveInt = 2
    """Residual blocks a level."""
    attention: tuple[bool, ...] = (False, True, True, True)
    """Which levels have self-attention; the middle block and the pooling always have."""
    attention_head_dim: PositiveInt = 64
    """Channels of an attention head."""
    norm_num_groups: PositiveInt = 32
    """Groups of the group normalisation; divides every width."""
    evaluate_every: PositiveInt = 500
    """Steps between evaluations of the accuracy by noise level, on held-out images."""
    evaluate_images: PositiveInt = 256
    """Held-out images to evaluate on, always the same."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.CLASSIFIER)
