"""How many images stage two samples for a grid and validates on, and how many at once.

Shared by the stage, its preflight and the memory estimate.
"""

from __future__ import annotations

from ldm.config.schema import Config

VALIDATION_BATCH = 32  # images, at most, validated at once
SHEET_BATCH = 8  # images, at most, of a sheet sampled at once
SHEET_INPUTS = 8  # input images of a sheet, to be inpainted or upscaled, at most
SHEET_CLASSES = 64  # classes that a sheet shows, at most
SHEET_UNCONDITIONAL = 16  # images of a sheet of an unconditional model


def sheet_of_prompts(config: Config) -> bool:
    """Whether a sheet shows `sample.prompts`."""
    return config.stage2.text and not config.stage2.image


def sheet_images(config: Config, classes: int = SHEET_CLASSES) -> int:
    """Images of a sheet, at most."""
    if config.stage2.image:
        return SHEET_INPUTS
    if config.stage2.text:
        return len(config.sample.prompts)
    return min(classes, SHEET_CLASSES) if config.stage2.classes else SHEET_UNCONDITIONAL
