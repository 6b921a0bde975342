"""`stage2.evaluate`: figures of generated images while stage two trains."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.schema.base import PathOrId, Section


class EvaluateConfig(Section):
    """Figures of generated images, such as FID, while stage two trains: the same numbers as `scripts/evaluate.py`."""

    metrics: Annotated[tuple[str, ...], Field(min_length=1)] = ("fid", "kid")
    """`fid`, `sfid`, `kid`, `is`, `precision`, `recall`, `density`, `coverage`, `cmmd`, `clip_score`. See
    [Evaluation](../guides/evaluation.md)."""
    network: Literal[rules.FEATURE_NETWORKS] = "efficientnet-lite0"  # type: ignore[valid-type]
    """Whose features are compared; `latents` are those of the run's own autoencoder, and need no download."""
    weights: PathOrId | None = None
    """Other weights than its published ones: a file; of clip and dinov2 a folder or Hub id of transformers'."""
    images: PositiveInt = 1000
    """Images to draw. More give smaller error bars, and a smaller bias of FID; compare runs at the same number."""
    batch: PositiveInt = 16
    """Images drawn at once, whatever the number of processes; another number changes the last digits."""
    every: PositiveInt = 5000
    """Steps between evaluations; the last step is always evaluated."""
    guidance: float | None = Field(default=None, ge=1)
    """Scale of classifier-free guidance; default: `sample.guidance`."""
    steps: PositiveInt | None = None
    """Steps of the solver; default: `sample.steps`."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.EVALUATE)
