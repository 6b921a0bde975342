"""Quality against time: what the curves, ratios and folders of `benchmark.py quality` hold."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import benchmark
import benchmark_quality
import pytest
from benchmark_quality import OURS, REFERENCE, Point, interval, table, time_to_reach
from PIL import Image

from ldm.models.autoencoder import Autoencoder


def point(row: str, seconds: float, share: float, seed: int = 0, count: int = 100) -> Point:
    return Point(row, seed, seconds / 100, seconds, 10, 2.0, {"training captions": (share, count)})


def test_the_time_to_reach_a_share_is_interpolated_in_the_logarithm_of_time() -> None:
    times, values = [10.0, 40.0, 160.0], [0.2, 0.4, 0.8]
    assert time_to_reach(times, values, 0.3) == pytest.approx(20)
    assert time_to_reach(times, values, 0.6) == pytest.approx(80)
    assert time_to_reach(times, values, 0.8) == pytest.approx(160)
    assert time_to_reach(times, values, 0.1) == 10
    assert time_to_reach(times, values, 0.9) is None


def test_an_interval_is_that_of_all_seeds_images_together() -> None:
    value, low, high = interval([point("ours", 1, 0.5, 0, 10), point("ours", 1, 0.7, 1, 30)], "training captions")
    assert value == pytest.approx(26 / 40)
    z, n, p = 1.959964, 40, 26 / 40  # Wilson's interval
    centre, margin = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert [low, high] == pytest.approx([(centre - margin) / (1 + z * z / n), (centre + margin) / (1 + z * z / n)])


def test_the_table_says_how_much_sooner_and_how_much_longer() -> None:
    ours = {share: [point("ours, bf16", 100 * share, share)] for share in (0.25, 0.5, 1.0)}
    theirs = {share: [point("reference, bf16", 100 * share, share / 8)] for share in REFERENCE}
    line = table({"ours, bf16": ours, "reference, bf16": theirs}).splitlines()[-1]
    assert line == (  # 0.5, the last figure of the reference, took it 400 seconds and us 50
        "- training captions: ours, bf16 has the last figure of reference, bf16, 0.50, 8.0 times sooner; "
        "reference, bf16 has ours, 1.00: has not reached it, after 4.0 times the time"
    )


@pytest.mark.slow
def test_both_trainers_are_judged_at_their_times_and_trained_once(
    call: Callable[..., str],
    root: Path,
    tmp_path: Path,
    words: Path,
    vae: Autoencoder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(benchmark_quality, "TRAINING_CAPTIONS", 2)
    monkeypatch.setattr(benchmark_quality, "NOISES", (0,))
    vae.save(tmp_path / "vae")
    settings = ["data.size=16", "stage2.channels=[8, 8]", "stage2.norm_num_groups=4", "stage2.batch=4"]
    settings += ["stage2.lr_warmup_steps=0", "sample.steps=1", f"text.model={words}", "text.max_tokens=8"]
    settings += [f"stage1.pretrained={tmp_path}/vae", "data.source={path: openmoji-demo, limit: 24}"]
    command = ["quality", "--config", root / "configs/tiny.yaml", "--out", tmp_path / "out", "--seeds", "3"]

    def run(seconds: float = 0.4, status: int = 0) -> str:
        return call(benchmark.main, *command, "--seconds", seconds, *settings, status=status)

    output = run()
    files = sorted((tmp_path / "out").glob("*/point-*.json"))
    points = [json.loads(file.read_text()) for file in files]
    shares = {row: [p["share"] for p in points if p["row"].startswith(row)] for row in ("ours", "reference")}
    assert shares == {"ours": [*OURS], "reference": [*REFERENCE]}
    theirs = [p for p in points if p["row"].startswith("reference")]
    assert all(p["seconds"] >= 0.4 * p["share"] and p["seed"] == 3 for p in theirs)
    assert all(earlier["steps"] <= later["steps"] for earlier, later in itertools.pairwise(theirs))
    assert all(p["scores"]["training captions"][1] == 2 for p in points)
    assert len(Image.open(tmp_path / "out" / "quality.png").getcolors(1 << 20)) > 8
    assert (tmp_path / "out" / "quality.md").read_text().strip() in output

    written = [file.stat().st_mtime_ns for file in files]
    run()
    assert [file.stat().st_mtime_ns for file in files] == written
    assert "has trainings of 0.4; give that, or another --out" in run(9, status=2)
