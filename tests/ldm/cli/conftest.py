"""Fixtures of the tests of scripts that generate images: saved models, input images, checks that scripts share."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from stable_diffusion import PIPELINES

from ldm.sampling import png_metadata
from ldm.sampling.pipeline import LatentDiffusion

Main = Callable[..., int]


@pytest.fixture(scope="session")
def model_dir(
    random_model: Callable[..., LatentDiffusion], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., str]:
    """The folder of a 16 px model with random weights and these conditions."""
    folder = tmp_path_factory.mktemp("models")

    def save(*conditions: str, pixels: bool = False) -> str:
        path = folder / "-".join([*conditions, *(["pixels"] if pixels else [])] or ["unconditional"])
        if not path.exists():
            random_model(*conditions, pixels=pixels).save(path)
        return str(path)

    return save


@pytest.fixture
def noise_image(tmp_path: Path) -> Callable[..., Path]:
    """Writes an image of noise."""

    def write(width: int, height: int | None = None, name: str = "noise.png") -> Path:
        shape = (height or width, width, 3)
        Image.fromarray(np.random.default_rng(width).integers(0, 255, shape, np.uint8)).save(tmp_path / name)
        return tmp_path / name

    return write


@pytest.fixture(scope="session")
def read_pixels() -> Callable[[Path], np.ndarray]:
    """A file's pixels, as integers that can be subtracted."""
    return lambda path: np.asarray(Image.open(path)).astype(int)


@pytest.fixture(scope="session")
def load_once() -> Callable[..., LatentDiffusion]:
    """`LatentDiffusion.load`, which reads files again only once they changed."""
    models: dict[object, LatentDiffusion] = {}
    load = LatentDiffusion.load

    def load_model(name: str | Path, *options: object) -> LatentDiffusion:
        files = [(path, path.stat()) for path in sorted(Path(name).rglob("*"))]
        if not files:  # no folder
            return load(name, *options)
        key = str(name), options, tuple((path, stat.st_mtime_ns, stat.st_size) for path, stat in files)
        if key not in models or models[key].unet.dtype != torch.float32:  # where a call went as far as converting it
            models[key] = load(name, *options)
        return models[key]

    return load_model


@pytest.fixture
def refused(call: Callable[..., str], load_once: Callable[..., LatentDiffusion]) -> Callable[..., str]:
    """Calls a script that has to refuse its arguments; returns its error, which is a single line.

    So it generates nothing, and hardly changes its model, which is loaded once for all such calls.
    """

    def run(main: Main, *arguments: object) -> str:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(LatentDiffusion, "load", load_once)
            output = call(main, *arguments, status=2)
        assert re.fullmatch(r"error: [^\n]+\n", output), output
        return output

    return run


@pytest.fixture
def input_dir(noise_image: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with images of 16, 8 and 65 pixels (a.png, b.png, big.png) and no.png, which is none."""
    monkeypatch.chdir(tmp_path)
    noise_image(16, name="a.png"), noise_image(8, name="b.png"), noise_image(65, name="big.png")
    (tmp_path / "no.png").write_text("not an image")
    return tmp_path


@pytest.fixture
def check_again(
    call: Callable[..., str],
    refused: Callable[..., str],
    read_pixels: Callable[[Path], np.ndarray],
    tmp_path: Path,
) -> Callable[[Main, str, Mapping[str, Path]], None]:
    """Checks that `--again` reproduces an image of a batch from the same input files, wherever they are, and no others.

    It takes the script's `main`, the model's folder, and the input files by option (`--image`, `--mask`).
    """

    def check(main: Main, model: str, files: Mapping[str, Path]) -> None:
        inputs = [argument for pair in files.items() for argument in pair]
        options = ("--prompt", "red heart", "--count", 5, "--batch", 3, "--solver", "euler_a")
        call(main, "--model", model, *options, *inputs, "--out", tmp_path / "all")
        original, again = sorted((tmp_path / "all").glob("*.png"))[4], tmp_path / "again.png"
        call(main, "--again", original, "--out", again)
        assert np.array_equal(read_pixels(again), read_pixels(original))
        assert png_metadata.read(again) == png_metadata.read(original)
        again.unlink()
        for option, path in files.items():
            content = path.read_bytes()
            Image.new("RGB", (16, 16)).save(path)
            assert f"--again: {path} is not the input" in refused(main, "--again", original, "--out", again)
            path.unlink()
            assert f"{option}: no file {path}" in refused(main, "--again", original, "--out", again)
            (tmp_path / "moved.png").write_bytes(content)
            call(main, "--again", original, option, tmp_path / "moved.png", "--out", again)
            assert np.array_equal(read_pixels(again), read_pixels(original))
            again.unlink()
            path.write_bytes(content)

    return check


@pytest.fixture(scope="session")
def pipeline_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of small pipelines of the layouts of Stable Diffusion 1, 2 and XL, by layout."""
    dirs = {}
    for name, build in PIPELINES.items():
        folder = tmp_path_factory.mktemp(name)
        build(folder).save_pretrained(folder / "model")
        dirs[name] = folder / "model"
    return dirs
