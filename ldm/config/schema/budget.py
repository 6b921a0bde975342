"""`budget`: what `train_ldm.py --budget MINUTES` chooses the steps of both stages from."""

from __future__ import annotations

from typing import Self

from pydantic import Field, PositiveInt, model_validator

from ldm.config import rules
from ldm.config.schema.base import Section


class BudgetPoint(Section):
    stage1: PositiveInt
    """Steps of the autoencoder."""
    stage2: PositiveInt
    """Steps of the U-Net."""
    figures: str = ""
    """What a model of these steps was measured to be."""


class BudgetConfig(Section):
    points: tuple[BudgetPoint, ...] = ()
    """Steps that were measured, the fewest first. Between two, steps are interpolated; without any, `stage1.steps` and
    `stage2.steps` keep their ratio."""
    images: int = Field(default=0, ge=0)
    """Images that `scripts/evaluate.py RUN --images 0` draws after the training, within the budget."""

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.BUDGET)
