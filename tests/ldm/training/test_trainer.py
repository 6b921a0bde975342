"""The trainer: exact resume, signals, checkpoints, averages, skipped steps, metrics."""

import itertools
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from accelerate import Accelerator
from forked import ScriptProcess
from metrics_lines import MEASURED
from torch import nn

import ldm.training.trainer
from ldm.config.schema import RunConfig, Training
from ldm.data.sampler import ORDER
from ldm.distributed.launch import accelerator
from ldm.training.checkpoint import CheckpointManager, checkpoints, read_checkpoint
from ldm.training.engine import Engine
from ldm.training.metrics_logger import MetricsLogger
from ldm.training.trainer import Trainer
from ldm.utils.errors import UserError
from ldm.utils.rng import normal


class Positions(torch.utils.data.Dataset):
    def __init__(self, side: int, keys: bool = False):
        self.side, self.keys = side, keys

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        x = normal(0, "x", torch.tensor([n]), (self.side,))[0]
        return {"position": torch.tensor(n), "x": x, **({"key": f"{n}.png"} if self.keys else {})}


def train(
    folder: Path,
    stop: int | None = None,
    keep: int = 2,
    bad: tuple[int, ...] = (),
    steep: tuple[int, ...] = (),
    max_skipped: int = 10,
    number: int = signal.SIGTERM,
    log_every: int = 3,
    side: int = 4,
    workers: int = 0,
    keys: bool = False,
    stage: str = "stage1",
    network: Callable[[], nn.Module] | None = None,
    finish_writes: bool = False,
    **changes: object,
) -> Trainer:
    """Trains a linear layer to be the identity; after `stop` steps it sends the signal `number` to all its processes.

    A `network` takes the layer's place. With `finish_writes`, each step waits until checkpoints are written.

    In the steps `bad` the third sample's output is not finite, in the steps `steep` no gradient is finite.
    """
    torch.manual_seed(0)
    options = {
        "steps": 12,
        "batch": 4,
        "lr": 0.1,
        "lr_warmup_steps": 2,
        "ema_decay": 0.5,
        "checkpoint_every": 4,
        **changes,
    }
    run = Trainer(
        RunConfig(
            dir=folder,
            precision="no",
            device="cpu",
            log_every=log_every,
            tracker="none",
            checkpoints_total_limit=keep,
            max_skipped=max_skipped,
        ),
        Training(**options),
        stage,
        network() if network else nn.Linear(side, side),
        {"shape": [4]},
    )
    others = {child.pid for child in psutil.Process().children()}  # the server of `forked` among them
    for batch in run.batches(Positions(side, keys), workers):
        with run.accumulate():
            output = run.model(batch["x"])
            if run.step in bad:
                output = torch.where(batch["position"][:, None] % 4 == 2, torch.inf, output)
            if run.step in steep:
                output.register_hook(lambda gradient: gradient * torch.nan)
            run.nonfinite.track_nonfinite(batch["position"], output)
            loss = (output - batch["x"]).square().mean()
            run.backward(loss)
            run.optimizer_step()
            run.log(loss=loss)
        run.checkpoint_if_due()
        while finish_writes and run._writer.writing:
            time.sleep(0.001)
        if run.step == stop:
            loaders = [str(child.pid) for child in psutil.Process().children() if workers and child.pid not in others]
            subprocess.run(["kill", f"-{int(number)}", *loaders, str(os.getpid())], check=True)
            time.sleep(0.2 * bool(loaders))
    return run


