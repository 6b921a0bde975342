"""The benchmark of training runs and prints figures; how fast it is, no test says."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROW = re.compile(
    r"training (\w+, \w+) +([\d,.]+) img/s +([\d.]+) × +([\d,.]+) GFLOP/s, +(\d+)% of ([\d,]+) +([\d,]+) MB"
)
SMALLEST = [
    "data.size=16", "stage1.channels=[16, 16]", "stage2.channels=[8, 8]", "stage2.groups=4", "stage2.batch=8",
    "text.max_tokens=8",
]  # fmt: skip


@pytest.fixture
def main(root: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(root / "scripts")  # as for `python scripts/benchmark.py`
    return importlib.import_module("benchmark").main


@pytest.mark.slow
def test_training_is_measured_beside_the_reference_in_both_precisions(
    main: Any, call: Callable[..., str], root: Path, three_shapes: Callable[[list[str]], Path]
) -> None:
    given = [f"data.source={three_shapes(['cat', 'dog', 'red heart'] * 3)}", "run.precision=bf16", *SMALLEST]
    said = call(main, "train", "--config", root / "configs/tiny.yaml", "--steps", 4, *given)
    rows = {name: [float(x.replace(",", "")) for x in figures] for name, *figures in ROW.findall(said)}
    assert [*rows] == ["reference, no", "reference, bf16", "ours, bf16"], said
    for rate, ratio, flops, _, peak, memory in rows.values():
        assert min(rate, flops, peak, memory) > 0
        assert ratio == pytest.approx(rate / rows["reference, no"][0], abs=0.02, rel=0.02)
    ratio = float(re.search(r"ours is ([\d.]+) × the reference", said)[1])
    assert ratio == pytest.approx(rows["ours, bf16"][0] / rows["reference, bf16"][0], abs=0.02, rel=0.02)


def test_what_the_reference_can_not_train_is_refused_in_a_line(main: Any, call: Callable[..., str], root: Path) -> None:
    tiny = root / "configs/tiny.yaml"
    said = call(main, "train", "--config", tiny, "stage2.conditions=[class]", "stage2.pooled_text=false", status=2)
    assert "set stage2.conditions=[text]" in said
    assert "Traceback" not in said


def test_sampling_is_measured_beside_diffusers_pipeline(main: Any, call: Callable[..., str], tiny_run: Path) -> None:
    printed = call(main, "sample", "--model", tiny_run / "pipeline", "--batch", 2)
    for what in ("one picture", "batches of 2"):
        for who in ("diffusers, no", "ours, no"):
            assert re.search(rf"^sampling {what} +{who} +[\d.]+ s +[\d.]+ img/s +[\d.]+ ×$", printed, re.MULTILINE)
        assert re.search(rf"^sampling {what} +in the same precision: no [\d.]+ ×", printed, re.MULTILINE)


def test_what_can_not_be_measured_is_one_line(main: Any, call: Callable[..., str], tmp_path: Path) -> None:
    assert "--model: none given" in call(main, "sample", status=2)
    assert "--config: none given" in call(main, "train", status=2)
    assert "--model: can't load" in call(main, "sample", "--model", tmp_path, status=2)
