"""What is measured and shown while the autoencoder trains: how much of it, by whom, and where it goes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import Process
from of_config import indexed
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data.dataset import iter_images
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.evaluation.reconstruction import Figures, max_scales
from ldm.models import autoencoder
from ldm.models.autoencoder import Autoencoder
from ldm.training.trainer import Trainer
from stage1_vae import evaluation

Drawings = Callable[..., tuple[Config, Index]]


@pytest.fixture
def shapes(root: Path, tmp_path: Path, three_shapes: Callable[[list[str]], Path]) -> Index:
    """Eleven pictures of three sizes: four, four and three."""
    given = [f"data.source={three_shapes([f'picture {i}' for i in range(11)])}", f"run.dir={tmp_path / 'run'}"]
    return indexed(loader.load(root / "configs/tiny.yaml", [*given, "data.size=16", "data.buckets={step: 8}"]))


@pytest.fixture
def started(vae: Autoencoder) -> Callable[[Config], Trainer]:
    """The beginning of a run that trains `vae`."""
    return lambda settings: Trainer(settings.run, settings.stage1, "stage1", vae.vae.requires_grad_(True))


def measured(data: Index, vae: Autoencoder) -> dict[str, float]:
    """The figures of all pictures, in this process alone."""
    found = Figures(max_scales(min(min(size) for size in data.sizes)))
    for x in iter_images(data):
        found.add(x, vae.decode(vae.encode(x)))
    return found.means()


def test_no_more_held_out_pictures_are_measured_than_asked_for(
    drawings: Drawings, started: Callable[[Config], Trainer], vae: Autoencoder
) -> None:
    settings, data = drawings("stage1.evaluate_images=5")
    held = data.select(*HELD_OUT)
    assert len(held) > 5
    run = started(settings)
    evaluation.while_training(data, settings, run, vae.vae)
    line = json.loads((run.folder / "metrics.jsonl").read_text())
    found = evaluation.when_done(data, settings, vae, run)["held_out"]
    for name, value in measured(held.subset(5), vae).items():
        assert line[f"held_out_{name}"] == found[name] == pytest.approx(value, rel=1e-4)
    assert found["psnr"] != pytest.approx(measured(held, vae)["psnr"], rel=1e-4)


def test_figures_are_the_same_for_any_number_of_workers(
    drawings: Drawings, started: Callable[[Config], Trainer], vae: Autoencoder
) -> None:
    found = []
    for workers in (0, 2):
        settings, data = drawings("stage1.evaluate_images=20", f"data.workers={workers}")
        run = started(settings)
        found.append(evaluation.when_done(data, settings, vae, run))
    assert found[0] == found[1]


@pytest.mark.parametrize("processes", [1, 2])
def test_batches_are_the_same_for_any_number_of_workers(shapes: Index, processes: int) -> None:
    for rank in range(processes):
        expected = list(iter_images(shapes, 2, rank, processes))
        for workers in (1, 2):
            state = torch.get_rng_state()
            found = list(iter_images(shapes, 2, rank, processes, workers))
            assert torch.equal(torch.get_rng_state(), state)
            assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
    assert torch.equal(next(iter_images(shapes.first(1), workers=2)), next(iter_images(shapes.first(1))))


@pytest.mark.parametrize("processes", [1, 2, 5, 13])
def test_processes_share_all_pictures_evenly_each_once(shapes: Index, processes: int) -> None:
    every = sorted(picture.numpy().tobytes() for x in iter_images(shapes) for picture in x)
    assert len(set(every)) == 11
    shares = [
        [picture.numpy().tobytes() for x in iter_images(shapes, 2, rank, processes) for picture in x]
        for rank in range(processes)
    ]
    assert sorted(picture for share in shares for picture in share) == every
    assert {len(share) for share in shares} <= {11 // processes, -(-11 // processes)}


def test_the_figures_of_two_shares_are_those_of_all(shapes: Index, vae: Autoencoder) -> None:
    parts = []
    for rank in range(2):
        figures = Figures()
        for x in iter_images(shapes, rank=rank, processes=2):
            figures.add(x, vae.decode(vae.encode(x)))
        parts.append(figures.per_image["psnr"])
    assert float(torch.cat(parts).mean()) == pytest.approx(measured(shapes, vae)["psnr"], rel=1e-6)


@pytest.mark.slow
def test_a_process_without_a_share_waits_for_the_others(
    launch: Callable[..., Process],
    finish: Callable[[Process], str],
    three_shapes: Callable[[list[str]], Path],
    root: Path,
    tmp_path: Path,
) -> None:
    given = [
        f"run.dir={tmp_path / 'run'}",
        f"data.source={three_shapes([f'picture {i}' for i in range(20)])}",
        "data.size=16",
        "data.val_fraction=0.3",
        "data.workers=2",
        "stage1.evaluate_images=1",
        "stage1.steps=2",
        "run.preflight=false",
    ]
    finish(launch("train_ldm.py", "--config", "configs/tiny.yaml", "--stage", "1", *given, processes=2))
    found = json.loads((tmp_path / "run/autoencoder/latents.json").read_text())["held_out"]
    data = indexed(loader.load(root / "configs/tiny.yaml", given))
    one = measured(data.select(*HELD_OUT).subset(1), autoencoder.load(tmp_path / "run/autoencoder"))
    assert found["psnr"] == pytest.approx(one["psnr"], rel=1e-4)


def test_the_sheet_goes_to_the_tracker(
    drawings: Drawings, started: Callable[[Config], Trainer], vae: Autoencoder
) -> None:
    settings, data = drawings("run.tracker=tensorboard")
    run = started(settings)
    run.step = 7
    evaluation.write_sheet(data, evaluation.rebuild_with(vae.vae, run.device), run)
    events = EventAccumulator(str(run.folder), size_guidance={"images": 0}).Reload()
    (logged,) = events.Images("reconstructions")
    assert logged.step == 7
    with Image.open(run.folder / "samples/step-000007.png") as saved:
        assert np.array_equal(np.array(Image.open(io.BytesIO(logged.encoded_image_string))), np.array(saved))
