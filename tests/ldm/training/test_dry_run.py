"""A dry run measures training, writes nothing to disk and keeps no reference to the run."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.config import loader
from ldm.config.loader import Config
from ldm.config.schema import RunConfig, Training
from ldm.data.index import Index
from ldm.models import autoencoder, text_encoder
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training import dry_run
from ldm.training.dry_run import DryRun
from ldm.training.preflight import _result_bytes
from ldm.training.trainer import Trainer
from stage2_diffusion.samples import write_sheet


class Numbers(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return {"position": torch.tensor(n), "x": torch.tensor([float(n)])}


def train(folder: Path, due: list[int], references: list[weakref.ref[object]], steps: int = 4) -> None:
    """Trains as a stage does; adds steps with an evaluation to `due`, and weak references to the run's tensors."""
    config = RunConfig(dir=folder, tracker="tensorboard", log_every=2)
    run = Trainer(
        config,
        Training(steps=steps, batch=2, checkpoint_every=1, ema_widths=(0.1,), ema_snapshot_every=1),
        "stage2",
        nn.Linear(1, 1),
    )
    references += [weakref.ref(run), *map(weakref.ref, (*run.parameters, *run.ema.main.shadow_params))]
    for batch in run.batches(Numbers()):
        with run.accumulate():
            loss = run.model(batch["x"]).square().mean()
            run.backward(loss)
            run.optimizer_step()
            run.log(loss=loss)
        run.checkpoint_if_due()
        if run.due(1):
            due.append(run.step)
            with run.ema_weights("a validation"):
                pass
    raise AssertionError("the loop continued past the dry run's steps")


@pytest.mark.parametrize("evaluate", [True, False])
def test_a_dry_run_trains_its_steps_and_leaves_no_files(tmp_path: Path, evaluate: bool) -> None:
    due: list[int] = []
    references: list[weakref.ref[object]] = []
    with DryRun(evaluate) as measured:
        train(tmp_path / "run", due, references)
    assert due == ([4] if evaluate else [])
    assert len(measured.step_ends) == 4 and measured.step_ends == sorted(measured.step_ends)
    assert ("a validation" in measured.seconds) == evaluate
    assert measured.seconds["a training step"] > 0 and measured.seconds["encoding the data"] >= 0
    assert [line["step"] for line in measured.lines] == [2, 4]
    assert all(line["loss"] > 0 and line["loss_scale"] == 1 and line["skipped"] == 0 for line in measured.lines)
    assert (measured.weight_bytes, measured.frozen_bytes) == (2 * 4, 0)
    step = 2 * 4  # AdamW counts each parameter's
    assert measured.checkpoint_bytes == (1 + 2 + 1) * 2 * 4 + step  # weights, two moments, an average
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and "events" not in path.name]
    gc.collect()
    assert [reference() for reference in references] == [None] * len(references)
    assert dry_run.current() is None


def test_the_disk_of_a_merged_adapter_includes_the_whole_pipeline(root: Path, words: Path) -> None:
    measured = DryRun()
    measured.weight_bytes, measured.frozen_bytes = 100, 1000
    adapter = [f"text.model={words}", "stage1.pretrained=P", "stage2.init_from=P", "finetune.kind=lora"]
    config = loader.load(root / "configs/tiny.yaml", adapter)
    merged = loader.load(root / "configs/tiny.yaml", [*adapter, "finetune.merge=true"])
    assert _result_bytes(config, "stage2", measured) == 2 * 100  # both layouts
    vae = autoencoder.build(config.stage1, config.data.size)
    parameters = (*vae.parameters(), *(p for part in text_encoder.of(config.text).models for p in part.parameters()))
    assert _result_bytes(merged, "stage2", measured) == 2 * 100 + 1000 + 4 * sum(p.numel() for p in parameters)


def test_an_error_records_its_activity_and_ends_the_dry_run(tmp_path: Path) -> None:
    def train() -> None:
        run = Trainer(RunConfig(dir=tmp_path), Training(steps=1, batch=1), "stage2", nn.Linear(1, 1))
        with run.ema_weights("a sample grid"):
            raise torch.OutOfMemoryError

    measured = DryRun()
    with pytest.raises(torch.OutOfMemoryError), measured:
        train()
    assert measured.activity == "a sample grid"
    assert dry_run.current() is None


def test_the_denoising_time_of_a_sample_sheet_is_measured_separately(
    drawings: Callable[..., tuple[Config, Index]], random_model: Callable[..., LatentDiffusion]
) -> None:
    settings, data = drawings("stage2.conditions=[class]", "stage2.pooled_text=false")
    model = random_model("class")
    with pytest.raises(ZeroDivisionError), DryRun() as measured:
        write_sheet(settings, Trainer(settings.run, settings.stage2, "stage2", model.unet), model, data)
        raise ZeroDivisionError
    assert 0 < measured.denoising["a sample grid"] < measured.seconds["a sample grid"]
