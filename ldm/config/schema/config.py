"""The whole configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import model_validator

from ldm.config import rules
from ldm.config.schema.base import Section
from ldm.config.schema.budget import BudgetConfig
from ldm.config.schema.data import DataConfig
from ldm.config.schema.finetune import FinetuneConfig
from ldm.config.schema.run import RunConfig
from ldm.config.schema.sample import SampleConfig
from ldm.config.schema.stage1 import Stage1Config
from ldm.config.schema.stage2 import Stage2Config
from ldm.config.schema.text import TextConfig


class Config(Section):
    run: RunConfig = RunConfig()
    data: DataConfig
    text: TextConfig = TextConfig()
    stage1: Stage1Config = Stage1Config()
    stage2: Stage2Config = Stage2Config()
    finetune: FinetuneConfig = FinetuneConfig()
    sample: SampleConfig = SampleConfig()
    budget: BudgetConfig = BudgetConfig()

    @property
    def trains_text_encoder(self) -> bool:
        """Whether stage two changes the text encoder: its weights, adapters in it, or a word's embedding."""
        return self.text.train or self.finetune.text_encoder or self.finetune.kind == "inversion"

    @property
    def cache_dir(self) -> Path:
        return self.data.cache_dir or self.run.dir / "cache"

    @model_validator(mode="after")
    def _rules(self) -> Self:
        return rules.check(self, rules.CONFIG)
