"""`stage2.evaluate`: the figures of a run in training are those of `scripts/evaluate.py`, to the last digit."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import ScriptProcess
from of_config import indexed
from tiny import TINY

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.training import preflight
from ldm.training.run_dir import prepare_run_dir
from ldm.utils.errors import UserError
from scripts import evaluate
from stage2_diffusion.evaluation import check_real_images
from stage2_diffusion.train import train

EVALUATE = (
    "stage2.evaluate.network=latents",
    "stage2.evaluate.metrics=[fid, kid, precision]",
    "stage2.evaluate.images=14",
    "stage2.evaluate.batch=4",
    "stage2.evaluate.every=2",
    "stage2.evaluate.guidance=2.0",
)
Call = Callable[..., str]


@pytest.fixture
def run(
    three_shapes: Callable[[list[str]], Path], small: list[str], root: Path, tmp_path: Path
) -> Callable[..., tuple[Config, Index]]:
    """Settings of a run of three steps on a folder of 20 images, and their index."""
    folder = three_shapes([f"noise number {i}" for i in range(20)])

    def load(*overrides: str, name: str = "run") -> tuple[Config, Index]:
        own = (f"data.source={folder}", f"data.cache_dir={tmp_path / 'cache'}", "data.val_fraction=0.2")
        keys = [*small, *own, *EVALUATE, f"run.dir={tmp_path / name}", *overrides]
        settings = loader.load(root / "configs/tiny.yaml", keys)
        return settings, indexed(settings)

    return load


def logged(folder: Path) -> dict[int, dict[str, float]]:
    """The figures of each step that was evaluated."""
    lines = map(json.loads, (folder / "stage2/metrics.jsonl").read_text().splitlines())
    steps = {line.pop("step"): line for line in lines if "evaluate/latents/fid" in line}
    return {step: {name: value for name, value in line.items() if name != "time"} for step, line in steps.items()}


def as_logged(figures: dict[str, dict[str, Any]]) -> dict[str, float]:
    ends = {"": "value", "_low": "low", "_high": "high"}
    return {
        f"evaluate/latents/{name}{end}": figure[key] for name, figure in figures.items() for end, key in ends.items()
    }


@pytest.mark.parametrize("conditions", ["[text]", pytest.param("[class]", marks=pytest.mark.drill), "[]"])
def test_a_run_evaluates_itself_as_the_command_does(
    conditions: str, run: Callable[..., tuple[Config, Index]], vae: Autoencoder, call: Call, tmp_path: Path
) -> None:
    more = ["data.source.kind=sidecars"] if conditions == "[text]" else []
    settings, data = run(f"stage2.conditions={conditions}", "stage2.evaluate.guidance=null", *more)
    prepare_run_dir(settings)
    torch.manual_seed(3)
    train(settings, data, vae, text_encoder.of(settings.text) if settings.stage2.text else None)
    in_training = logged(tmp_path / "run")
    assert list(in_training) == [2, 3]
    output = call(evaluate.main, tmp_path / "run", "--count", 2, "--json")
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())["figures"]
    assert as_logged(figures["latents"]) == in_training[3]
    assert json.loads(output[output.index("{\n") : output.rindex("}") + 1])["figures"] == figures
    assert figures["latents"]["fid"]["images"] == 14
    assert "latents fid" in (tmp_path / "run/README.md").read_text()


def test_an_interrupted_run_evaluates_the_same_and_its_weights_do_not_depend_on_it(
    run: Callable[..., tuple[Config, Index]], vae: Autoencoder, tmp_path: Path
) -> None:
    """The second run has a checkpoint of step two, then goes on; the third is not evaluated."""
    weights = {}
    for name, starts in (("whole", [()]), ("parts", [("stage2.steps=2",), ()]), ("none", [("stage2.evaluate=null",)])):
        for overrides in starts:
            settings, data = run("stage2.checkpoint_every=2", *overrides, name=name)
            train(settings, data, vae, text_encoder.of(settings.text))
            (tmp_path / name / "pipeline").replace(tmp_path / f"{name}-pipeline-{settings.stage2.steps}")
        file = tmp_path / f"{name}-pipeline-3/unet/diffusion_pytorch_model.safetensors"
        weights[name] = file.read_bytes()
    assert logged(tmp_path / "whole") == logged(tmp_path / "parts")
    assert weights["whole"] == weights["parts"] == weights["none"]


@pytest.mark.slow
def test_two_processes_evaluate_as_the_command_does(
    launch: Callable[..., ScriptProcess],
    finish: Callable[[ScriptProcess], str],
    call: Call,
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    """Sixteen images in five batches: the processes take three each, one of them twice."""
    more = (
        "data.cache=none",
        f"data.cache_dir={tiny_run / 'cache'}",
        f"stage1.pretrained={tiny_run / 'autoencoder'}",
        "stage2.steps=2",
        "sample.prompts=[]",
        "sample.steps=2",
        "stage2.evaluate.images=18",
    )
    finish(launch("train_ldm.py", *TINY, f"run.dir={tmp_path / 'run'}", *EVALUATE, *more, processes=2))
    call(evaluate.main, tmp_path / "run", "--count", 2)
    figures = json.loads((tmp_path / "run/evaluation.json").read_text())["figures"]
    assert as_logged(figures["latents"]) == logged(tmp_path / "run")[2]


def test_its_time_is_measured_beforehand_of_a_batch(run: Callable[..., tuple[Config, Index]], vae: Autoencoder) -> None:
    settings, data = run()
    encoder = text_encoder.of(settings.text)
    line = preflight.measure(settings, "stage2", data, lambda small, few: train(small, few, vae, encoder))
    assert ", 2 × figures " in line
    assert not (settings.run.dir / "stage2").exists()


def test_too_few_training_images_are_named_before_anything_is_trained(run: Callable[..., tuple[Config, Index]]) -> None:
    settings, data = run("stage2.evaluate.metrics=[kid, density]")
    check_real_images(settings, data)
    with pytest.raises(UserError, match="density needs 6 training images, and there are 5; leave it"):
        check_real_images(settings, data.select("train").first(5))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("metrics=[fidd]",), "stage2.evaluate.metrics: 'fidd' is not known; did you mean 'fid'? known are fid, sfid"),
        (("metrics=[is]",), "stage2.evaluate.metrics: is is not of latents's features"),
        (("metrics=[fid, fid]",), "an entry is listed twice"),
        (("images=3",), "stage2.evaluate.images: 3 are too few for fid; give 10 or more"),
        (("weights=file.pth",), "stage2.evaluate.weights: latents are those of the run's autoencoder"),
        (("steps=2000", "../prediction_type=v"), "stage2.evaluate.steps: 2000, but stage2.timesteps are 1000"),
        (("../conditions=[]", "../pooled_text=false"), "stage2.evaluate.guidance: a model without conditions has none"),
        (
            ("../conditions=[text, inpaint]",),
            "stage2.evaluate: is of models that generate whole images, not of inpaint",
        ),
        (
            ("network=clip", "metrics=[clip_score]", "../conditions=[class]", "../pooled_text=false"),
            "clip_score needs prompts",
        ),
    ],
)
def test_mistakes_are_named(overrides: tuple[str, ...], message: str, root: Path) -> None:
    keys = [f"stage2.evaluate.{key}".replace("evaluate.../", "") for key in overrides]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        loader.load(root / "configs/tiny.yaml", [*EVALUATE, *keys])

    assert "\n" not in str(error.value)
