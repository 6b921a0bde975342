"""The recipe in a PNG."""

from pathlib import Path

import pytest
from PIL import Image

from ldm.sampling import png_metadata
from ldm.utils.errors import UserError


def test_a_recipe_is_read_as_it_was_saved(tmp_path: Path) -> None:
    recipe = dict.fromkeys(png_metadata.REQUIRED) | {"prompt": "naïve ♥", "seed": 2**63 - 1}
    png_metadata.save(Image.new("RGB", (4, 4)), tmp_path / "a.png", recipe)
    assert png_metadata.read(tmp_path / "a.png") == recipe


def test_a_file_without_a_recipe_is_refused_without_naming_a_flag(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    for name, message in (("none.png", "recipe: no file "), ("plain.png", "recipe: .* does not say how it was made")):
        with pytest.raises(UserError, match=f"^{message}") as error:
            png_metadata.read(tmp_path / name)
        assert "--" not in str(error.value)
