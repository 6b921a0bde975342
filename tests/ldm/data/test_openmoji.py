"""The built-in OpenMoji images."""

from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from ldm.data import openmoji


def test_the_demo_has_800_to_1000_images_and_53_held_out_combinations() -> None:
    drawings = openmoji.drawings("openmoji-demo")
    assert 800 <= len(drawings) <= 1000
    held_out = [d for d in drawings if d.split == "combination"]
    assert sum(bool(d.role) for d in held_out) == 50
    assert sorted(d.captions[0] for d in held_out if not d.role) == sorted(openmoji.HELD_OUT_SHAPES)


def test_every_part_of_a_held_out_combination_is_in_training() -> None:
    drawings = openmoji.drawings("openmoji-demo")
    train = [d for d in drawings if d.split == "train"]
    roles, tones = Counter(d.role for d in train), Counter(d.tone for d in train)
    words = Counter(word for d in train for word in d.captions[0].split())
    for held_out in (d for d in drawings if d.split == "combination"):
        if held_out.role:
            assert roles[held_out.role] >= 4
            assert tones[held_out.tone] >= 50
        else:
            assert all(words[word] >= 2 for word in held_out.captions[0].split())


def test_the_demo_has_none_of_the_six_thumbs_to_fine_tune_on() -> None:
    demo, thumbs = ({d.code for d in openmoji.drawings(name)} for name in ("openmoji-demo", "openmoji-thumbs"))
    assert len(thumbs) == 6 and not demo & thumbs


def test_both_subsets_hold_out_the_same_combinations() -> None:
    small, everything = (
        {d.captions[0] for d in openmoji.drawings(name) if d.split == "combination"}
        for name in ("openmoji-demo", "openmoji-all")
    )
    assert small == everything


@pytest.fixture(scope="module")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the demo's drawings at 64 px."""
    folder = tmp_path_factory.mktemp("rendered")
    openmoji.draw("openmoji-demo", 64, folder)
    return folder


@pytest.mark.parametrize("subset", ["openmoji-demo", pytest.param("openmoji-all", marks=pytest.mark.drill)])
def test_no_training_image_equals_a_held_out_one(subset: str, rendered: Path) -> None:
    splits_by_image: dict[bytes, set[str]] = {}
    for drawing, path in openmoji.draw(subset, 64, rendered):
        splits_by_image.setdefault(Image.open(path).tobytes(), set()).add(drawing.split)
    assert all(len(splits) == 1 for splits in splits_by_image.values())
    if subset == "openmoji-demo":  # all images of the demo differ
        assert len(splits_by_image) == len(openmoji.drawings(subset))


def test_captions_are_tidy_and_unique_in_the_demo() -> None:
    drawings = openmoji.drawings("openmoji-all")
    captions = {d.captions[0] for d in drawings}
    assert {"woman firefighter, medium-dark skin tone", "flag of Japan", "red apple", "man with red hair"} <= captions
    assert not any("_" in caption or ":" in caption for d in drawings for caption in d.captions)
    demo = openmoji.drawings("openmoji-demo")
    assert len({d.captions[0] for d in demo}) == len(demo)


def test_images_are_rendered_once_and_on_white(rendered: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in rendered.iterdir()}
    paths = [path for _, path in openmoji.draw("openmoji-demo", 64, rendered)]
    assert {path: path.stat().st_mtime_ns for path in rendered.iterdir()} == before
    assert Image.open(paths[0]).convert("RGB").getpixel((0, 0)) == (255, 255, 255)
