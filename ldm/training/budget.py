"""`--budget`: steps of both stages that fill so many minutes on this machine, planned once and kept with the run.

`RUN/plan.json` has the steps, the seconds that they were measured to take, and what to expect. The steps of stage two
are adjusted before it, to the time that stage one took, and half way to its end, again and again, to the time that its
own take; not in a run that was stopped before. A run that continues reads them, so that nothing depends on a second
measurement.
"""

from __future__ import annotations

import json
import math
import time
from bisect import bisect_right
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

import psutil

from ldm.config.loader import dump, parse
from ldm.config.schema import BudgetPoint, Config, Stage1Config
from ldm.training.evaluation_sizes import sheet_images
from ldm.training.preflight import STEPS
from ldm.training.resource_estimate import ResourceEstimate, format_time
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

_BEFORE_IMPORT, _IMPORTED = time.time() - psutil.Process().create_time(), time.monotonic()

FILE = "plan.json"
MEASURED_STEPS = 24  # a process's first steps are faster than later ones
MEASURED_SHARE = 0.02  # of the budget, at most, for these
LEAST = 0.1  # of the steps of a configuration without points
TOLERANCE = 0.15  # share by which steps may be slower or faster before it is reported
LATE = 30.0  # seconds before the end in which a change is no longer worth a line
WINDOWS = 3  # times of steps whose median counts: a single one may hold a validation or a sample grid
REST = 0.02  # of the budget, for checkpoints, exports and the report
ADJUSTED = 0.02  # share of the steps by which an adjustment must change them
WORTH_A_PAUSE, LAST_PAUSE = 120.0, 0.1  # seconds of stage two, and share of the budget, to plan them anew half way


class Paused(Exception):  # noqa: N818 it is no error
    """Raised after the checkpoint of a stage that pauses there."""


