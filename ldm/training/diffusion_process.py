"""The diffusion process that a run's configuration describes, and the schedule that a run has learned."""

from __future__ import annotations

from pathlib import Path

from ldm.config.schema import Stage2Config
from ldm.diffusion.process import CLOSED_FORM_TIMES, DiffusionProcess
from ldm.diffusion.schedules import LearnedSchedule
from ldm.training.checkpoint import read_checkpoint, read_last
from ldm.utils.errors import UserError


def diffusion_process(stage: Stage2Config) -> DiffusionProcess:
    """The process of `stage`. A learned schedule is log_linear here: it differs in training alone."""
    return DiffusionProcess(
        prediction_type=stage.prediction_type,
        beta_schedule="log_linear" if stage.beta_schedule == "learned" else stage.beta_schedule,
        logit_mean=stage.logit_mean,
        logit_std=stage.logit_std,
        timesteps=stage.timesteps,
        zero_snr=stage.zero_snr,
        shift=stage.shift,
        timestep_sampling=stage.timestep_sampling if stage.timestep_sampling in CLOSED_FORM_TIMES else None,
    )


def learned_schedule(run: Path) -> LearnedSchedule:
    """The schedule that a run has learned, from its last checkpoint; UserError where that is gone or damaged."""
    if not (content := read_last(run / "stage2", read_checkpoint)):
        raise UserError(f"{run}: its checkpoints are gone, and with them the schedule that it learned")
    parts, _ = content
    prefix = "schedule."
    weights = {k.removeprefix(prefix): v for k, v in parts["model"].items() if k.startswith(prefix)}
    if not weights:
        raise UserError(f"{run}: its schedule is not a learned one; give a run with stage2.beta_schedule=learned")
    schedule = LearnedSchedule()
    schedule.load_state_dict(weights)
    return schedule
