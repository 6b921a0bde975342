"""What tests of stage two share: small parts, and settings that train them within a second or two."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, BertConfig, BertModel

from ldm import config, text
from ldm.autoencoder import Autoencoder, build
from ldm.data import index
from ldm.data.index import Index
from ldm.schema import Config, Stage1Config

SMALL = [
    "run.tracker=none", "run.precision=no", "run.log_every=1", "data.size=16", "stage1.channels=[16, 16]",
    "stage2.channels=[8, 8]", "stage2.groups=4", "stage2.mid_attention=false", "stage2.pooled_text=false",
    "stage2.batch=8", "stage2.warmup=0", "stage2.lr=1e-2", "stage2.steps=3", "stage2.ema=0.9", "sample.prompts=[]",
    "sample.steps=2", "text.max_tokens=8",
]  # fmt: skip


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small text encoder, with a dropout of its own and a pooler that no state depends on."""
    folder = tmp_path_factory.mktemp("words")
    tokenizer = AutoTokenizer.from_pretrained(text._folder(text.MINILM))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=len(tokenizer), hidden_dropout_prob=0.5, **shape)).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where drawings and their index are kept for all tests."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def vae() -> Autoencoder:
    """An autoencoder of 16 px with random weights: four channels, half the side."""
    torch.manual_seed(0)
    stage = Stage1Config(channels=(16, 16), layers=1, latent_channels=4, groups=8, mid_attention=False)
    return Autoencoder(build(stage, 16))


@pytest.fixture(scope="session")
def small(drawn: Path, words: Path) -> list[str]:
    """Overrides of configs/tiny.yaml."""
    return [*SMALL, f"data.cache_dir={drawn}", f"text.model={words}"]


@pytest.fixture
def few(root: Path, tmp_path: Path, small: list[str]) -> Callable[..., tuple[Config, Index]]:
    """Small settings with overrides, and twelve drawings with four that are held out."""

    def given(*overrides: str) -> tuple[Config, Index]:
        settings = config.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}", *small, *overrides])
        everything = index.build(settings)
        splits = everything.column("split")
        rows = [np.flatnonzero(splits == "train")[::50][:12], np.flatnonzero(splits == "combination")[::9][:4]]
        return settings, Index(everything.table, everything.sources, everything.data, np.concatenate(rows))

    return given
