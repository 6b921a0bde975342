"""How pictures are drawn: what can be chosen in each call."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from ldm.config.schema import SOLVERS, SPACINGS
from ldm.models.conditioning import NOISIEST
from ldm.models.text_encoder import NULL_PROMPT
from ldm.utils.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """None stands for what the model was saved with. UserError where a value is none that there is."""

    steps: int | None = None
    """Of the solver; all of the chain's, where `solver` is ddpm and nothing is said."""
    guidance: float | Sequence[float] | None = None
    """Scale of guidance, one for all or one a picture; 1 is none, and half the work."""
    solver: str | None = None
    """`ddpm`, `ddim`, `euler`, `euler_a`, `heun`, `dpm++`, `dpm++sde`, `unipc` or `lcm`."""
    spacing: str | None = None
    """Of the steps: `leading`, `trailing`, `linspace`, `karras` or `exponential`."""
    eta: float = 0.0
    """ddim's noise, 0 to 1; 1 is as much as ddpm's."""
    negative: str | Sequence[str] = NULL_PROMPT
    """What the pictures shall not show, one for all or one a picture."""
    rescale: float = 0.0
    """Share, 0 to 1, by which the contrast that guidance adds is taken back."""
    interval: tuple[float, float] = (0.0, 1.0)
    """The part of the process that is guided: from and to which share of noise."""
    threshold: float | None = None
    """Share of a picture's values that dynamic thresholding leaves as they are, 0.995 for one; in pixel space."""
    strength: float | None = None
    """How far an image is changed: 0 gives it back as the autoencoder rebuilds it, 1 takes no notice of it. By default
    0.6, and for an inpainting model, in the hole, 1."""
    noise_level: int = 20
    """Noise on the small picture that is enlarged, 0 to 349: more invents more."""
    weaker: Any = None
    """A U-Net that is worse, from an earlier checkpoint for one, to be guided away from (autoguidance)."""
    classifier: Any = None
    """A `ldm.models.classifier.NoisyClassifier` that pulls pictures to the class of their label."""
    classifier_scale: float = 1.0
    """How hard it pulls."""

    def __post_init__(self) -> None:
        for name, known in (("solver", SOLVERS), ("spacing", SPACINGS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise UserError(f"{name}: {value!r}; give {', '.join(known[:-1])} or {known[-1]}")
        if self.steps is not None and self.steps < 1:
            raise UserError(f"steps: {self.steps}; give 1 or more")
        scales = self.guidance if isinstance(self.guidance, Sequence) else [self.guidance]
        if any(scale is not None and not (math.isfinite(scale) and scale >= 0) for scale in scales):
            raise UserError(f"guidance: {self.guidance}; give 0 or more, 1 for none")
        if not math.isfinite(self.classifier_scale):
            raise UserError(f"classifier_scale: {self.classifier_scale}; give a number")
        for name in ("eta", "rescale", "strength"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= 1:
                raise UserError(f"{name}: {value}; give 0 to 1")
        if len(self.interval) != 2 or not 0 <= self.interval[0] <= self.interval[1] <= 1:
            shown = " to ".join(map(str, self.interval))
            raise UserError(f"interval: {shown}; give two shares of noise, 0 to 1, the lower one first")
        if self.threshold is not None and not 0 < self.threshold <= 1:
            raise UserError(f"threshold: {self.threshold}; give more than 0, to 1")
        if not 0 <= self.noise_level < NOISIEST:
            raise UserError(f"noise_level: {self.noise_level}; give 0 to {NOISIEST - 1}")

    def of(self, part: slice) -> Sampling:
        """The same for a part of the pictures."""
        some: dict[str, Any] = {}
        if isinstance(self.guidance, Sequence):
            some["guidance"] = self.guidance[part]
        if not isinstance(self.negative, str):
            some["negative"] = self.negative[part]
        return replace(self, **some)
