"""`run`: the run's folder, seed, precision and bookkeeping."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt

from ldm.config.schema.base import LocalPath, Section


class RunConfig(Section):
    dir: LocalPath = Path("runs/default")
    """The run's folder; running again with the same folder continues."""
    seed: int = Field(default=0, ge=0)
    """Everything random follows from it."""
    precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    """Mixed precision of training; `auto` is bf16 where the device computes it natively, else none."""
    device: Literal["auto", "cpu"] = "auto"
    """`auto` takes the GPU where there is one."""
    preflight: bool = True
    """Measures two steps and a validation first, to estimate the run's memory, time and disk."""
    checkpoints_total_limit: PositiveInt = 2
    """Checkpoints kept per stage."""
    log_every: PositiveInt = 20
    """Steps between two lines of metrics."""
    max_skipped: PositiveInt = 10
    """Steps in a row that may be skipped because a loss or gradient is not finite; then the run stops."""
    tracker: str = "tensorboard"
    """Name of a tracker of accelerate, or `none`."""
