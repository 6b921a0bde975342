"""Prompt following: do a generated image's nearest real images match its prompt?"""

import torch

from ldm.data.openmoji import TONES
from ldm.data.records import ImageLocation, Record
from ldm.evaluation.prompt_following import nearest_neighbors, pixel_features, prompt_following


def people() -> list[Record]:
    return [
        Record(f"{role}-{tone}", ImageLocation(""), (f"{role}, {tone}",), attributes={"role": role, "tone": tone})
        for role in ("cook", "judge")
        for tone in TONES
    ]


REAL = torch.randn(10, 3, 32, 32, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def test_real_images_score_1_and_shuffled_ones_0() -> None:
    neighbors = nearest_neighbors(pixel_features(REAL), pixel_features(REAL))
    assert set(prompt_following(neighbors, range(10), people()).values()) == {1.0}
    shuffled = prompt_following(neighbors, [*range(5, 10), *range(5)], people())
    assert (shuffled["top1"], shuffled["role"]) == (0, 0)


def test_a_neighboring_tone_counts_as_near_and_another_role_as_wrong() -> None:
    # for a cook: a cook one tone off, then the right cook; a judge, then a cook
    neighbors = torch.tensor([[1, 0], [6, 2]])
    assert prompt_following(neighbors, [0, 0], people()) == {
        "top1": 0.0,
        "top5": 0.5,
        "role": 0.5,
        "role+tone": 0.0,
        "role+tone near": 0.5,
    }


def test_features_do_not_depend_on_the_resolution() -> None:
    large = torch.nn.functional.interpolate(REAL, scale_factor=2)
    torch.testing.assert_close(pixel_features(large), pixel_features(REAL))
