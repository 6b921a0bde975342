"""The embedded pictures."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ldm.data import openmoji


def test_the_demo_holds_800_to_1000_pictures_and_fifty_three_combinations() -> None:
    drawings = openmoji.drawings("openmoji-demo")
    assert 800 <= len(drawings) <= 1000
    held = [d for d in drawings if d.split == "combination"]
    assert sum(bool(d.role) for d in held) == 50
    assert sorted(d.captions[0] for d in held if not d.role) == sorted(openmoji.HELD_OUT_SHAPES)


def test_every_part_of_a_held_out_combination_is_seen_in_training() -> None:
    drawings = openmoji.drawings("openmoji-demo")
    train = [d for d in drawings if d.split == "train"]
    roles, tones = Counter(d.role for d in train), Counter(d.tone for d in train)
    words = Counter(word for d in train for word in d.captions[0].split())
    for held in (d for d in drawings if d.split == "combination"):
        if held.role:
            assert roles[held.role] >= 4
            assert tones[held.tone] >= 50
        else:
            assert all(words[word] >= 2 for word in held.captions[0].split())


def test_both_subsets_hold_back_the_same_combinations() -> None:
    small, everything = (
        {d.captions[0] for d in openmoji.drawings(name) if d.split == "combination"} for name in openmoji.SUBSETS
    )
    assert small == everything


@pytest.mark.parametrize("subset", openmoji.SUBSETS)
def test_no_training_picture_is_the_twin_of_a_held_out_one(subset: str, tmp_path: Path) -> None:
    drawn: dict[bytes, set[str]] = {}
    for drawing, path in openmoji.draw(subset, 64, tmp_path):
        drawn.setdefault(Image.open(path).tobytes(), set()).add(drawing.split)
    assert all(len(splits) == 1 for splits in drawn.values())
    if subset == "openmoji-demo":  # here no two pictures are alike at all
        assert len(drawn) == len(openmoji.drawings(subset))


def test_captions_are_tidy_and_tell_pictures_apart() -> None:
    drawings = openmoji.drawings("openmoji-all")
    captions = {d.captions[0] for d in drawings}
    assert {"woman firefighter, medium-dark skin tone", "flag of Japan", "red apple", "man with red hair"} <= captions
    assert not any("_" in caption or ":" in caption for d in drawings for caption in d.captions)
    demo = openmoji.drawings("openmoji-demo")
    assert len({d.captions[0] for d in demo}) == len(demo)


def test_pictures_are_drawn_once_and_on_white(tmp_path: Path) -> None:
    paths = [path for _, path in openmoji.draw("openmoji-demo", 16, tmp_path)]
    before = [path.stat().st_mtime_ns for path in paths]
    assert [path.stat().st_mtime_ns for _, path in openmoji.draw("openmoji-demo", 16, tmp_path)] == before
    assert Image.open(paths[0]).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
