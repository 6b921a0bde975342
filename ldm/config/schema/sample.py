"""`sample`: solver, steps and guidance of the exported pipeline and of the sample grids."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field, PositiveInt

from ldm.config.schema.base import Section


class SampleConfig(Section):
    steps: PositiveInt = 50
    """Steps of the solver."""
    guidance: float = Field(default=7.5, ge=1)
    """Scale of classifier-free guidance; 1 is none."""
    solver: Literal["ddpm", "ddim", "euler", "euler_a", "heun", "dpm++", "dpm++sde", "unipc", "lcm"] = "dpm++"
    """Solver of the exported pipeline."""
    prompts: tuple[str, ...] = ()
    """Prompts of the sample grids."""
    every: PositiveInt = 1000
    """Training steps of stage two between sample grids."""


SPACINGS = ("leading", "trailing", "linspace", "karras", "exponential")
SOLVERS: tuple[str, ...] = get_args(SampleConfig.model_fields["solver"].annotation)
