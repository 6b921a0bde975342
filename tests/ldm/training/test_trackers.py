"""Images reach every tracker with the metrics of their step, through accelerate's classes and the real packages."""

from __future__ import annotations

import inspect
import io
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from ldm.config.schema import TRACKERS, Config
from ldm.data.index import Index
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import trackers
from ldm.training.trackers import INTERFACES, log_image
from ldm.training.trainer import Trainer
from stage2_diffusion.samples import write_sheet


@pytest.fixture
def sheet() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8))


@pytest.fixture
def track(
    tmp_path: Path, sheet: Image.Image, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[[str], Accelerator]:
    """Logs to a tracker in `tmp_path`: metrics, the sheet and more metrics of step 40, metrics of step 60."""
    monkeypatch.chdir(tmp_path)

    def log_run(name: str) -> Accelerator:
        accelerator = Accelerator(cpu=True, log_with=name, project_dir=str(tmp_path))
        accelerator.init_trackers("stage1")
        assert [tracker.name for tracker in accelerator.trackers] == [name]
        accelerator.log({"loss": 0.5}, step=40)
        log_image(accelerator.trackers, "samples", sheet, 40)
        accelerator.log({"held_out_loss": 0.25}, step=40)
        accelerator.log({"loss": 0.125}, step=60)
        assert "did not take" not in capsys.readouterr().err
        return accelerator

    return log_run


def shows(file: Path | io.BytesIO, sheet: Image.Image) -> bool:
    with Image.open(file) as image:
        return np.array_equal(np.array(image.convert("RGB")), np.array(sheet))


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of a file in leveldb's log format, after wandb's own seven bytes."""
    position, record = 7, b""
    while position + 7 <= len(content):
        if (left := 32768 - position % 32768) < 7:  # no header fits into the rest of a block
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # complete, or its last fragment
            yield record
            record = b""


def test_every_tracker_of_accelerate_has_an_interface() -> None:
    assert INTERFACES.keys() == LOGGER_TYPE_TO_CLASS.keys()
    assert tuple(sorted(map(str, LOGGER_TYPE_TO_CLASS))) == TRACKERS


def test_tensorboard_shows_the_sheet_at_its_step(
    track: Callable[[str], Accelerator], sheet: Image.Image, tmp_path: Path
) -> None:
    track("tensorboard")  # written before training ends
    events = EventAccumulator(str(tmp_path / "stage1")).Reload()
    (logged,) = events.Images("samples")
    assert logged.step == 40
    assert shows(io.BytesIO(logged.encoded_image_string), sheet)
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("loss")] == [(40, 0.5), (60, 0.125)]
    assert [(scalar.step, scalar.value) for scalar in events.Scalars("held_out_loss")] == [(40, 0.25)]


def test_wandb_logs_the_sheet_in_the_row_of_its_steps_metrics(
    track: Callable[[str], Accelerator], sheet: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    track("wandb").end_training()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    rows = {}
    for content in leveldb_records(next(folder.glob("*.wandb")).read_bytes()):
        history = Record.FromString(content).history
        if history.item:
            rows[history.step.num] = {
                item.key or item.nested_key[0]: json.loads(item.value_json) for item in history.item
            }
    assert {step: set(row) & {"loss", "held_out_loss", "samples"} for step, row in rows.items()} == {
        40: {"loss", "held_out_loss", "samples"},
        60: {"loss"},
    }
    assert (rows[40]["loss"], rows[40]["held_out_loss"], rows[60]["loss"]) == (0.5, 0.25, 0.125)
    (file,) = (folder / "files/media/images").glob("samples_40_*.png")
    assert shows(file, sheet)


def test_swanlab_logs_the_sheet_with_its_step(
    track: Callable[[str], Accelerator], sheet: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    track("swanlab").end_training()
    (file,) = (tmp_path / "swanlog").glob("run-*/media/image/040-*.png")
    assert shows(file, sheet)
    (records,) = (tmp_path / "swanlog").glob("run-*/*.swanlab")
    for name in ("loss", "held_out_loss", "samples", file.name):
        assert name.encode() in records.read_bytes()


def test_trackio_logs_the_sheet_with_its_step(
    track: Callable[[str], Accelerator], sheet: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read at import
    pytest.importorskip("trackio")
    from trackio.sqlite_storage import SQLiteStorage

    track("trackio").end_training()
    (run,) = SQLiteStorage.get_runs("stage1")
    rows = [{**row, "timestamp": None} for row in SQLiteStorage.get_logs("stage1", run)]
    samples = next(row for row in rows if "samples" in row)
    assert [(row["step"], row.get("loss"), row.get("held_out_loss")) for row in rows if row is not samples] == [
        (40, 0.5, None),
        (40, None, 0.25),
        (60, 0.125, None),
    ]
    assert samples["step"] == 40
    assert shows(tmp_path / "trackio/media" / samples["samples"]["file_path"], sheet)


def test_aim_logs_the_sheet_with_its_step(track: Callable[[str], Accelerator], sheet: Image.Image) -> None:
    pytest.importorskip("aim")
    from aim.storage.context import Context

    accelerator = track("aim")
    run = accelerator.trackers[0].tracker
    steps, images = run.get_image_sequence("samples", Context({})).values.sparse_list()
    assert steps == [40]
    assert np.array_equal(np.array(images[0].to_pil_image().convert("RGB")), np.array(sheet))
    assert run.get_metric("held_out_loss", Context({})).values.sparse_list()[1] == [0.25]  # aim hashes their steps
    accelerator.end_training()


def test_a_failing_tracker_is_reported_once_and_the_others_get_the_sheet(
    sheet: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "_failed", set())

    class Unreachable(GeneralTracker):
        """Stands in for a tracker whose server does not answer."""

        name, requires_logging_directory, tracker = "wandb", False, None

        def log_images(self, *_: object, **__: object) -> None:
            raise ConnectionError("no route\nto host")

    accelerator = Accelerator(cpu=True, log_with=[Unreachable(), "tensorboard"], project_dir=str(tmp_path))
    accelerator.init_trackers("stage1")
    for step in (40, 60):
        log_image(accelerator.trackers, "samples", sheet, step)
    (line,) = capsys.readouterr().err.splitlines()
    assert line == (
        "run.tracker: wandb did not log the image 'samples' of step 40 (no route to host); training goes on, and "
        "the image is in the run's folder"
    )
    assert [image.step for image in EventAccumulator(str(tmp_path / "stage1")).Reload().Images("samples")] == [40, 60]


def test_a_users_own_tracker_is_skipped(sheet: Image.Image) -> None:
    class Own(GeneralTracker):
        name, requires_logging_directory, tracker = "own", False, None

    log_image([Own()], "samples", sheet, 40)


def test_stage_2_logs_its_sheet(
    drawings: Callable[..., tuple[Config, Index]], random_model: Callable[..., LatentDiffusion]
) -> None:
    settings, data = drawings("run.tracker=tensorboard", "stage2.conditions=[class]", "stage2.pooled_text=false")
    model = random_model("class")
    run = Trainer(settings.run, settings.stage2, "stage2", model.unet)
    run.step = 7
    write_sheet(settings, run, model, data)
    (logged,) = EventAccumulator(str(run.folder), size_guidance={"images": 0}).Reload().Images("samples")
    assert logged.step == 7
    with Image.open(run.folder / "samples/step-000007.png") as file:
        assert shows(io.BytesIO(logged.encoded_image_string), file.convert("RGB"))


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "swanlab", "aim", "clearml"])
def test_a_sheet_fits_the_signature_of_the_trackers_method(name: str) -> None:
    """Even if its package is not installed; for trackio, comet_ml, mlflow and dvclive their own methods are called."""
    signature = inspect.signature(LOGGER_TYPE_TO_CLASS[name].log_images)

    class Recorder:
        tracker = SimpleNamespace(flush=lambda: None)

        def log_images(self, *args: object, **options: object) -> None:
            bound = signature.bind(self, *args, **options).arguments
            assert bound["step"] == 3
            assert bool(bound.get("kwargs")) == (name == "tensorboard")
            (value,) = bound["values"].values()
            assert isinstance(value, Image.Image) == (name in ("aim", "clearml"))

    INTERFACES[name](Recorder(), "samples", Image.new("RGB", (8, 8)), 3)
