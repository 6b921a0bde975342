"""The table that measures classifier guidance, and the accuracy in it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from ldm.config.schema import ClassifierConfig
from ldm.diffusion.process import DiffusionProcess
from ldm.models.autoencoder import Autoencoder, Identity
from ldm.models.classifier import NoisyClassifier
from stage2_diffusion.classifier import evaluate
from stage2_diffusion.classifier import train as training

KEYS = [
    "steps=2",
    "batch=8",
    "channels=[16, 16]",
    "layers=1",
    "attention=[false, true]",
    "attention_head_dim=8",
    "norm_num_groups=4",
    "evaluate_images=8",
]


@pytest.mark.slow
@pytest.mark.parametrize("target", ["v", pytest.param("flow", marks=pytest.mark.drill)])
def test_every_solver_and_scale_gets_a_row(
    target: str, train: Callable[..., str], call: Callable[..., str], tmp_path: Path, small: list[str], vae: Autoencoder
) -> None:
    vae.save(tmp_path / "vae")
    run, guide, evaluator = tmp_path / "run", tmp_path / "guide", tmp_path / "evaluator"
    ddpm = [] if target == "flow" else ["stage2.timesteps=20", "sample.solver=ddim"]
    overrides = [
        f"stage1.pretrained={tmp_path / 'vae'}",
        "stage2.conditions=[]",
        f"stage2.prediction_type={target}",
        *ddpm,
    ]
    train(run, *small, *overrides)
    call(training.main, run, "--out", guide, *KEYS, "half=0")
    call(training.main, run, "--out", evaluator, *KEYS, "half=1", "seed=1")
    options = ["--guide", guide, "--evaluator", evaluator, "--count", 10, "--scales", 0, 3, "--steps", 4]
    output = call(evaluate.main, run, *options)
    header, *rows = (line.split() for line in output[output.index("solver") :].splitlines())
    assert header == ["solver", "steps", "scale", "guide", "evaluator", "seconds"]
    assert [row[:3] for row in rows] == [["ddpm", "4", "0"], ["ddpm", "4", "3"], ["ddim", "2", "0"], ["ddim", "2", "3"]]
    assert all(round(float(share) * 10, 6).is_integer() for row in rows for share in row[3:5])

    other = NoisyClassifier.load(guide)
    other.register_to_config(classes=[*other.classes[:-1], "another"])
    other.save_pretrained(tmp_path / "other/model")
    options[3] = tmp_path / "other"
    assert "has other classes" in call(evaluate.main, run, *options, status=2)


@pytest.mark.slow
def test_a_mistake_is_one_line(tiny_run: Path, tmp_path: Path, call: Callable[..., str]) -> None:
    both = ["--guide", tmp_path, "--judge", tmp_path]
    for more, message in (
        (["--count", 0], "--count: 0; give 1 or more"),
        (["--steps", 1], "--steps: 1; give 2 or more"),
        ([], "has text or class conditions"),
    ):
        output = call(evaluate.main, tiny_run, *both, *more, status=2)
        assert message in output
        assert output.count("\n") == 1


def test_accuracy_is_the_share_of_images_whose_largest_logit_is_their_class() -> None:
    torch.manual_seed(0)
    settings = ClassifierConfig(
        channels=(16, 16), layers=1, attention=(False, True), attention_head_dim=8, norm_num_groups=4
    )
    classifier = NoisyClassifier.of(settings, Autoencoder(Identity()), DiffusionProcess("v"), ["cat", "dog"]).eval()
    x0 = torch.randn(40, 3, 8, 8)
    predicted = classifier(x0, torch.tensor(0)).argmax(1)
    assert evaluate.accuracy(classifier, x0, predicted) == 1
    assert evaluate.accuracy(classifier, x0, 1 - predicted) == 0
    assert evaluate.accuracy(classifier, x0, torch.where(torch.arange(40) < 10, predicted, 1 - predicted)) == 0.25
