"""How many pictures stage two draws and measures, and how many of them together.

The stage does so, the preflight measures it, and the memory estimate counts it.
"""

from __future__ import annotations

from ldm.config.schema import Config

VALIDATION_BATCH = 32  # pictures measured together, where a device computes as many at once
SHEET_BATCH = 8  # pictures of a sheet drawn together, where a device computes as many at once
SHEET_GIVEN = 8  # pictures of a sheet that are given, to be completed or enlarged, at most
SHEET_CLASSES = 64  # classes that a sheet shows, at most
SHEET_UNCONDITIONAL = 16  # pictures of a sheet where nothing is asked for


def sheet_of_prompts(config: Config) -> bool:
    """Whether a sheet shows `sample.prompts`."""
    return config.stage2.text and not config.stage2.image


def sheet_pictures(config: Config, classes: int = SHEET_CLASSES) -> int:
    """Pictures of a sheet, at most: of so many classes."""
    if config.stage2.image:
        return SHEET_GIVEN
    if config.stage2.text:
        return len(config.sample.prompts)
    return min(classes, SHEET_CLASSES) if config.stage2.classes else SHEET_UNCONDITIONAL
