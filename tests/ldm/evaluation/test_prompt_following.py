"""The prompt-following figure."""

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


def test_the_real_pictures_themselves_follow_perfectly() -> None:
    found = nearest_neighbors(pixel_features(REAL), pixel_features(REAL))
    assert set(prompt_following(found, range(10), people()).values()) == {1.0}
    shuffled = prompt_following(found, [*range(5, 10), *range(5)], people())
    assert (shuffled["top1"], shuffled["role"]) == (0, 0)


def test_a_neighbouring_tone_is_near_and_another_role_is_wrong() -> None:
    found = torch.tensor([[1, 0], [6, 2]])  # a cook one tone off, then the right one; judge and cook for a cook
    assert prompt_following(found, [0, 0], people()) == {
        "top1": 0.0,
        "top5": 0.5,
        "role": 0.5,
        "role+tone": 0.0,
        "role+tone near": 0.5,
    }


def test_features_do_not_depend_on_the_resolution() -> None:
    large = torch.nn.functional.interpolate(REAL, scale_factor=2)
    torch.testing.assert_close(pixel_features(large), pixel_features(REAL))
