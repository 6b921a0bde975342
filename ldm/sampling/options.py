"""Sampling options: what each call can choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.config.schema import SOLVERS, SPACINGS
from ldm.models.conditioning import MAX_NOISE_LEVEL
from ldm.models.text_encoder import NULL_PROMPT
from ldm.utils.errors import UserError, unknown_choice


@dataclass(frozen=True)
class Sampling:
    """The options of one call; None takes what the model was saved with. UserError for an invalid value."""

    num_inference_steps: int | None = None
    """Number of solver steps. None with `solver` ddpm: all steps of the chain."""
    guidance_scale: float | Sequence[float] | None = None
    """Guidance scale, one for all images or one per image; 1 is no guidance, at half the cost."""
    solver: str | None = None
    """`ddpm`, `ddim`, `euler`, `euler_a`, `heun`, `dpm++`, `dpm++sde`, `unipc` or `lcm`."""
    timestep_spacing: str | None = None
    """Timestep spacing: `leading`, `trailing`, `linspace`, `karras` or `exponential`."""
    eta: float = 0.0
    """Noise that ddim adds, 0 to 1; 1 is as much as ddpm."""
    negative_prompt: str | Sequence[str] = NULL_PROMPT
    """Negative prompt, one for all images or one per image."""
    guidance_rescale: float = 0.0
    """Guidance rescale, 0 to 1: how much of the contrast that guidance adds is removed."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guidance interval: the lowest and the highest share of noise that is guided."""
    threshold: float | None = None
    """Share of an image's values that dynamic thresholding leaves unchanged, such as 0.995; pixel space only."""
    strength: float | None = None
    """How far an image is changed: 0 returns the autoencoder's reconstruction, 1 ignores the image. None: 0.6, or 1 for
    an inpainting model, inside the mask."""
    noise_level: int = 20
    """Noise level added to an upscaler's input, 0 to 349: a higher level invents more detail."""
    weaker: Any = None
    """A worse U-Net, such as an earlier checkpoint, to guide away from (autoguidance)."""
    classifier: Any = None
    """A `ldm.models.classifier.NoisyClassifier` that guides images to the class of their label."""
    classifier_scale: float = 1.0
    """Scale of the classifier's guidance."""

    def __post_init__(self) -> None:
        for name, choices in (("solver", SOLVERS), ("timestep_spacing", SPACINGS)):
            value = getattr(self, name)
            if value is not None and value not in choices:
                raise unknown_choice(name, value, choices)
        if self.num_inference_steps is not None and self.num_inference_steps < 1:
            raise UserError(f"num_inference_steps: {self.num_inference_steps}; give 1 or more")
        scales = self.guidance_scale if isinstance(self.guidance_scale, Sequence) else [self.guidance_scale]
        if any(scale is not None and not (math.isfinite(scale) and scale >= 0) for scale in scales):
            raise UserError(f"guidance_scale: {self.guidance_scale}; give 0 or more, 1 for none")
        if not math.isfinite(self.classifier_scale):
            raise UserError(f"classifier_scale: {self.classifier_scale}; give a number")
        for name in ("eta", "guidance_rescale", "strength"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise UserError(f"{name}: {value}; give 0 to 1")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            interval = " to ".join(map(str, self.interval))
            raise UserError(f"interval: {interval}; give two shares of noise, 0 to 1, the lower one first")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"threshold: {self.threshold}; give more than 0, to 1")
        if not 0 <= self.noise_level < MAX_NOISE_LEVEL:
            raise UserError(f"noise_level: {self.noise_level}; give 0 to {MAX_NOISE_LEVEL - 1}")

    def of(self, part: slice) -> Sampling:
        """The same for a part of the images."""
        sliced: dict[str, Any] = {}
        if isinstance(self.guidance_scale, Sequence):
            sliced["guidance_scale"] = self.guidance_scale[part]
        if not isinstance(self.negative_prompt, str):
            sliced["negative_prompt"] = self.negative_prompt[part]
        return replace(self, **sliced)
