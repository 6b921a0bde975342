"""`scripts/evaluate.py` of two folders of images, and its mistakes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ldm.cli.evaluate_figures import Request
from ldm.config.rules import FEATURE_NETWORKS, FIGURES, FIGURES_OF_NETWORKS
from ldm.evaluation.distances import METRICS
from ldm.models import feature_networks
from ldm.sampling.options import Sampling
from ldm.utils.errors import UserError
from scripts import evaluate

Call = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes a folder of `count` images, of these sizes in turn."""

    def write(count: int, *sizes: tuple[int, int]) -> Path:
        path, rng = tmp_path / f"{count}-{len(sizes)}", np.random.default_rng(count)
        path.mkdir()
        for i in range(count):
            width, height = sizes[i % len(sizes)]
            Image.fromarray(rng.integers(0, 255, (height, width, 3), np.uint8)).save(path / f"{i:02}.png")
        return path

    return write


def test_names_of_metrics_and_networks_are_those_of_their_modules() -> None:
    """The configuration's rules have their own, since they import neither."""
    assert set(FIGURES) == METRICS.keys()
    assert set(FEATURE_NETWORKS) == {*feature_networks.NETWORKS, "latents"}
    assert {name for name, metric in METRICS.items() if metric.needs} <= FIGURES_OF_NETWORKS.keys()


def test_two_folders_are_compared_and_json_is_alone_on_stdout(
    folder: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    images = str(folder(12, (16, 16)))
    flags = ["--metrics", "fid,precision", "--network", "efficientnet-lite0", "--bootstrap", "4", "--json"]
    assert evaluate.main(["--real", images, "--generated", images, *flags]) == 0
    output = capsys.readouterr()
    figures = json.loads(output.out)["figures"]["efficientnet-lite0"]
    assert figures["fid"]["value"] == pytest.approx(0, abs=1e-6)
    assert figures["precision"]["value"] == 1
    assert figures["fid"]["images"] == 12
    assert "12 images against 12 real ones, by EfficientNet-Lite0, 1280" in output.err


@pytest.mark.parametrize(
    ("generated", "flags", "message"),
    [
        ((3, (16, 16)), (), "--generated: 3 images in"),
        ((0, (16, 16)), (), "--generated: 0 images in"),
        ((11, (16, 16), (20, 16)), (), "--generated: images of two sizes, 16×16 and 20×16 px (01.png); --size makes"),
        ((11, (20, 16)), (), "--real, --generated: images of two sizes, 16×16 and 20×16 px; --size makes all alike"),
        ((11, (16, 16)), ("--metrics", "fidd"), "--metrics: 'fidd' is not known; did you mean 'fid'?"),
        ((11, (16, 16)), ("--network", "clip", "--metrics", "is"), "--metrics: is is not of clip's features"),
        ((11, (16, 16)), ("--network", "latents"), "--network: latents are of a run's autoencoder"),
        ((11, (16, 16)), ("--network", "vgg"), "--network: 'vgg'; give"),
        ((11, (16, 16)), ("--metrics", "clip_score", "--network", "clip"), "clip_score needs prompts"),
        ((11, (16, 16)), ("--weights", "WEIGHTS"), "not the weights that it should be"),
        ((11, (16, 16)), ("--guidance", "3"), "--guidance: is for a run; leave it out"),
        ((11, (16, 16)), ("runs/one",), "give the folder of a finished run, or --real and --generated"),
    ],
)
def test_mistakes_are_one_line(
    generated: tuple[int, tuple[int, int]],
    flags: tuple[str, ...],
    message: str,
    folder: Callable[..., Path],
    call: Call,
    tmp_path: Path,
) -> None:
    (tmp_path / "WEIGHTS").write_bytes(b"no weights")
    own = [str(tmp_path / flag) if flag == "WEIGHTS" else flag for flag in flags]
    folders = ("--real", folder(12, (16, 16)), "--generated", folder(*generated))
    output = call(evaluate.main, *folders, "--network", "efficientnet-lite0", *own, status=2)
    error = output[output.index("error: ") :]
    assert message in error
    assert error.count("\n") == 1


def test_several_processes_are_refused(monkeypatch: pytest.MonkeyPatch, call: Call, tmp_path: Path) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "ldm-evaluate: is one process; start it without" in call(evaluate.main, tmp_path, status=2)


def test_metrics_that_training_images_are_too_few_for_are_left_out_and_refused_where_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    request = Request({"latents": ["fid", "precision", "density"]}, None, 20, 4, Sampling(), 4)
    request.check_real_images(5)
    assert request.metrics == {"latents": ["fid", "precision"]}
    assert capsys.readouterr().out == "without density: density needs 6 training images, and there are 5\n"
    request.named = True
    with pytest.raises(UserError, match="--metrics: precision needs 4 training images, and there are 3"):
        request.check_real_images(3)
