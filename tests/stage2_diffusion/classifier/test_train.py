"""The command that trains a classifier, for classifier guidance, on a finished run."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from metrics_lines import MEASURED
from PIL import Image

from ldm.config import loader
from ldm.config.schema import ClassifierConfig, Stage2Config
from ldm.data.index import Index
from ldm.models.classifier import NoisyClassifier
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.checkpoint import read_checkpoint
from stage2_diffusion.classifier import train

KEYS = [
    "steps=6",
    "batch=8",
    "lr_warmup_steps=1",
    "lr=1e-2",
    "ema_decay=0.5",
    "checkpoint_every=3",
    "evaluate_every=2",
    "evaluate_images=8",
    "channels=[16, 16]",
    "layers=1",
    "attention=[false, true]",
    "attention_head_dim=8",
    "norm_num_groups=4",
]


@pytest.fixture(scope="module")
def trained(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an uninterrupted training, on a run conditioned on captions and not on classes."""
    out = tmp_path_factory.mktemp("classifier") / "out"
    assert train.main([str(tiny_run), "--out", str(out), *KEYS]) == 0
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "classifier/metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.mark.slow
def test_a_finished_classifier_fits_the_model_of_its_run(trained: Path, tiny_run: Path) -> None:
    model, classifier = LatentDiffusion.load(tiny_run / "pipeline", "cpu"), NoisyClassifier.load(trained)
    classifier.check(model.scheduler, model.autoencoder)
    assert {"person", "shape", "food"} < set(classifier.classes)
    x = torch.randn(2, model.autoencoder.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    assert classifier(x, torch.tensor(500.0)).shape == (2, len(classifier.classes))
    measured = [line for line in metrics(trained) if "held_out_accuracy" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    for line in measured:
        levels = [value for name, value in line.items() if name.startswith("held_out_accuracy_at")]
        assert len(levels) == 6
        assert np.mean(levels) == pytest.approx(line["held_out_accuracy"])
        assert all(share * 8 == pytest.approx(round(share * 8)) for share in levels)


@pytest.mark.slow
def test_the_ema_weights_are_saved(trained: Path) -> None:
    parts, _ = read_checkpoint(trained / "classifier/checkpoints/step-000006")
    saved = NoisyClassifier.load(trained).state_dict()
    assert parts["ema"].keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in parts["ema"].items())


@pytest.mark.slow
def test_a_killed_training_resumes_to_the_uninterrupted_result(
    trained: Path, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)  # the state that a SIGKILL between two steps leaves
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "classifier/checkpoints/step-000006")
    assert "continuing from step 3 of 6" in call(train.main, tiny_run, "--out", out, *KEYS)
    assert metrics(out) == metrics(trained)
    resumed, uninterrupted = (NoisyClassifier.load(folder).state_dict() for folder in (out, trained))
    assert all(torch.equal(value, uninterrupted[name]) for name, value in resumed.items())


@pytest.mark.slow
def test_a_finished_classifier_is_not_trained_again_and_refuses_other_settings(
    trained: Path, tiny_run: Path, call: Callable[..., str]
) -> None:
    model = trained / "model/diffusion_pytorch_model.safetensors"
    before, lines = model.stat(), metrics(trained)
    assert f"finished: {trained / 'model'}" in call(train.main, tiny_run, "--out", trained, *KEYS, "evaluate_every=1")
    output = call(train.main, tiny_run, "--out", trained, *KEYS, "steps=7", "half=0", status=2)
    assert "belongs to another training" in output
    assert "half: None → 0; steps: 6 → 7; " in output
    assert (model.stat().st_mtime_ns, metrics(trained)) == (before.st_mtime_ns, lines)


