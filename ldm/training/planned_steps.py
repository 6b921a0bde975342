"""A run's steps under `--budget`: measured and planned before stage one, adjusted before stage two and within it."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import PartialState

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.data.stream import Stream
from ldm.distributed.launch import on_main
from ldm.distributed.sharding import SHARDED
from ldm.training import budget, preflight
from ldm.training.checkpoint import steps_done
from ldm.training.run_dir import make_dir
from ldm.utils.cpu_load import limit_threads
from ldm.utils.errors import UserError
from ldm.utils.folder_lock import lock


def plan_steps(
    config: Config,
    minutes: float,
    stages: Sequence[str],
    load_data: Callable[[], Index | Stream],
    measure: Callable[..., str],
) -> Config:
    """The configuration with the steps that end within `minutes`: as the run's plan has them, which is made once.

    `stages` are the unfinished ones; `measure(stage, data, steps, anew)` trains one for some steps and keeps what they
    needed. Every process calls it. UserError where the run has begun without a plan or with another one, and where the
    minutes are too few.
    """
    state, folder = PartialState(), config.run.dir
    single = state.num_processes == 1 and state.device.type == "cpu"
    plan = on_main(lambda: budget.Plan.read(folder))
    if plan and plan.minutes != minutes:
        raise UserError(f"--budget: {folder} was planned for {plan.minutes:g} minutes; give that, or another run.dir")
    if not plan:
        if on_main((folder / "config.yaml").exists):
            raise UserError(f"--budget: {folder} has begun without a plan; leave it out, or give another run.dir")
        if "stage2" not in stages:
            raise UserError(f"--budget: {folder} has a finished model; give another run.dir")
        start_up = budget.seconds_since_start()
        on_main(lambda: make_dir("run.dir", folder))
        on_main(lambda: lock("run.dir", folder))
        on_main(lambda: (folder / preflight.FILE).unlink(missing_ok=True))  # of another time, with another load
        threads = limit_threads() if single else 0
        data = load_data()
        for stage in stages:
            report = measure(stage, data)
            if not (need := on_main(partial(preflight.measured, config, stage))):
                raise UserError(f"--budget: {report}; set the steps of both stages yourself")
            if (steps := budget.steps_to_measure(need.step, minutes)) > preflight.STEPS:
                measure(stage, data, steps, anew=True)

        def choose() -> budget.Plan:
            needs = {stage: need for stage in stages if (need := preflight.measured(config, stage))}
            begun = budget.seconds_since_start()
            fixed = budget.fixed_seconds(config, minutes, begun, start_up, needs.get("stage2"), state.num_processes)
            chosen = budget.choose(config, minutes, fixed, needs, threads)
            chosen.apply(config)  # whose mistakes come before it is kept
            chosen.write(folder)
            return chosen

        plan = on_main(choose)
    if plan.threads and single:
        torch.set_num_threads(min(plan.threads, torch.get_num_threads()))
    if state.is_main_process:
        print(plan, flush=True)
    return plan.apply(config)


def adjust_steps(config: Config, begun: float) -> Config:
    """The configuration with the steps of stage two that fill what stage one has left of the budget.

    It has `begun` so many seconds after the program. Where its steps were slower than measured, stage two's are
    expected to be. Every process calls it.
    """
    folder = config.run.dir

    def adjust() -> budget.Plan | None:
        plan, need = budget.Plan.read(folder), preflight.measured(config, "stage2")
        if not (plan and need):  # measured with other steps, where these change what a step needs
            return plan
        ratio = budget.measured_ratio(plan, folder / "stage1" / "metrics.jsonl", config.stage1)
        slower = max(1.0, ratio)  # a higher speed isn't counted on: two runs that did ended 6 and 15 % late
        changed = budget.adjusted(plan, config, need, begun, budget.seconds_since_start(), slower)
        try:
            changed.apply(config)
        except UserError:  # a rule that holds for the planned steps
            return plan
        if changed != plan:
            changed.write(folder)
            print(f"stage 1  steps took {ratio:.0%} of the time that was planned\n{changed}", flush=True)
        return changed

    plan = on_main(adjust)
    return plan.apply(config) if plan else config


def pause_after(config: Config) -> int:
    """The step of stage two after which it should pause, so that the others are planned anew; 0 for none.

    There is none where a second start would cost much or change something: of a sharded or compiled network, of a text
    encoder in training, in a tracker that makes a run of each start.
    """
    sharded = PartialState().distributed_type in SHARDED
    if (
        config.trains_text_encoder
        or sharded
        or config.stage2.compile
        or config.run.tracker not in ("none", "tensorboard")
    ):
        return 0

    def pause() -> int:
        plan = budget.Plan.read(config.run.dir)
        return plan.pause if plan and preflight.measured(config, "stage2") else 0

    return on_main(pause)


def adjust_rest(config: Config, begun: float) -> Config:
    """The configuration with the steps that fill what is left of the budget, where stage two was paused.

    It has `begun` so many seconds after the program. Its steps are expected to take as long as they did since the last
    pause. Every process calls it.
    """
    gc.collect()  # the paused training, whose parts refer to each other
    if PartialState().device.type == "cuda":
        torch.cuda.empty_cache()
    folder = config.run.dir

    def adjust() -> budget.Plan:
        plan, need = budget.Plan.read(folder), preflight.measured(config, "stage2")
        assert plan and need, "`pause_after` pauses no other stage"
        done, changed = steps_done(folder / "stage2"), plan
        step = budget.measured_step(folder / "stage2" / "metrics.jsonl", config.stage2.batch, plan.done)
        if step:
            ratio = step / need.step
            changed = budget.adjusted(plan, config, need, begun, budget.seconds_since_start(), ratio, done)
        try:
            changed.apply(config)
        except UserError:  # a rule that holds for the planned steps
            changed = plan
        changed = replace(changed, done=done)
        changed.write(folder)
        if changed.steps != plan.steps:
            print(f"stage 2  after {done:,} steps, of {step:.2f} s\n{changed}", flush=True)
        return changed

    return on_main(adjust).apply(config)
