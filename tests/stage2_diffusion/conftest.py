"""Fixtures of the tests of stage two: settings that train a model within a second or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from of_config import indexed_once

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data.index import Index
from stage2_diffusion import validation

SMALL = [
    "run.tracker=none",
    "run.precision=no",
    "run.log_every=1",
    "data.size=16",
    "stage1.channels=[16, 16]",
    "stage2.channels=[8, 8]",
    "stage2.norm_num_groups=4",
    "stage2.mid_attention=false",
    "stage2.pooled_text=false",
    "stage2.batch=8",
    "stage2.lr_warmup_steps=0",
    "stage2.lr=1e-2",
    "stage2.steps=3",
    "stage2.ema_decay=0.9",
    "sample.prompts=[]",
    "sample.steps=2",
    "text.max_tokens=8",
]


@pytest.fixture(scope="session")
def small(drawn: Path, words: Path) -> list[str]:
    """Overrides of configs/tiny.yaml."""
    return [*SMALL, f"data.cache_dir={drawn}", f"text.model={words}"]


@pytest.fixture
def two_noise_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    """A validation, which each training has and few tests look at, evaluates two noise levels instead of six."""
    monkeypatch.setattr(validation, "EVAL_LOG_SNRS", (-3.0, 3.0))


@pytest.fixture
def few(root: Path, tmp_path: Path, small: list[str]) -> Callable[..., tuple[Config, Index]]:
    """Small settings with overrides, and the index of twelve training and four held-out drawings."""

    def load_few(*overrides: str) -> tuple[Config, Index]:
        settings = loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}", *small, *overrides])
        index = indexed_once(settings)
        splits = index.column("split")
        rows = [np.flatnonzero(splits == "train")[::50][:12], np.flatnonzero(splits == "combination")[::9][:4]]
        return settings, Index(index.table, index.sources, index.data, np.concatenate(rows))

    return load_few
