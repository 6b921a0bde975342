"""The prompt-following figure."""

from pathlib import Path

import torch

from ldm.data.openmoji import TONES
from ldm.data.sources import Record
from ldm.metrics.following import by_pixels, following


def people() -> list[Record]:
    return [
        Record(f"{role}-{tone}", Path(), (f"{role}, {tone}",), attributes={"role": role, "tone": tone})
        for role in ("cook", "judge")
        for tone in TONES
    ]


REAL = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def test_the_real_pictures_themselves_follow_perfectly() -> None:
    scores = following(REAL, range(10), people(), REAL, by_pixels)
    assert all(scores[key] == 1 for key in ("top1", "top5", "role", "tone", "role_tone_near"))
    assert scores["shuffled"] == 0


def test_a_neighbouring_tone_is_near_and_another_role_is_wrong() -> None:
    scores = following(REAL[[1, 6]], [0, 0], people(), REAL, by_pixels)  # cook one tone off; judge one tone off
    assert scores["top1"] == 0
    assert scores["role"] == 0.5
    assert scores["role_tone_near"] == 0.5
    assert scores["tone"] == 0


def test_features_do_not_depend_on_the_resolution() -> None:
    large = torch.nn.functional.interpolate(REAL, scale_factor=2)
    torch.testing.assert_close(by_pixels(large), by_pixels(REAL))
