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
import reference_loop
import torch
from benchmark_quality import Point, interval, table, time_to_reach
from PIL import Image

from ldm.diffusion.process import DiffusionProcess
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.sampling.solvers import scheduler


def point(row: str, seconds: float, right: int, seed: int = 0, count: int = 100) -> Point:
    """Of so many prompts with an image each, of which the first ones are right."""
    scores = {f"prompt {i}": [float(i < right)] for i in range(count)}
    return Point(row, seed, seconds / 100, seconds, 10, 2.0, {"training captions": scores})


def test_the_time_to_reach_a_share_is_interpolated_in_the_logarithm_of_time() -> None:
    times, values = [10.0, 40.0, 160.0], [0.2, 0.4, 0.8]
    assert time_to_reach(times, values, 0.3) == pytest.approx(20)
    assert time_to_reach(times, values, 0.6) == pytest.approx(80)
    assert time_to_reach(times, values, 0.8) == pytest.approx(160)
    assert time_to_reach(times, values, 0.1) == 10
    assert time_to_reach(times, values, 0.9) is None


def test_an_interval_is_of_other_prompts_however_often_each_is_drawn() -> None:
    once = interval([point("ours", 1, 26, 0, 40)], "training captions")
    z, n, p = 1.959964, 40, 26 / 40  # Wilson's interval
    centre, margin = p + z * z / (2 * n), z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    assert once == pytest.approx((p, (centre - margin) / (1 + z * z / n), (centre + margin) / (1 + z * z / n)))
    value, low, high = interval([point("ours", 1, 26, seed, 40) for seed in range(9)], "training captions")
    assert value == pytest.approx(once[0]) and high - low == pytest.approx(once[2] - once[1], rel=0.1)


def lines_of(ours: dict[float, int], theirs: dict[float, int]) -> str:
    rows = {"ours, bf16": ours, "reference, bf16": theirs}
    return table({row: {t: [point(row, t, right)] for t, right in curve.items()} for row, curve in rows.items()})


def test_the_table_says_how_much_sooner_and_how_much_longer() -> None:
    text = lines_of({25: 25, 50: 50, 100: 100}, {25: 3, 50: 6, 100: 12, 200: 25, 400: 50})
    assert text.splitlines()[-1] == (
        "- training captions: reference, bf16 ends at 0.50; ours, bf16 has that 8.0 times sooner; "
        "it has not reached our 1.00 after 4.0 times the time"
    )


def test_equal_curves_are_equally_fast_also_where_they_stand_still() -> None:
    flat = {25: 10, 50: 50, 100: 50}
    assert "ours, bf16 has that 1.0 times sooner; it takes 0.5 times as long to our 0.50" in lines_of(flat, flat)


def test_what_is_reached_at_the_first_time_is_a_bound() -> None:
    text = lines_of({25: 50, 100: 60}, {25: 70, 100: 50})
    assert "ours, bf16 has that at least 1.0 times sooner; it takes at most 0.2 times as long to our 0.60" in text


def test_the_reference_is_sampled_with_the_schedule_and_the_text_that_it_trains_on(words: Path) -> None:
    sampled = scheduler(DiffusionProcess("eps", "scaled_linear"), "ddim").alphas_cumprod
    torch.testing.assert_close(reference_loop.noise_scheduler().alphas_cumprod, sampled)
    encoder, captions = text_encoder.load(str(words), 8), ["red heart", "a"]
    torch.testing.assert_close(encoder.embed_tokens(encoder.token_ids(captions)).states, encoder.encode(captions))


@pytest.mark.drill
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
    monkeypatch.setattr(benchmark_quality, "OURS", (0.5, 1.0))
    monkeypatch.setattr(benchmark_quality, "REFERENCE", (0.5, 1.0))
    vae.save(tmp_path / "vae")
    settings = ["data.size=16", "stage2.channels=[8, 8]", "stage2.norm_num_groups=4", "stage2.batch=4"]
    settings += ["stage2.lr_warmup_steps=0", "sample.steps=1", f"text.model={words}", "text.max_tokens=8"]
    settings += [f"stage1.pretrained={tmp_path}/vae", "data.source={path: openmoji-demo, limit: 24}"]
    command = ["quality", "--config", root / "configs/tiny.yaml", "--out", tmp_path / "out", "--seeds", "3"]

    def run(seconds: float = 1.6, status: int = 0) -> str:
        return call(benchmark.main, *command, "--seconds", seconds, *settings, status=status)

    output = run()
    files = sorted((tmp_path / "out").glob("*/point-*.json"))
    points = [json.loads(file.read_text()) for file in files]
    shares = {row: [p["share"] for p in points if p["row"].startswith(row)] for row in ("ours", "reference")}
    assert shares == {"ours": [0.5, 1.0], "reference": [0.5, 1.0]}
    theirs = [p for p in points if p["row"].startswith("reference")]
    assert all(p["seconds"] >= 1.6 * p["share"] and p["seed"] == 3 for p in theirs)
    assert all(earlier["steps"] <= later["steps"] for earlier, later in itertools.pairwise(theirs))
    assert all(len(p["scores"]["training captions"]) == 2 for p in points)
    assert len(Image.open(tmp_path / "out" / "quality.png").getcolors(1 << 20)) > 8
    assert (tmp_path / "out" / "quality.md").read_text().strip() in output

    written = [file.stat().st_mtime_ns for file in files]
    run()
    assert [file.stat().st_mtime_ns for file in files] == written
    assert "was trained with others: seconds: 1.6 → 9.0; name another folder" in run(9, status=2)
