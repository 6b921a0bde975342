"""The diffusion process that a run's configuration describes."""

from __future__ import annotations

from ldm.config.schema import Stage2Config
from ldm.diffusion.process import CLOSED_FORM_TIMES, DiffusionProcess


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
