"""What tests of scripts that make pictures share: saved models, and pictures to start from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.sampling.pipeline import LatentDiffusion


@pytest.fixture(scope="session")
def saved(random_model: Callable[..., LatentDiffusion], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """The folder of a model of 16 px with random weights that is told these conditions."""
    folder = tmp_path_factory.mktemp("models")

    def save(*conditions: str, pixels: bool = False) -> str:
        path = folder / "-".join([*conditions, *(["pixels"] if pixels else [])] or ["nothing"])
        if not path.exists():
            random_model(*conditions, pixels=pixels).save(path)
        return str(path)

    return save


@pytest.fixture
def noisy(tmp_path: Path) -> Callable[..., Path]:
    """Writes a picture of noise."""

    def write(width: int, height: int | None = None, name: str = "given.png") -> Path:
        shape = (height or width, width, 3)
        Image.fromarray(np.random.default_rng(width).integers(0, 255, shape, np.uint8)).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def pixels() -> Callable[[Path], np.ndarray]:
    """A file's pixels, as whole numbers that can be subtracted."""
    return lambda path: np.asarray(Image.open(path)).astype(int)
