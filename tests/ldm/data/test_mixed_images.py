"""Images of every format, mode, orientation and layout: each is used as it looks, or named."""

from pathlib import Path

import numpy as np
import pytest
from mixed_images import mixed_images, read_all, thumbnail

from ldm.data import openmoji, records
from ldm.data.formats import FORMATS


@pytest.mark.parametrize("count", [180, pytest.param(2000, marks=pytest.mark.drill)])
def test_every_image_of_mixed_origin_is_used_or_named(
    count: int, tmp_path: Path, drawn: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "MAX_EXAMPLES", 10**9)  # the name of each that is left out is looked up
    drawings = [path for _, path in openmoji.draw("openmoji-demo", 16, drawn / "openmoji-demo-16px")]
    outcome = read_all(tmp_path, mixed_images(count, drawings))
    assert outcome.lost == []
    assert len(outcome.used) + len(outcome.named) == count
    assert len(outcome.used) == len(outcome.index)
    for image, number in outcome.used:
        assert image.thumbnail is not None
        difference = np.abs(thumbnail(outcome.index.load_image(number)) - image.thumbnail).mean()
        assert difference < 2, (image.name, image.format, image.mode)
    readable = {*FORMATS, "MPO", "DIB"}
    in_tars = [reason for image, reason in outcome.named if image.format in readable]
    assert set(in_tars) <= {"a sample's name ends at its first dot; rename it without other dots"}
    assert len(in_tars) < count / 50
