"""What a run will take, told before it begins."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

import train_ldm
from ldm.config import load
from ldm.preflight import Needs

pytestmark = pytest.mark.slow


def test_a_dry_run_measures_both_stages_and_trains_nothing(
    root: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    given = ["--config", str(root / "configs/tiny.yaml"), "--dry-run", f"run.dir={folder}", "stage1.gan.layers=2",
             "stage1.gan.warmup=5", f"data.cache_dir={tiny_run / 'cache'}"]  # fmt: skip
    assert train_ldm.main(given) == 0
    said = capsys.readouterr().out
    for stage in ("stage1", "stage2"):
        measured = rf"measured {stage}: [\d,.]+ images/s in global batches of 16, [\d,.]+ [MG]B of memory .* of disk"
        assert re.search(measured, said), said
    assert "cache: " not in said
    assert not folder.exists()


def test_a_start_measures_once_and_ends_with_the_same_weights(
    tiny_run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """That the weights are the same is held in test_two_stages, against runs without."""
    needs = json.loads((tiny_run / "preflight.json").read_text())
    assert needs["stage2"]["needs"]["step"] > 0
    settings = load(root / "configs/tiny.yaml")
    state = 4 * 4 * settings.run.keep  # bytes of a parameter in that many checkpoints
    assert needs["stage2"]["needs"]["disk"] > 1_600_000 * state
    given = ["--config", str(root / "configs/tiny.yaml"), "--dry-run", f"run.dir={tiny_run}"]
    assert train_ldm.main(given) == 0
    assert "measured" not in capsys.readouterr().out  # nothing is left to train


def test_where_memory_lacks_nothing_is_tried(
    root: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3_400_000))
    given = ["--config", str(root / "configs/tiny.yaml"), "--dry-run", f"run.dir={tmp_path / 'run'}",
             f"data.cache_dir={tiny_run / 'cache'}", "stage1.steps=1"]  # fmt: skip
    assert train_ldm.main(given) == 0
    assert "stage2: not measured: it needs more than 33 MB of memory, and 3 MB are free here" in capsys.readouterr().out


def test_the_whole_stage_is_counted_from_a_step_and_a_validation(root: Path) -> None:
    settings = load(root / "configs/openmoji.yaml", ["stage2.steps=1000", "stage2.evaluate_every=300"])
    needs = Needs(step=0.5, validation=10, encoding=60, memory=1_500_000_000, disk=120_000_000, device="a GPU")
    assert needs.describe(settings, "stage2") == (
        f"measured stage2: {2 * settings.stage2.batch} images/s in global batches of {settings.stage2.batch}, "
        "1.5 GB of memory on a GPU; encoding takes 60 s, 1000 steps take 8 min, 4 × validation 40 s: 10 min in all, "
        "and 120 MB of disk"
    )
