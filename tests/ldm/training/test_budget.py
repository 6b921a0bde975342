"""`--budget`: steps that fill so many minutes, and what is reported where the load changes."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from ldm.config import loader
from ldm.config.schema import Config, Stage1Config
from ldm.training.budget import (
    REST,
    LoadWatch,
    Plan,
    adjusted,
    choose,
    fixed_seconds,
    measured_ratio,
    measured_step,
    steps_to_measure,
)
from ldm.training.resource_estimate import ResourceEstimate
from ldm.utils.errors import UserError

POINTS = "budget={points: [{stage1: 300, stage2: 400, figures: few}, {stage1: 900, stage2: 1600, figures: many}]}"
FIXED = {"start and plan": 40.0, "evaluation": 60.0}


def needs(stage1: float = 0.2, stage2: float = 0.5) -> dict[str, ResourceEstimate]:
    def of(step: float) -> ResourceEstimate:
        return ResourceEstimate(step, validation=1.0, sheet=2.0, encoding=3.0, memory=0, disk=0, device="the CPU")

    return {"stage1": of(stage1), "stage2": of(stage2)}


@pytest.fixture(scope="module")
def config(root: Path) -> Config:
    return loader.load(root / "configs/openmoji.yaml", [POINTS])


def seconds(config: Config, stage1: int, stage2: int) -> float:
    """What these steps take, by the estimates that were given to the plan."""
    planned = Plan(0, {"stage1": stage1, "stage2": stage2}, {}, {}, "").apply(config)
    return sum(FIXED.values()) + sum(need.seconds_left(planned, name) for name, need in needs().items())


@pytest.mark.parametrize("minutes", [7, 10, 15, 60, 600])
def test_a_plan_fills_its_budget(config: Config, minutes: int) -> None:
    plan = choose(config, minutes, FIXED, needs())
    total = sum(plan.seconds.values())
    assert total == pytest.approx(seconds(config, **plan.steps))
    assert 0.98 * 60 * minutes < total <= 60 * minutes


@pytest.mark.parametrize(("stage1", "stage2"), [(300, 400), (900, 1600), (1800, 3200)])
def test_the_time_of_a_point_is_spent_on_its_steps(config: Config, stage1: int, stage2: int) -> None:
    plan = choose(config, seconds(config, stage1, stage2) / 60, FIXED, needs())
    assert plan.steps["stage1"] == pytest.approx(stage1, abs=1)
    assert plan.steps["stage2"] == pytest.approx(stage2, abs=1)


def test_without_points_both_stages_keep_their_ratio(root: Path) -> None:
    config = loader.load(root / "configs/openmoji.yaml", ["budget={}", "stage1.steps=500", "stage2.steps=1000"])
    for minutes in (3, 30):
        steps = choose(config, minutes, FIXED, needs()).steps
        assert steps["stage2"] == pytest.approx(2 * steps["stage1"], abs=2)


def test_the_figures_are_those_of_the_points_around_the_plan(config: Config) -> None:
    between, beyond = (choose(config, minutes, FIXED, needs()).figures for minutes in (8, 60))
    assert between == "few (300 + 400 steps) to many (900 + 1,600 steps)"
    assert beyond == "many (900 + 1,600 steps)"
    few, many = config.budget.points
    unknown = few.model_copy(update={"figures": ""}), many
    fewer = config.model_copy(update={"budget": config.budget.model_copy(update={"points": unknown})})
    assert choose(fewer, 8, FIXED, needs()).figures == "less than many (900 + 1,600 steps)"


BEGUN = FIXED["start and plan"]


def test_steps_stay_where_stage_one_took_its_time(config: Config) -> None:
    plan = choose(config, 15, FIXED, needs())
    assert adjusted(plan, config, needs()["stage2"], BEGUN, BEGUN + plan.seconds["stage1"]) is plan


@pytest.mark.parametrize("ratio", [0.7, 1.2, 1.5])
def test_steps_adjusted_to_the_speed_of_stage_one_fill_the_budget(config: Config, ratio: float) -> None:
    plan = choose(config, 15, FIXED, needs())
    elapsed = BEGUN + ratio * plan.seconds["stage1"]
    changed = adjusted(plan, config, needs()["stage2"], BEGUN, elapsed, ratio)
    slower = needs(ratio * 0.2, ratio * 0.5)["stage2"]
    others = ratio * (slower.validation + slower.sheet + slower.encoding)
    total = elapsed + ratio * FIXED["evaluation"] + changed.steps["stage2"] * slower.step + others
    assert 0.98 * 15 * 60 < total <= 15 * 60
    assert (changed.steps["stage2"] < plan.steps["stage2"]) == (ratio > 1)
    assert changed.steps["stage1"] == plan.steps["stage1"]
    assert sum(changed.seconds.values()) == pytest.approx(total, rel=0.01)


def test_time_lost_before_stage_two_costs_steps_without_a_change_of_speed(config: Config) -> None:
    plan = choose(config, 15, FIXED, needs())
    changed = adjusted(plan, config, needs()["stage2"], BEGUN + 50, BEGUN + 100 + plan.seconds["stage1"])
    assert plan.steps["stage2"] - changed.steps["stage2"] == pytest.approx(100 / 0.5, abs=20)


@pytest.mark.parametrize(("overrides", "least"), [([], 400), (["stage2.lr_warmup_steps=500"], 501)])
def test_stage_two_has_the_steps_of_the_first_point_and_more_than_its_warm_up(
    root: Path, overrides: list[str], least: int
) -> None:
    config = loader.load(root / "configs/openmoji.yaml", [POINTS, *overrides])
    plan = choose(config, 15, FIXED, needs())
    changed = adjusted(plan, config, needs()["stage2"], BEGUN, 14 * 60)
    assert changed.steps["stage2"] == least
    assert changed.apply(config).stage2.steps == least


def test_the_ratio_is_that_of_the_steps_times(tmp_path: Path) -> None:
    plan = Plan(15, {}, {"stage1": 0.2}, {}, "")
    file = tmp_path / "metrics.jsonl"
    stage = Stage1Config(batch=16)
    assert measured_ratio(plan, file, stage) == 1.0  # nothing is known
    lines = [{"step": 20 * i, "images_per_second": speed} for i, speed in enumerate((80, 40, 4, 50), 1)]
    file.write_text("\n".join(map(json.dumps, [*lines, {"step": 80, "psnr": 20}])))  # one with a validation
    assert measured_ratio(plan, file, stage) == pytest.approx((16 / 50 + 16 / 40) / 2 / 0.2)
    assert measured_ratio(plan, file, Stage1Config(batch=16, gan={})) == 1.0  # measured with it from the start


@pytest.mark.parametrize("ratio", [0.6, 0.9, 1.3])
def test_half_way_the_rest_is_adjusted_to_the_speed_of_its_own_steps(config: Config, ratio: float) -> None:
    plan = choose(config, 15, FIXED, needs())
    done, stage1 = plan.pause, BEGUN + plan.seconds["stage1"]
    elapsed = stage1 + done * ratio * 0.5
    changed = adjusted(plan, config, needs()["stage2"], stage1, elapsed, ratio, done)
    left = changed.steps["stage2"] - done
    total = elapsed + ratio * (
        left * 0.5 + needs()["stage2"].validation + needs()["stage2"].sheet + FIXED["evaluation"]
    )
    assert 0.98 * 15 * 60 < total <= 15 * 60
    assert (changed.steps["stage2"] < plan.steps["stage2"]) == (ratio > 1)
    assert sum(changed.seconds.values()) == pytest.approx(total, rel=0.01)
    assert adjusted(plan, config, needs()["stage2"], stage1, 15 * 60, ratio, done).steps["stage2"] == done + 1
    # what comes after it is expected to take `ratio` times what was measured, not of what was expected before
    again = adjusted(changed, config, needs()["stage2"], stage1, elapsed + 100, ratio, changed.pause)
    assert again.seconds["evaluation"] == pytest.approx(ratio * FIXED["evaluation"])


def test_a_rest_has_more_steps_than_the_warm_up(root: Path) -> None:
    config = loader.load(root / "configs/openmoji.yaml", [POINTS, "stage2.lr_warmup_steps=500"])
    plan = choose(config, 15, FIXED, needs())
    changed = adjusted(plan, config, needs()["stage2"], BEGUN, 15 * 60, 1.0, done=400)
    assert changed.apply(config).stage2.steps == 501


def test_a_plan_pauses_half_way_to_the_end_until_two_minutes_or_a_tenth_of_the_budget_are_left() -> None:
    plan = Plan(15, {"stage1": 300, "stage2": 1000}, {"stage2": 0.5}, {}, "")
    pauses = []
    while plan.pause:
        pauses.append(plan.pause)
        plan = replace(plan, done=plan.pause)
    assert pauses == [500, 750, 875]  # with 500, 250, 125 s of steps before each
    assert replace(plan, done=500, minutes=42).pause == replace(plan, done=761).pause == 0


def test_the_time_of_a_step_is_that_of_the_steps_since_the_pause(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "images_per_second": speed} for step, speed in ((10, 64), (20, 64), (30, 16), (40, 16))]
    file.write_text("\n".join(map(json.dumps, lines)))
    assert measured_step(file, 32, done=20) == 2.0
    assert measured_step(file, 32, done=40) is None


def test_too_little_time_is_refused_with_the_least(config: Config) -> None:
    with pytest.raises(UserError, match=r"--budget: 1 minutes; here it takes [\d.]+ at least") as refused:
        choose(config, 1, FIXED, needs())
    least = float(re.findall(r"takes ([\d.]+)", str(refused.value))[0])
    assert choose(config, least, FIXED, needs()).steps == {"stage1": 300, "stage2": 400}


def test_a_plan_is_read_as_it_was_written(config: Config, tmp_path: Path) -> None:
    assert Plan.read(tmp_path) is None
    plan = choose(config, 10, FIXED, needs())
    plan.write(tmp_path)
    assert Plan.read(tmp_path) == plan
    applied = plan.apply(config)
    assert {"stage1": applied.stage1.steps, "stage2": applied.stage2.steps} == plan.steps
    (tmp_path / "plan.json").write_text("{")
    with pytest.raises(UserError, match=r"--budget: .*plan.json is damaged"):
        Plan.read(tmp_path)


def test_an_evaluation_afterwards_takes_the_time_of_its_images(config: Config) -> None:
    after = config.model_copy(update={"budget": config.budget.model_copy(update={"images": 240})})
    assert len(config.sample.prompts) == 24
    parts = {"start and plan": 30, "saving": REST * 15 * 60}
    assert fixed_seconds(after, 15, 30, 12, needs()["stage2"]) == {**parts, "evaluation": 12 + 10 * 2.0}
    assert fixed_seconds(config, 15, 30, 12, needs()["stage2"]) == parts


@pytest.mark.parametrize(("step", "minutes", "steps"), [(0.1, 15, 24), (1.0, 15, 18), (30.0, 60, 2), (30.0, 600, 24)])
def test_measuring_takes_a_small_share_of_the_budget(step: float, minutes: float, steps: int) -> None:
    assert steps_to_measure(step, minutes) == steps


def test_a_change_of_load_is_reported_once_and_so_is_its_end() -> None:
    watch = LoadWatch(planned=1.0, steps=1000)
    assert not any(watch.observe(step, 1.05) for step in range(0, 100, 10))
    assert not watch.observe(100, 9.0)  # a sample grid
    assert not any(watch.observe(step, 1.0) for step in range(110, 200, 10))
    lines = [line for step in range(200, 400, 10) if (line := watch.observe(step, 2.0))]
    assert lines == ["the load has changed: steps take 200% of the time that was planned; 26 min are left"]
    lines = [line for step in range(400, 600, 10) if (line := watch.observe(step, 1.0))]
    assert lines == ["steps take as long as planned again; 10 min are left"]
    wandering = (0.87, 0.87, 0.87, 1.1, 1.1, 1.1)  # a quarter apart, and as planned
    assert not any(watch.observe(600 + step, seconds) for step, seconds in enumerate(wandering * 2))


def test_a_change_in_the_last_half_minute_is_not_reported() -> None:
    watch = LoadWatch(planned=1.0, steps=1000)
    assert not any(watch.observe(step, 2.0) for step in range(986, 1000))


def test_only_a_plan_of_the_stages_steps_is_watched(config: Config, tmp_path: Path) -> None:
    plan = choose(config, 10, FIXED, needs())
    plan.write(tmp_path)
    assert LoadWatch.of(tmp_path, "stage2", plan.steps["stage2"])
    assert LoadWatch.of(tmp_path, "stage2", plan.steps["stage2"] + 1) is None
    (tmp_path / "plan.json").write_text("{")
    assert LoadWatch.of(tmp_path, "stage2", plan.steps["stage2"]) is None


def test_steps_that_the_warm_up_or_a_rule_forbids_are_refused(root: Path) -> None:
    config = loader.load(root / "configs/openmoji.yaml", ["stage2.lr_warmup_steps=1000"])
    with pytest.raises(UserError, match=r"--budget: 600 steps of stage2, and stage2.lr_warmup_steps is 1000"):
        Plan(15, {"stage1": 500, "stage2": 600}, {}, {}, "").apply(config)


def test_points_must_ascend(root: Path) -> None:
    with pytest.raises(UserError, match=r"budget.points: number 2 has 300 \+ 400 steps, the one before 300 \+ 400"):
        loader.load(
            root / "configs/tiny.yaml", ["budget.points=[{stage1: 300, stage2: 400}, {stage1: 300, stage2: 400}]"]
        )
