"""Training the classifier of classifier guidance on a finished run, as its command does."""

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
from PIL import Image

from ldm.config import loader
from ldm.config.schema import ClassifierConfig, Stage2Config
from ldm.data.index import Index
from ldm.models.classifier import NoisyClassifier
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.checkpoint import read_checkpoint
from ldm.training.metrics_logger import MEASURED
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
    """The folder of an uninterrupted training on a run that was told captions, and no classes."""
    out = tmp_path_factory.mktemp("classifier") / "out"
    assert train.main([str(tiny_run), "--out", str(out), *KEYS]) == 0
    return out


def metrics(out: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (out / "classifier/metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


@pytest.mark.slow
def test_a_finished_classifier_fits_the_model_of_its_run(trained: Path, tiny_run: Path) -> None:
    model, found = LatentDiffusion.load(tiny_run / "pipeline", "cpu"), NoisyClassifier.load(trained)
    found.check(model.scheduler, model.autoencoder)
    assert {"person", "shape", "food"} < set(found.classes)
    x = torch.randn(2, model.autoencoder.channels, 16, 16, generator=torch.Generator().manual_seed(0))
    assert found(x, torch.tensor(500.0)).shape == (2, len(found.classes))
    measured = [line for line in metrics(trained) if "held_out_accuracy" in line]
    assert [line["step"] for line in measured] == [2, 4, 6]
    for line in measured:
        levels = [value for name, value in line.items() if name.startswith("held_out_accuracy_at")]
        assert len(levels) == 6
        assert np.mean(levels) == pytest.approx(line["held_out_accuracy"])
        assert all(share * 8 == pytest.approx(round(share * 8)) for share in levels)


@pytest.mark.slow
def test_what_is_saved_are_the_averaged_weights(trained: Path) -> None:
    parts, _ = read_checkpoint(trained / "classifier/checkpoints/step-000006")
    saved = NoisyClassifier.load(trained).state_dict()
    assert parts["ema"].keys() == saved.keys()
    assert all(torch.equal(value, saved[name]) for name, value in parts["ema"].items())


@pytest.mark.slow
def test_a_killed_training_ends_as_the_uninterrupted_one(
    trained: Path, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    out = tmp_path / "out"
    shutil.copytree(trained, out)  # as a SIGKILL between two steps leaves it
    shutil.rmtree(out / "model")
    shutil.rmtree(out / "classifier/checkpoints/step-000006")
    assert "continuing from step 3 of 6" in call(train.main, tiny_run, "--out", out, *KEYS)
    assert metrics(out) == metrics(trained)
    ended, whole = (NoisyClassifier.load(folder).state_dict() for folder in (out, trained))
    assert all(torch.equal(value, whole[name]) for name, value in ended.items())


@pytest.mark.slow
def test_a_finished_one_is_not_trained_again_and_takes_no_other_settings(
    trained: Path, tiny_run: Path, call: Callable[..., str]
) -> None:
    model = trained / "model/diffusion_pytorch_model.safetensors"
    before, lines = model.stat(), metrics(trained)
    assert f"finished: {trained / 'model'}" in call(train.main, tiny_run, "--out", trained, *KEYS, "evaluate_every=1")
    said = call(train.main, tiny_run, "--out", trained, *KEYS, "steps=7", "half=0", status=2)
    assert "belongs to another training" in said
    assert "classifier.steps: 6 → 7" in said
    assert "classifier.half: None → 0" in said
    assert (model.stat().st_mtime_ns, metrics(trained)) == (before.st_mtime_ns, lines)


@pytest.mark.slow
def test_one_that_had_not_begun_takes_other_settings(
    trained: Path, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    (tmp_path / "out").mkdir()
    shutil.copy(trained / "config.yaml", tmp_path / "out")
    assert "finished" in call(train.main, tiny_run, "--out", tmp_path / "out", *KEYS, "steps=1")


@pytest.mark.slow
def test_the_table_counts_each_class(trained: Path, tiny_run: Path, call: Callable[..., str], tmp_path: Path) -> None:
    more = ["steps=1", "half=1", "seed=3", "evaluate_images=1000"]
    said = call(train.main, tiny_run, "--out", tmp_path / "out", *KEYS, *more)
    rows = said[said.index("held out") :].splitlines()
    header, everything, *classes = [
        row.split() for row in rows[: next(i for i, r in enumerate(rows) if r[:5] == "finis")]
    ]
    assert header == ["held", "out", "images", "-5", "-3", "-1", "+1", "+3", "+5", "log-SNR"]
    counts = [int(row[1]) for row in classes]
    assert int(everything[1]) == sum(counts)
    for column in range(2, 8):
        right = sum(float(row[column]) * n for row, n in zip(classes, counts, strict=True))
        assert float(everything[column]) == pytest.approx(right / sum(counts), abs=1e-3)


def test_no_more_images_are_validated_at_once_than_trained_on_and_as_many_are_right_as_of_the_whole_batch(
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
        """Each held-out accuracy, and the most images computed at once in the training and for the table after it."""
        out = tmp_path / str(device_batch)
        own = ClassifierConfig(
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
        of_it = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": out})})
        train.train(of_it, own, tmp_path / "run", out)
        (line,) = [line for line in metrics(out) if "held_out_accuracy" in line]
        return line, max(computed)

    (whole, most), (in_passes, fewer) = validated(None), validated(2)
    assert (most, fewer) == (8, 2)
    assert in_passes == whole


def test_two_halves_are_disjoint_and_cover_everything(drawings: Callable[..., tuple[loader.Config, Index]]) -> None:
    _, pictures = drawings()
    train = pictures.select("train")
    halves = [set(train.half(number).column("sha256").tolist()) for number in (0, 1)]
    assert not halves[0] & halves[1]
    assert halves[0] | halves[1] == set(train.column("sha256").tolist())
    assert len(train.half(0)) + len(train.half(1)) == len(train)
    assert 0.4 < len(train.half(0)) / len(train) < 0.6


def other(run: Path, folder: Path, changes: dict[str, Any]) -> Path:
    """A run like a finished one whose configuration differs."""
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
    ("changes", "says"),
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
def test_runs_that_no_classifier_can_be_trained_on_are_one_clear_line(
    changes: dict[str, Any], says: str, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    for place in (tmp_path / "none", tmp_path / "one/cat"):
        place.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (32, 32), (90 * i, 0, 0)).save(place / f"{i}.png")
    if "data.source" in changes:
        changes = {**changes, "data.source": [{"path": str(tmp_path / changes["data.source"][0]["path"])}]}
    run = other(tiny_run, tmp_path / "run", changes)
    said = call(train.main, run, "--out", tmp_path / "out", *KEYS, status=2)
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    assert says in line
    assert not (tmp_path / "out/classifier").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (["step=3"], "unknown key 'step'; did you mean 'steps'?"),
        (["half=2"], "half: 2"),
        (["attention=[true]"], "attention: 1 values for 2 levels"),
        (["batch=9", "micro_batches=2"], "micro_batches: 2 equal parts of batch, 9, can't be"),
        (["steps"], "expected section.key=value"),
    ],
    ids=["unknown", "half", "levels", "batch", "no value"],
)
def test_wrong_keys_are_one_clear_line(
    keys: list[str], says: str, tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    said = call(train.main, tiny_run, "--out", tmp_path / "out", *KEYS, *keys, status=2)
    assert says in said
    assert len(said.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_is_not_finished_and_a_folder_of_another_kind_are_refused(
    tiny_run: Path, tmp_path: Path, call: Callable[..., str]
) -> None:
    assert "no finished run (it has no pipeline)" in call(train.main, tmp_path, "--out", tmp_path / "out", status=2)
    before = (tiny_run / "config.yaml").read_bytes()
    assert "is not a classifier's folder" in call(train.main, tiny_run, "--out", tiny_run, *KEYS, status=2)
    assert (tiny_run / "config.yaml").read_bytes() == before
