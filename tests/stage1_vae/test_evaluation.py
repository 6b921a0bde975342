"""Evaluation while the autoencoder trains: which images are measured, by which process, and where results go."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ScriptProcess
from of_config import indexed
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data.dataset import iter_images
from ldm.data.images import to_pil
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.evaluation.reconstruction import ReconstructionMetrics, max_scales
from ldm.models import autoencoder
from ldm.models.autoencoder import Autoencoder
from ldm.training.trainer import Trainer
from stage1_vae import evaluation

Drawings = Callable[..., tuple[Config, Index]]


@pytest.fixture
def shapes(root: Path, tmp_path: Path, three_shapes: Callable[[list[str]], Path]) -> Index:
    """Eleven images of three sizes: four, four and three."""
    overrides = [f"data.source={three_shapes([f'image {i}' for i in range(11)])}", f"run.dir={tmp_path / 'run'}"]
    return indexed(loader.load(root / "configs/tiny.yaml", [*overrides, "data.size=16", "data.buckets={step: 8}"]))


@pytest.fixture
def trainer_of(vae: Autoencoder) -> Callable[[Config], Trainer]:
    """A trainer of `vae`, at its first step."""
    return lambda settings: Trainer(settings.run, settings.stage1, "stage1", vae.vae.requires_grad_(True))


def measured(data: Index, vae: Autoencoder) -> dict[str, float]:
    """The mean figures of all images, computed in this process alone."""
    metrics = ReconstructionMetrics(max_scales(min(min(size) for size in data.sizes)))
    for x in iter_images(data):
        metrics.add(x, vae.decode(vae.encode(x)))
    return metrics.means()


def test_evaluate_images_limits_the_held_out_images_measured(
    drawings: Drawings, trainer_of: Callable[[Config], Trainer], vae: Autoencoder
) -> None:
    settings, data = drawings("stage1.evaluate_images=5")
    held_out = data.select(*HELD_OUT)
    assert len(held_out) > 5
    trainer = trainer_of(settings)
    evaluation.while_training(data, settings, trainer, vae.vae)
    line = json.loads((trainer.folder / "metrics.jsonl").read_text())
    final = evaluation.when_done(data, settings, vae, trainer)["held_out"]
    for name, value in measured(held_out.subset(5), vae).items():
        assert line[f"held_out_{name}"] == final[name] == pytest.approx(value, rel=1e-4)
    assert final["psnr"] != pytest.approx(measured(held_out, vae)["psnr"], rel=1e-4)


def test_figures_are_the_same_for_any_number_of_workers(
    drawings: Drawings, trainer_of: Callable[[Config], Trainer], vae: Autoencoder
) -> None:
    results = []
    for workers in (0, 2):
        settings, data = drawings("stage1.evaluate_images=20", f"data.workers={workers}")
        trainer = trainer_of(settings)
        results.append(evaluation.when_done(data, settings, vae, trainer))
    assert results[0] == results[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(shapes: Index, processes: int) -> None:
    for rank in range(processes):
        expected = list(iter_images(shapes, 2, rank, processes))
        for workers in (1, 2):
            state = torch.get_rng_state()
            batches = list(iter_images(shapes, 2, rank, processes, workers))
            assert torch.equal(torch.get_rng_state(), state)
            assert all(torch.equal(*pair) for pair in zip(batches, expected, strict=True))
    assert torch.equal(next(iter_images(shapes.first(1), workers=2)), next(iter_images(shapes.first(1))))


@pytest.mark.parametrize("processes", [1, 2, 5, 13])
def test_processes_split_the_images_evenly_and_read_every_image_once(shapes: Index, processes: int) -> None:
    every_image = sorted(image.numpy().tobytes() for x in iter_images(shapes) for image in x)
    assert len(set(every_image)) == 11
    shares = [
        [image.numpy().tobytes() for x in iter_images(shapes, 2, rank, processes) for image in x]
        for rank in range(processes)
    ]
    assert sorted(image for share in shares for image in share) == every_image
    assert {len(share) for share in shares} <= {11 // processes, -(-11 // processes)}


def test_per_image_figures_of_two_processes_average_to_those_of_one(shapes: Index, vae: Autoencoder) -> None:
    parts = []
    for rank in range(2):
        metrics = ReconstructionMetrics()
        for x in iter_images(shapes, rank=rank, processes=2):
            metrics.add(x, vae.decode(vae.encode(x)))
        parts.append(metrics.per_image["psnr"])
    assert float(torch.cat(parts).mean()) == pytest.approx(measured(shapes, vae)["psnr"], rel=1e-6)


@pytest.mark.slow
def test_a_process_without_images_waits_for_the_others(
    launch: Callable[..., ScriptProcess],
    finish: Callable[[ScriptProcess], str],
    three_shapes: Callable[[list[str]], Path],
    root: Path,
    tmp_path: Path,
) -> None:
    overrides = [
        f"run.dir={tmp_path / 'run'}",
        f"data.source={three_shapes([f'image {i}' for i in range(20)])}",
        "data.size=16",
        "data.val_fraction=0.3",
        "data.workers=2",
        "stage1.evaluate_images=1",
        "stage1.steps=2",
        "run.preflight=false",
    ]
    finish(launch("train_ldm.py", "--config", "configs/tiny.yaml", "--stage", "1", *overrides, processes=2))
    reported = json.loads((tmp_path / "run/autoencoder/latents.json").read_text())["held_out"]
    data = indexed(loader.load(root / "configs/tiny.yaml", overrides))
    single_process = measured(data.select(*HELD_OUT).subset(1), autoencoder.load(tmp_path / "run/autoencoder"))
    assert reported["psnr"] == pytest.approx(single_process["psnr"], rel=1e-4)


def test_the_grid_of_reconstructions_is_logged_to_the_tracker(
    drawings: Drawings, trainer_of: Callable[[Config], Trainer], vae: Autoencoder
) -> None:
    settings, data = drawings("run.tracker=tensorboard")
    trainer = trainer_of(settings)
    trainer.step = 7
    evaluation.write_sheet(data, evaluation.rebuild_with(vae.vae, trainer.device), trainer)
    events = EventAccumulator(str(trainer.folder), size_guidance={"images": 0}).Reload()
    (logged,) = events.Images("reconstructions")
    assert logged.step == 7
    with Image.open(trainer.folder / "samples/step-000007.png") as saved:
        assert np.array_equal(np.array(Image.open(io.BytesIO(logged.encoded_image_string))), np.array(saved))


def test_differences_are_shown_as_many_times_as_large_as_sheets_say() -> None:
    original = torch.full((1, 3, 2, 2), -1.0)
    rebuilt = original + 2 * 10 / 255  # brighter by ten of 255
    shown = to_pil(evaluation.amplified_difference(rebuilt, original))[0].getpixel((0, 0))
    assert shown[0] - 128 == pytest.approx(10 * evaluation.AMPLIFICATION, abs=1)
