"""The model card of a finished run."""

from pathlib import Path

import pytest

from ldm.config import loader
from ldm.training.model_card import write_card
from ldm.training.run_dir import prepare_run_dir


@pytest.fixture
def settings(root: Path, tmp_path: Path) -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", [f"run.dir={tmp_path / 'run'}"])


def test_the_card_lists_metrics_and_the_datas_licence(settings: loader.Config) -> None:
    prepare_run_dir(settings)
    write_card(settings, {"psnr": 28.0, "held-out": {"top1": 0.5}})
    card = (settings.run.dir / "README.md").read_text()
    assert "CC BY-SA 4.0" in card
    assert "| psnr | 28.000 |" in card
    assert "| held-out top1 | 0.500 |" in card