@dataclass(frozen=True)
class Plan:
    """What a budget is spent on."""

    minutes: float
    steps: Mapping[str, int]
    """Of each stage that is trained."""
    seconds_per_step: Mapping[str, float]
    """As measured."""
    seconds: Mapping[str, float]
    """Of each part, as expected."""
    figures: str
    """What a model of these steps, or of the nearest fewer ones, was measured to be."""
    threads: int = 0
    """Of the process on a CPU, as measured; 0: as configured."""
    done: int = 0
    """Steps of stage two, before the ones that were planned last."""

    @property
    def pause(self) -> int:
        """The step of stage two, half way to its end, after which the others are planned anew; 0 near the end."""
        left = self.steps.get("stage2", 0) - self.done
        worth = max(WORTH_A_PAUSE, LAST_PAUSE * 60 * self.minutes)
        return self.done + left // 2 if left * self.seconds_per_step.get("stage2", 0.0) >= worth else 0

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {format_time(seconds)}" for name, seconds in self.seconds.items())
        steps = " + ".join(f"{steps:,}" for steps in self.steps.values())
        total = format_time(sum(self.seconds.values()))
        return f"plan     {steps} steps, {total} of {self.minutes:g} minutes: {parts}" + (
            f"\nexpected {self.figures}" if self.figures else ""
        )

    def apply(self, config: Config) -> Config:
        """The configuration with the planned steps; UserError where its rules or its warm-up ask for more."""
        tree = dump(config)
        for name, steps in self.steps.items():
            tree[name]["steps"] = steps
            if steps <= (warmup := tree[name]["lr_warmup_steps"]):
                raise UserError(
                    f"--budget: {steps} steps of {name}, and {name}.lr_warmup_steps is {warmup}; give more minutes, or "
                    "shorten the warm-up"
                )
        return parse(tree, "--budget")

    def write(self, folder: Path) -> None:
        with atomic_file(folder / FILE) as tmp_path:
            tmp_path.write_text(json.dumps(asdict(self), indent=1) + "\n", "utf-8")

    @classmethod
    def read(cls, folder: Path) -> Plan | None:
        """None where the run has no plan; UserError where its file is damaged."""
        file = folder / FILE
        if not file.exists():
            return None
        try:
            return cls(**json.loads(file.read_text("utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"--budget: {file} is damaged ({error}); remove it, or give another run.dir") from None


def choose(
    config: Config,
    minutes: float,
    fixed: Mapping[str, float],
    needs: Mapping[str, ResourceEstimate],
    threads: int = 0,
) -> Plan:
    """The plan with the most steps that ends within `minutes`, with so many threads.

    `fixed` are the seconds of what comes before and after training; `needs` those of the stages to train. Steps lie on
    the line through the points of `budget`, the origin before them; after the last point both grow in its ratio.
    UserError where the time isn't enough for the first point, or without points for a tenth of the steps.
    """
    points = config.budget.points or (BudgetPoint(stage1=config.stage1.steps, stage2=config.stage2.steps),)

    def plan(progress: float) -> Plan:
        steps = {name: max(1, round(_interpolated(progress, [getattr(p, name) for p in points]))) for name in needs}
        # not `apply`: a plan that is only tried need not obey the rules
        changed = {name: getattr(config, name).model_copy(update={"steps": n}) for name, n in steps.items()}
        planned = config.model_copy(update=changed)
        seconds = {name: need.seconds_left(planned, name) for name, need in needs.items()}
        before, *after = fixed.items()
        figures = _figures(points, steps) if len(steps) == 2 else ""  # of both stages
        per_step = {name: need.step for name, need in needs.items()}
        return Plan(minutes, steps, per_step, dict([before, *seconds.items(), *after]), figures, threads)

    def too_long(progress: float) -> bool:
        return sum(plan(progress).seconds.values()) > 60 * minutes

    low, high = (1.0, 2.0) if config.budget.points else (LEAST, 1.0)
    if too_long(low):
        least = sum(plan(low).seconds.values()) / 60
        least = math.ceil(10 * least) / 10  # not rounded down to what was too few
        raise UserError(f"--budget: {minutes:g} minutes; here it takes {least:.1f} at least, give that or more")
    while not too_long(high):
        low, high = high, 2 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if too_long(middle) else (middle, high)
    return plan(low)


def measured_step(metrics: Path, batch: int, done: int = 0) -> float | None:
    """The seconds that a step of `batch` images took, by the metrics of a stage after `done` steps; None without any.

    The median counts: some times hold a validation or a checkpoint.
    """
    lines = map(json.loads, metrics.read_text("utf-8").splitlines()) if metrics.exists() else ()
    times = [batch / speed for line in lines if line["step"] > done and (speed := line.get("images_per_second"))]
    return median(times) if times else None


def measured_ratio(plan: Plan, metrics: Path, stage: Stage1Config) -> float:
    """How long stage one's steps took, as its metrics have it, of the time that was planned.

    1 with a discriminator, which the preflight measures and the first steps don't have.
    """
    step = None if stage.gan else measured_step(metrics, stage.batch)
    return step / plan.seconds_per_step["stage1"] if step else 1.0


def adjusted(
    plan: Plan,
    config: Config,
    need: ResourceEstimate,
    begun: float,
    elapsed: float,
    ratio: float = 1.0,
    done: int = 0,
) -> Plan:
    """The plan with so many steps of stage two that it ends in time, where stage one took from `begun` to `elapsed`.

    Both are seconds since the program's start. What is to come is expected to take `ratio` times what was planned, as
    stage one's steps did; `need` is what stage two was measured to need. It has no fewer steps than the first point of
    `budget`, without points a tenth of the plan's, and more than its warm-up. In stage two, with `done` steps of it,
    `begun` is when it began, and one more step is the least.
    """
    slower = ratio * need.step / plan.seconds_per_step["stage2"]  # than what the plan has
    after = {name: slower * plan.seconds[name] for name in ("saving", "evaluation") if name in plan.seconds}
    left = 60 * plan.minutes - elapsed - sum(after.values())

    def seconds(steps: int) -> float:
        stage2 = config.stage2.model_copy(update={"steps": steps})
        return ratio * need.seconds_left(config.model_copy(update={"stage2": stage2}), "stage2", done)

    planned, points = plan.steps["stage2"], config.budget.points
    least = points[0].stage2 if points else round(LEAST * planned)
    least = max(done + 1 if done else least, config.stage2.lr_warmup_steps + 1)
    least = least if done else min(planned, least)
    most = max(least, done + round(left / (ratio * need.step)))
    steps = max(least, done + bisect_right(range(done, most + 1), left, key=seconds) - 1)
    if abs(steps - planned) <= ADJUSTED * (planned - done):
        return replace(plan, done=done) if done else plan
    past = (
        {"stage2": elapsed - begun + seconds(steps)} if done else {"start and plan": begun, "stage1": elapsed - begun}
    )
    return replace(
        plan,
        steps={**plan.steps, "stage2": steps},
        seconds_per_step={**plan.seconds_per_step, "stage2": ratio * need.step},
        seconds={**plan.seconds, "stage2": seconds(steps), **past, **after},
        figures=_figures(points, {**plan.steps, "stage2": steps}),
        done=done,
    )


def _interpolated(progress: float, steps: Sequence[int]) -> float:
    """Steps at a real number of points: 1 is the first one; past the last one, in proportion to its."""
    last = len(steps)
    if progress >= last:
        return steps[-1] * progress / last
    known = [0, *steps]
    number = int(progress)
    return known[number] + (progress - number) * (known[number + 1] - known[number])


def _figures(points: Sequence[BudgetPoint], steps: Mapping[str, int]) -> str:
    """Those of the last point that has no more steps than planned, with the next one's where that is not reached."""
    reached = [point for point in points if all(getattr(point, name) <= steps[name] for name in steps)]
    beyond = [point for point in points if point not in reached]
    least, most = (
        "".join(f"{p.figures} ({p.stage1:,} + {p.stage2:,} steps)" for p in around if p.figures)
        for around in (reached[-1:], beyond[:1])
    )
    return f"{least} to {most}" if least and most else least or (most and f"less than {most}")


def planned_threads(folder: Path) -> int:
    """Those of a run's plan; 0 without one."""
    plan = _readable(folder)
    return plan.threads if plan else 0


def _readable(folder: Path) -> Plan | None:
    try:
        return Plan.read(folder)
    except UserError:  # `--budget` reports it
        return None


class LoadWatch:
    """Says when steps take longer or shorter than planned, once for each change."""

    def __init__(self, planned: float, steps: int):
        self.planned, self.steps = planned, steps
        self._reported = planned
        self._last: deque[float] = deque(maxlen=WINDOWS)

    @classmethod
    def of(cls, folder: Path, stage: str, steps: int) -> LoadWatch | None:
        """Of a stage of a run; None where it has no plan of so many steps."""
        plan = _readable(folder)
        return cls(plan.seconds_per_step[stage], steps) if plan and plan.steps.get(stage) == steps else None

    def observe(self, step: int, seconds: float) -> str:
        """After `step` steps, of which the last ones took `seconds` each: a line, or nothing."""
        self._last.append(seconds)
        now, reported = median(self._last), self._reported
        left = (self.steps - step) * now
        if len(self._last) < WINDOWS or left < LATE or abs(now / reported - 1) <= TOLERANCE:
            return ""
        if max(abs(step_time / self.planned - 1) for step_time in (now, reported)) <= TOLERANCE:
            return ""  # neither has left the plan
        self._reported = now
        ratio = now / self.planned
        if abs(ratio - 1) <= TOLERANCE:
            return f"steps take as long as planned again; {format_time(left)} are left"
        return (
            f"the load has changed: steps take {ratio:.0%} of the time that was planned; {format_time(left)} are left"
        )


def steps_to_measure(step: float, minutes: float) -> int:
    """So many that they take a small share of the budget, where one takes `step` seconds; the preflight's at least."""
    return max(STEPS, min(MEASURED_STEPS, int(MEASURED_SHARE * 60 * minutes / step)))


def seconds_since_start() -> float:
    """Since this process began, its imports included; by a clock that doesn't jump."""
    return _BEFORE_IMPORT + time.monotonic() - _IMPORTED


def fixed_seconds(
    config: Config, minutes: float, begun: float, start_up: float, stage2: ResourceEstimate | None, processes: int = 1
) -> dict[str, float]:
    """Seconds of all but the stages: those since the program began, of an evaluation afterwards, and a share for more.

    An evaluation starts anew, in `start_up` seconds, and draws the images of `budget` in a single process, as sample
    grids are drawn by all.
    """
    parts = {"start and plan": begun, "saving": REST * 60 * minutes}
    if stage2 and (images := config.budget.images):
        parts["evaluation"] = start_up + images * processes * stage2.sheet / max(1, sheet_images(config))
    return parts