def metrics(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "stage1/metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in MEASURED} for line in lines]


def weights(run: Trainer) -> list[torch.Tensor]:
    return [
        *(p.detach().clone() for p in run.parameters),
        *(s for model in run.ema.models for s in model.shadow_params),
    ]


def test_resume_equals_uninterrupted(tmp_path: Path) -> None:
    full_run = train(tmp_path / "uninterrupted")
    with pytest.raises(SystemExit) as exit_error:
        train(tmp_path / "stopped", stop=6)  # the run ends after step 7
    assert exit_error.value.code == 128 + 15
    resumed = train(tmp_path / "stopped")
    assert all(map(torch.equal, weights(full_run), weights(resumed)))
    assert metrics(tmp_path / "uninterrupted") == metrics(tmp_path / "stopped")
    assert [line["step"] for line in metrics(tmp_path / "uninterrupted")] == [3, 6, 9, 12]


def test_resume_with_8_bit_moments_equals_uninterrupted(tmp_path: Path) -> None:
    """The layer is large enough for them: bitsandbytes keeps the moments of small tensors in 32 bits."""
    pytest.importorskip("bitsandbytes", reason="pip install 'ldm[8bit]'")
    options = {"optimizer": "adamw8bit", "side": 80, "lr": 0.01}
    full_run = train(tmp_path / "uninterrupted", **options)
    moments = full_run._engine.optimizer.optimizer.state[full_run.parameters[0]]
    assert moments["state1"].dtype == torch.uint8
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", stop=6, **options)
    assert all(map(torch.equal, weights(full_run), weights(train(tmp_path / "stopped", **options))))
    adamw = train(tmp_path / "adamw", side=80, lr=0.01)
    assert abs(metrics(tmp_path / "uninterrupted")[-1]["loss"] / metrics(tmp_path / "adamw")[-1]["loss"] - 1) < 0.1
    assert not torch.equal(adamw.parameters[0], full_run.parameters[0])


def small_network() -> nn.Module:
    """With a weight of each kind that an optimizer treats in its own way."""
    conv = nn.Conv2d(2, 2, 3, padding=1)
    return nn.Sequential(nn.Linear(4, 8), nn.Unflatten(1, (2, 2, 2)), conv, nn.Flatten(), nn.Linear(8, 4))


OPTIMIZERS = {"prodigy": 1.0, "schedulefree": 0.1, "muon": 0.05, "adafactor": 0.05, "lion": 0.02}  # with an lr


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_resume_with_any_optimizer_equals_uninterrupted(tmp_path: Path, optimizer: str) -> None:
    """Weights, averages, and all that the optimizer keeps: tensors, counters, step sizes."""
    options: dict[str, Any] = {"optimizer": optimizer, "lr": OPTIMIZERS[optimizer], "network": small_network}
    full_run = train(tmp_path / "uninterrupted", **options)
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", stop=6, **options)
    resumed = train(tmp_path / "stopped", **options)
    assert all(map(torch.equal, weights(full_run), weights(resumed)))
    (_, tensors, groups), (_, tensors_after, groups_after) = full_run._engine.state(), resumed._engine.state()
    assert tensors.keys() == tensors_after.keys()
    assert all(torch.equal(tensor, tensors_after[name]) for name, tensor in tensors.items())
    assert json.loads(json.dumps(groups, allow_nan=False)) == json.loads(json.dumps(groups_after))
    lines = metrics(tmp_path / "uninterrupted")
    assert lines == metrics(tmp_path / "stopped")
    assert optimizer == "prodigy" or lines[-1]["loss"] < lines[0]["loss"]  # whose first steps are tiny


def test_schedule_free_weights_are_the_mean_of_its_iterates(tmp_path: Path) -> None:
    """x is the mean of z, weighted by the squared learning rate; y = (1 − β) z + β x is trained; x is exported."""
    run = train(tmp_path, keep=99, optimizer="schedulefree", steps=6, checkpoint_every=1)
    rates = [0.1 * min(1, (step + 1) / 2) for step in range(6)]
    total = torch.zeros(4, 4, dtype=torch.float64)
    for i, folder in enumerate(checkpoints(tmp_path / "stage1")):
        parts, _ = read_checkpoint(folder)
        z, y = parts["optimizer"]["0.z"].double(), parts["model"]["weight"].double()
        total += rates[i] ** 2 * z
        x = total / sum(rate**2 for rate in rates[: i + 1])
        torch.testing.assert_close(parts["ema"]["weight"].double(), x, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(y, 0.1 * z + 0.9 * x, rtol=1e-5, atol=1e-6)
    before = run.module.weight.detach().clone()
    with run.ema_weights("a test"):
        torch.testing.assert_close(run.module.weight.double(), x, rtol=1e-5, atol=1e-6)
    assert torch.equal(run.module.weight, before)
    torch.testing.assert_close(run.export_ema().weight.double(), x, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(before.double(), x, rtol=1e-4)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_data_loader_workers_too_stops_the_run_only_once(tmp_path: Path, number: int) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, stop=6, workers=1, number=number)
    assert [folder.name for folder in checkpoints(tmp_path / "stage1")] == ["step-000004", "step-000007"]


def test_a_signal_at_the_last_step_stops_the_run_too(tmp_path: Path) -> None:
    for stop in (11, 12):  # the run ends after step 12; after its checkpoint
        with pytest.raises(SystemExit):
            train(tmp_path / str(stop), stop=stop)
        assert train(tmp_path / str(stop)).step == 12


def test_accumulated_passes_give_the_same_step(tmp_path: Path) -> None:
    single_pass, accumulated = train(tmp_path / "single"), train(tmp_path / "accumulated", device_batch=1)
    for a, b in zip(weights(single_pass), weights(accumulated), strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def test_a_damaged_checkpoint_is_reported_and_the_previous_one_used(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = weights(train(tmp_path))
    newest = tmp_path / "stage1/checkpoints/step-000012/ema.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    resumed = train(tmp_path, keep=1)
    assert "step-000012 is damaged" in (stderr := capsys.readouterr().err)
    assert "continuing from step 8 of 12" in stderr
    assert all(map(torch.equal, expected, weights(resumed)))
    folders = {path.name.partition("-")[0]: path for path in (tmp_path / "stage1/checkpoints").iterdir()}
    assert folders["step"].name == "step-000012"
    read_checkpoint(folders["step"])  # written again
    assert folders["damaged"].name.startswith("damaged-step-000012")


def test_a_clock_that_jumps_changes_neither_weights_nor_which_checkpoint_is_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = weights(train(tmp_path / "steady"))
    jumps = random.Random(0)
    monkeypatch.setattr(time, "time", lambda: jumps.uniform(0, 4e9))
    with pytest.raises(SystemExit):
        train(tmp_path / "jumping", stop=6)
    for age, checkpoint in enumerate(checkpoints(tmp_path / "jumping/stage1")):  # the older, the later by its times
        os.utime(checkpoint, (2e9 - age, 2e9 - age))
    assert all(map(torch.equal, expected, weights(train(tmp_path / "jumping"))))
    assert "continuing from step 7 of 12" in capsys.readouterr().err


def test_a_run_of_an_older_version_continues_and_keeps_its_metrics(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, stop=6)
    before = metrics(tmp_path)
    file = checkpoints(tmp_path / "stage1")[-1] / "state.json"
    state = json.loads(file.read_text())
    for name in ("metrics_bytes", "skipped", "in_a_row"):
        del state[name]
    file.write_text(json.dumps(state))
    assert train(tmp_path).step == 12
    assert metrics(tmp_path)[: len(before)] == before


def test_a_run_that_began_with_another_order_of_images_says_so_once_and_continues(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = "stage1: the version that began this run ordered images differently; "
    with pytest.raises(SystemExit):
        train(tmp_path, stop=6)
    file = checkpoints(tmp_path / "stage1")[-1] / "state.json"
    state = json.loads(file.read_text())
    assert state.pop("order") == ORDER
    file.write_text(json.dumps(state))
    with pytest.raises(SystemExit):
        train(tmp_path, stop=9)
    assert capsys.readouterr().err.count(line) == 1
    assert train(tmp_path).step == 12
    assert line not in capsys.readouterr().err


def test_checkpoints_are_ordered_by_number(tmp_path: Path) -> None:
    for step in (999_500, 1_000_000):
        (tmp_path / f"checkpoints/step-{step:06d}").mkdir(parents=True)
    assert [path.name for path in checkpoints(tmp_path)] == ["step-999500", "step-1000000"]


def test_only_the_newest_checkpoints_are_kept_and_hold_no_pickle(tmp_path: Path) -> None:
    train(tmp_path)
    folders = sorted((tmp_path / "stage1/checkpoints").iterdir())
    assert [folder.name for folder in folders] == ["step-000008", "step-000012"]
    assert {path.suffix for folder in folders for path in folder.iterdir()} == {".safetensors", ".json"}
    parts, state = read_checkpoint(folders[-1])
    assert state["step"] == 12
    assert parts["optimizer"].keys() >= {"0.exp_avg", "1.exp_avg_sq"}


def test_a_checkpoint_for_other_latents_is_refused_with_both_values(tmp_path: Path) -> None:
    train(tmp_path)
    with pytest.raises(UserError, match=r"\[4\].*\[8\]"):
        Trainer(
            RunConfig(dir=tmp_path, precision="no", device="cpu", tracker="none"),
            Training(),
            "stage1",
            nn.Linear(4, 4),
            {"shape": [8]},
        )


def test_the_averaged_weights_equal_the_exponential_average(tmp_path: Path) -> None:
    """diffusers' EMAModel: the decay after update n is min(ema, (1 + n) / (10 + n)), and 0 for the first."""
    runs = [train(tmp_path / str(steps), steps=steps) for steps in range(1, 6)]
    averaged = [p.detach() for p in runs[0].parameters]
    for n, run in enumerate(runs[1:], start=1):
        decay = min(0.5, (1 + n) / (10 + n))
        averaged = [decay * a + (1 - decay) * p.detach() for a, p in zip(averaged, run.parameters, strict=True)]
    torch.testing.assert_close(runs[-1].ema.main.shadow_params, averaged)


def test_a_killed_run_has_the_same_averages_and_snapshots_as_an_uninterrupted_one(tmp_path: Path) -> None:
    widths = {"ema_widths": (0.05, 0.2), "ema_snapshot_every": 3}
    full_run = train(tmp_path / "uninterrupted", **widths)
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", stop=6, **widths)
    shutil.rmtree(tmp_path / "stopped/stage1/checkpoints/step-000007")  # as if killed: it continues from step 4
    resumed = train(tmp_path / "stopped", **widths)
    assert all(map(torch.equal, weights(full_run), weights(resumed)))
    for folder in (tmp_path / "uninterrupted", tmp_path / "stopped"):
        parts, _ = read_checkpoint(checkpoints(folder / "stage1")[-1])
        assert parts["ema"].keys() == parts["ema-0.2"].keys() == {"weight", "bias"}
    names = [f"step-{step:06d}-{width}.safetensors" for step in (3, 6, 9, 12) for width in (0.05, 0.2)]
    assert sorted(path.name for path in (tmp_path / "stopped/stage1/ema").iterdir()) == names
    for name in names:
        first, second = (tmp_path / folder / "stage1/ema" / name for folder in ("uninterrupted", "stopped"))
        assert first.read_bytes() == second.read_bytes(), name


def test_ema_weights_are_the_average_of_the_first_width(tmp_path: Path) -> None:
    run = train(tmp_path, ema_widths=(0.2, 0.05))
    before, average = weights(run), run.ema.models[0].shadow_params[0].clone()
    with run.ema_weights("a test"):
        assert torch.equal(run.module.weight, average)
        assert not torch.equal(run.module.weight, before[0])
    assert all(map(torch.equal, weights(run), before))


def test_a_nonfinite_step_is_skipped_logged_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The optimizer has taken a step fewer than the run."""
    run = train(tmp_path / "run", bad=(5,))
    assert "a loss or gradient is not finite at step 6, of sample 22; the step is skipped" in capsys.readouterr().out
    optimizer = run._engine.optimizer.state_dict()["state"][0]
    assert (run.step, run.nonfinite.total, int(optimizer["step"])) == (12, 1, 11)
    assert all(tensor.isfinite().all() for tensor in weights(run))
    lines = metrics(tmp_path / "run")
    assert all(math.isfinite(value) for line in lines for value in line.values())
    assert [line.get("skipped") for line in lines] == [None, 1, 1, 1]


def test_skipped_samples_are_logged_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(tmp_path, bad=(5,), keys=True, steps=6)
    assert "not finite at step 6, of sample 22, 22.png; the step is skipped" in capsys.readouterr().out


def test_metrics_have_the_speed_and_from_the_second_line_the_utilisation(tmp_path: Path) -> None:
    train(tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "stage1/metrics.jsonl").read_text().splitlines()]
    assert all(line["images_per_second"] > 0 and 0 <= line["waiting"] <= 1 for line in lines)
    assert [line.get("mfu", 0) > 0 for line in lines] == [False, True, True, True]


def test_samples_and_snapshots_later_than_the_resumed_step_are_deleted(tmp_path: Path) -> None:
    later = [tmp_path / "stage1/samples/step-000009.png", tmp_path / "stage1/ema/step-000009-0.1.safetensors"]
    earlier = tmp_path / "stage1/samples/step-000003.png"
    for path in (*later, earlier):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    with pytest.raises(SystemExit):  # starts at step 0, without a checkpoint: all are deleted
        train(tmp_path, stop=6)
    assert not any(path.exists() for path in (*later, earlier))
    for path in (*later, earlier):
        path.touch()
    train(tmp_path, steps=8)
    assert not any(path.exists() for path in later)
    assert earlier.exists()


def test_a_skipped_step_is_skipped_again_after_a_resume(tmp_path: Path) -> None:
    full_run = train(tmp_path / "uninterrupted", bad=(5, 6))
    with pytest.raises(SystemExit):
        train(tmp_path / "stopped", stop=5, bad=(5, 6))  # the checkpoint is of step 6, which was skipped
    resumed = train(tmp_path / "stopped", bad=(5, 6))
    assert all(map(torch.equal, weights(full_run), weights(resumed)))
    assert metrics(tmp_path / "uninterrupted") == metrics(tmp_path / "stopped")


def test_too_many_skipped_steps_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"step 10, of sample 38; 3 steps in a row .*step-000008 stands"):
        train(tmp_path, bad=(2, 3, 7, 8, 9), max_skipped=3)
    for folder in checkpoints(tmp_path / "stage1"):
        parts, _ = read_checkpoint(folder)
        assert all(tensor.isfinite().all() for tensor in parts["model"].values())


def test_a_stop_by_skipped_steps_names_the_keys_of_its_command(tmp_path: Path) -> None:
    for stage, remedy in (
        ("stage1", "Raise run.max_skipped to go on, or mend these samples or lower stage1.lr and start with --fresh"),
        ("classifier", "Mend these samples or lower lr and give another --out"),
    ):
        with pytest.raises(UserError) as caught:
            train(tmp_path / stage, bad=(0, 1), max_skipped=2, stage=stage)
        assert str(caught.value).endswith(f"there is no checkpoint yet. {remedy}")


def test_a_metric_that_is_not_finite_is_null_in_its_line_of_json(tmp_path: Path) -> None:
    logger = MetricsLogger(tmp_path / "metrics.jsonl", accelerator(RunConfig(device="cpu", tracker="none")))
    logger.add([{"loss": torch.tensor(2.0), "accuracy": torch.tensor(math.nan)}])
    logger.write(3, logger.pop_means())

    def no_json(constant: str) -> float:
        raise ValueError(constant)

    line = json.loads(logger.path.read_text(), parse_constant=no_json)
    assert (line["step"], line["loss"], line["accuracy"]) == (3, 2.0, None)


@pytest.fixture
def scaler(monkeypatch: pytest.MonkeyPatch) -> torch.amp.GradScaler:
    """A gradient scaler of `train`'s losses, 4 at first; accelerate has one (for fp16) on a GPU only."""
    grad_scaler = torch.amp.GradScaler("cpu", init_scale=4.0)

    def with_scaler(*args: object) -> Accelerator:
        built = accelerator(*args)
        built.scaler = grad_scaler
        built.unscale_gradients = lambda optimizer: grad_scaler.unscale_(optimizer.optimizer)
        return built

    monkeypatch.setattr(ldm.training.trainer, "accelerator", with_scaler)
    return grad_scaler


def test_a_too_high_loss_scale_is_lowered_and_not_counted_as_a_skip(
    tmp_path: Path, scaler: torch.amp.GradScaler
) -> None:
    run = train(tmp_path, steep=(2, 3))
    assert (run.nonfinite.total, run.ema.updates, scaler.get_scale()) == (0, 10, 1.0)


def test_every_optimizer_skips_the_steps_that_the_loss_scale_overflows(
    tmp_path: Path, scaler: torch.amp.GradScaler
) -> None:
    for optimizer, lr in OPTIMIZERS.items():
        scaler.load_state_dict({**scaler.state_dict(), "scale": 4.0})
        run = train(tmp_path / optimizer, steep=(2, 3), optimizer=optimizer, lr=lr, network=small_network)
        assert (run.nonfinite.total, run.ema.updates, scaler.get_scale()) == (0, 10, 1.0), optimizer
        first = 1 if optimizer == "prodigy" else 0  # where it counts from
        assert {group["step"] - first for group in run._engine.optimizer.param_groups} == {10}
        assert all(tensor.isfinite().all() for tensor in weights(run))


def test_gradients_that_are_nonfinite_at_any_scale_stop_the_run(tmp_path: Path, scaler: torch.amp.GradScaler) -> None:
    with pytest.raises(UserError, match=r"step 7, of sample 24, .* 3 steps in a row"):
        train(tmp_path, steep=tuple(range(2, 12)), max_skipped=3)


def test_a_nonfinite_loss_is_skipped_even_if_its_gradient_is_finite(
    tmp_path: Path, scaler: torch.amp.GradScaler, monkeypatch: pytest.MonkeyPatch
) -> None:
    backward = Trainer.backward

    def overflow(run: Trainer, loss: torch.Tensor) -> None:
        backward(run, loss)
        run._losses[-1] = loss.detach() / (run.step != 5)

    monkeypatch.setattr(Trainer, "backward", overflow)
    run = train(tmp_path)
    steps = run._engine.optimizer.state_dict()["state"][0]["step"]
    assert (run.nonfinite.total, int(steps), run.ema.updates) == (1, 11, 11)


def test_a_nonfinite_gradient_of_extra_parameters_is_detected() -> None:
    class WithExtraParameters(nn.Linear):
        @property
        def extra_parameters(self) -> list[nn.Parameter]:
            return [self.bias]

    engine = Engine(WithExtraParameters(2, 2), 0.1, Training(), Accelerator(cpu=True), "no")
    engine.module(torch.ones(1, 2)).sum().backward()
    assert engine.clip_gradients().isfinite()
    engine.module.bias.grad.fill_(torch.nan)
    assert not engine.clip_gradients().isfinite()


def test_sigusr1_saves_and_continues(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full_run = train(tmp_path / "uninterrupted")
    signalled = train(tmp_path / "signalled", stop=5, number=signal.SIGUSR1, keep=9)
    assert "stage1: saved at step 6." in capsys.readouterr().out
    assert [folder.name[-2:] for folder in checkpoints(tmp_path / "signalled/stage1")] == ["04", "06", "08", "12"]
    assert all(map(torch.equal, weights(full_run), weights(signalled)))


@pytest.mark.usefixtures("capsys")  # keeps output out of files, which the limit covers too
def test_a_full_disk_is_reported_in_one_line_and_the_last_checkpoint_kept(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a full disk: the weights no longer fit."""
    full_run = train(tmp_path / "uninterrupted")
    with pytest.raises(SystemExit):
        train(tmp_path / "full", stop=6)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=r"can't write .*step-000008: File too large; make room"):
            train(tmp_path / "full", log_every=100, finish_writes=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert {path.name for path in (tmp_path / "full/stage1/checkpoints").iterdir()} == {"step-000004", "step-000007"}
    resumed = train(tmp_path / "full")
    assert all(map(torch.equal, weights(full_run), weights(resumed)))


def test_a_checkpoint_that_is_written_later_has_the_state_of_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training goes on meanwhile, as far as the next checkpoint, which waits for the one before."""
    write, spans = CheckpointManager.write, list[tuple[int, float, float]]()

    def write_slowly(manager: CheckpointManager, step: int, *more: Any) -> None:
        start = time.monotonic()
        time.sleep(0.1)
        write(manager, step, *more)
        spans.append((step, start, time.monotonic()))

    full_run = train(tmp_path / "uninterrupted")
    monkeypatch.setattr(CheckpointManager, "write", write_slowly)
    train(tmp_path / "killed")
    assert [step for step, *_ in spans] == [4, 8, 12]
    assert all(end <= start for (*_, end), (_, start, _) in itertools.pairwise(spans))
    shutil.rmtree(tmp_path / "killed/stage1/checkpoints/step-000012")
    resumed = train(tmp_path / "killed")
    assert all(map(torch.equal, weights(full_run), weights(resumed)))
    assert metrics(tmp_path / "uninterrupted") == metrics(tmp_path / "killed")


@pytest.mark.usefixtures("capsys")  # keeps output out of files, which the limit covers too
def test_a_failed_write_ends_the_training_before_the_next_checkpoint(tmp_path: Path) -> None:
    passes: list[int] = []

    class Counted(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            passes.append(len(x))
            return super().forward(x)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(UserError, match=r"can't write .*step-000500: File too large; make room"):
            train(tmp_path, network=lambda: Counted(4, 4), steps=1000, checkpoint_every=500, log_every=10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert 500 < len(passes) < 1000


@pytest.mark.slow
def test_two_processes_report_a_failed_write_and_the_main_one_alone_checks_what_both_continue_from(
    tmp_path: Path, launch: Callable[..., ScriptProcess], finish: Callable[[ScriptProcess], str]
) -> None:
    lines = finish(launch("tests/ldm/training/full_disk.py", tmp_path, processes=2)).splitlines()
    files = ["ema.safetensors", "model.safetensors", "optimizer.safetensors"]
    assert f"0 checked {files} after 3 files" in lines and "1 checked [] after 0 files" in lines
    for rank in (0, 1):
        (report,) = (line for line in lines if line.startswith(f"{rank} reported"))
        assert re.search("can't write .*step-000012: File too large; make room", report)
        assert f"{rank} has ['step-000004', 'step-000008']" in lines


@pytest.mark.slow
def test_processes_with_different_data_are_refused_by_all(tmp_path: Path, launch: Callable[..., ScriptProcess]) -> None:
    (tmp_path / "other.py").write_text(
        "import os, sys\n"
        "from pathlib import Path\n"
        "from torch import nn\n"
        "from ldm.utils.errors import UserError\n"
        "from ldm.training.trainer import Trainer\n"
        "from ldm.config.schema import RunConfig, Training\n"
        "run = RunConfig(dir=Path(sys.argv[1]), device='cpu', precision='no', tracker='none')\n"
        "rank = os.environ['RANK']\n"
        "try:\n"
        "    Trainer(run, Training(batch=4), 'stage2', nn.Linear(2, 2), {'data': rank})\n"
        "except UserError as error:\n"
        "    print(rank, 'reported:', error, flush=True)\n"
    )
    output, _ = launch(tmp_path / "other.py", tmp_path, processes=2).communicate(timeout=240)
    message = "stage2: process 1 has other images, captions or latents than process 0 (data: 0 → 1)"
    assert all(f"{rank} reported: {message}" in output for rank in (0, 1)), output