@pytest.mark.slow
def test_a_training_without_a_checkpoint_accepts_other_settings(
    trained: Path, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(trained / "config.yaml", tmp_path / "out")
    assert "finished" in call(train.main, tiny_run, "--out", tmp_path / "out", *KEYS, "steps=1")


@pytest.mark.slow
def test_the_table_counts_the_images_of_every_class(
    trained: Path, tiny_run: Path, call: Callable[..., str], tmp_path: Path
) -> None:
    more = ["steps=1", "half=1", "seed=3", "evaluate_images=1000"]
    output = call(train.main, tiny_run, "--out", tmp_path / "out", *KEYS, *more)
    rows = output[output.index("held out") :].splitlines()
    header, total, *classes = [row.split() for row in rows[: next(i for i, r in enumerate(rows) if r[:5] == "finis")]]
    assert header == ["held", "out", "images", "-5", "-3", "-1", "+1", "+3", "+5", "log-SNR"]
    counts = [int(row[1]) for row in classes]
    assert int(total[1]) == sum(counts)
    for column in range(2, 8):
        correct = sum(float(row[column]) * n for row, n in zip(classes, counts, strict=True))
        assert float(total[column]) == pytest.approx(correct / sum(counts), abs=1e-3)


def test_validation_is_split_into_device_batches_without_changing_the_accuracy(
    drawings: Callable[..., tuple[loader.Config, Index]],
    random_model: Callable[..., LatentDiffusion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings, _ = drawings("stage1.channels=[16, 16]", "data.cache=none", "run.precision=no")
    random_model().save(tmp_path / "run/pipeline")
    settings = settings.model_copy(
        update={"stage2": Stage2Config(prediction_type="v", beta_schedule="cosine", conditions=("class",), batch=8)}
    )
    computed: list[int] = []
    forward = NoisyClassifier.forward

    def spy(self: NoisyClassifier, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        computed.append(len(x))
        return forward(self, x, t)

    monkeypatch.setattr(NoisyClassifier, "forward", spy)

    def validated(device_batch: int | None) -> tuple[dict[str, float], int]:
        """The held-out accuracies, and the most images computed at once in training and for the final table."""
        out = tmp_path / str(device_batch)
        classifier_settings = ClassifierConfig(
            batch=8,
            device_batch=device_batch,
            steps=1,
            evaluate_images=8,
            channels=(16, 16),
            layers=1,
            attention=(False, True),
            attention_head_dim=8,
            norm_num_groups=4,
            lr=1e-30,  # the weights stay
        )
        computed.clear()
        run_settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": out})})
        train.train(run_settings, classifier_settings, tmp_path / "run", out)
        (line,) = [line for line in metrics(out) if "held_out_accuracy" in line]
        return line, max(computed)

    (full_batch, full_size), (device_batches, device_size) = validated(None), validated(2)
    assert (full_size, device_size) == (8, 2)
    assert device_batches == full_batch


def test_the_two_halves_are_disjoint_and_cover_the_training_images(
    drawings: Callable[..., tuple[loader.Config, Index]],
) -> None:
    _, index = drawings()
    train = index.select("train")
    halves = [set(train.half(number).column("sha256").tolist()) for number in (0, 1)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(train.column("sha256").tolist())
    assert len(train.half(0)) + len(train.half(1)) == len(train)
    assert 0.4 < len(train.half(0)) / len(train) < 0.6


def write_run_like(run: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """Writes the folder of a run like a finished one, with `changes` to its configuration."""
    folder.mkdir()
    written = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    written["configuration"]["run"]["dir"] = str(folder)
    for key, value in changes.items():
        section, _, name = key.partition(".")
        written["configuration"][section][name] = value
    (folder / "config.yaml").write_text(yaml.safe_dump(written), "utf-8")
    (folder / "pipeline").symlink_to(run / "pipeline")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"stage2.conditions": ["text", "inpaint"]},
            "made for text, inpaint; classifiers guide models of complete images",
        ),
        ({"data.streaming": True, "data.cache": "none"}, "a stream's classes aren't known beforehand"),
        (
            {"data.source": [{"path": "none"}], "stage2.conditions": ["class"], "stage2.pooled_text": False},
            "it has no class; write it into the column",
        ),
        (
            {"data.source": [{"path": "one"}], "stage2.conditions": [], "stage2.pooled_text": False},
            "of one class, 'cat'; a classifier needs two",
        ),
        ({"stage2.prediction_type": "v"}, "another process's noise"),
    ],
    ids=["inpaint", "stream", "no classes", "one class", "another process"],
)
def test_a_run_that_a_classifier_cannot_be_trained_on_is_refused_in_one_line(
    changes: dict[str, Any], message: str, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    for folder in (tmp_path / "none", tmp_path / "one/cat"):
        folder.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(folder / f"{i}.png")
    if "data.source" in changes:
        changes = {**changes, "data.source": [{"path": str(tmp_path / changes["data.source"][0]["path"])}]}
    run = write_run_like(tiny_run, tmp_path / "run", {"data.cache_dir": str(tiny_run / "cache"), **changes})
    output = call(train.main, run, "--out", tmp_path / "out", *KEYS, status=2)
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert message in line
    assert not (tmp_path / "out/classifier").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        (["step=3"], "unknown key 'step'; did you mean 'steps'?"),
        (["half=2"], "half: 2"),
        (["attention=[true]"], "attention: 1 values for 2 levels"),
        (["batch=9", "micro_batches=2"], "micro_batches: 2 equal parts of batch, 9, can't be"),
        (["steps"], "expected section.key=value"),
    ],
    ids=["unknown", "half", "levels", "batch", "no value"],
)
def test_a_wrong_key_is_one_line(
    keys: list[str], message: str, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    output = call(train.main, tiny_run, "--out", tmp_path / "out", *KEYS, *keys, status=2)
    assert message in output
    assert len(output.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_an_unfinished_run_and_a_folder_of_another_kind_are_refused(
    tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    assert "no finished run (it has no pipeline)" in call(train.main, tmp_path, "--out", tmp_path / "out", status=2)
    before = (tiny_run / "config.yaml").read_bytes()
    assert "is a folder of another kind" in call(train.main, tiny_run, "--out", tiny_run, *KEYS, status=2)
    assert (tiny_run / "config.yaml").read_bytes() == before
