"""What a run will take, printed before it begins."""

import json
import re
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from forked import ScriptProcess
from safetensors.torch import load_file
from tiny import TINY

import train_ldm
from ldm.config.loader import Config, load
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.models import text_encoder
from ldm.training import budget, planned_steps, preflight
from ldm.training.checkpoint import steps_done
from ldm.training.planned_steps import adjust_steps, plan_steps
from ldm.training.resource_estimate import ResourceEstimate
from ldm.training.run_dir import prepare_run_dir
from ldm.training.trainer import Trainer
from ldm.utils import cpu_load
from ldm.utils.errors import UserError
from stage1_vae import train as stage1
from stage1_vae.objective import Objective

pytestmark = pytest.mark.slow
Launch = Callable[..., ScriptProcess]


def test_a_dry_run_measures_both_stages_and_trains_nothing(
    root: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    arguments = [
        *TINY,
        "--dry-run",
        f"run.dir={folder}",
        "stage1.gan.layers=2",
        "stage1.gan.warmup=5",
        f"data.cache_dir={tiny_run / 'cache'}",
    ]
    assert train_ldm.main(arguments) == 0
    output = capsys.readouterr().out
    for stage in ("stage1", "stage2"):
        measured = rf"measured {stage}: [\d,.]+ images/s in global batches of 8, [\d,.]+ [MG]B of memory .* of disk"
        assert re.search(measured, output), output
    assert re.search(r"\nin all: .+, [\d,.]+ [MG]B of memory, [\d,.]+ [MG]B of disk\n$", output), output
    assert "cache: " not in output
    assert not folder.exists()


def test_a_start_measures_once_and_ends_with_the_same_weights(
    tiny_run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """test_two_stages holds that the weights are the same, against runs without a preflight."""
    needs = json.loads((tiny_run / "preflight.json").read_text())
    assert needs["stage2"]["needs"]["step"] > 0
    settings = load(root / "configs/tiny.yaml")
    state = 4 * 4 * settings.run.checkpoints_total_limit  # bytes of a parameter in that many checkpoints
    unet = load_file(tiny_run / "pipeline/unet/diffusion_pytorch_model.safetensors")
    assert needs["stage2"]["needs"]["disk"] > sum(tensor.numel() for tensor in unet.values()) * state
    arguments = [*TINY, "--dry-run", f"run.dir={tiny_run}"]
    assert train_ldm.main(arguments) == 0
    assert "measured" not in capsys.readouterr().out  # nothing is left to train


def test_where_memory_is_short_nothing_is_tried(
    root: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=3_400_000))
    arguments = [
        "--config",
        str(root / "configs/tiny.yaml"),
        "--dry-run",
        f"run.dir={tmp_path / 'run'}",
        f"data.cache_dir={tiny_run / 'cache'}",
        "stage1.steps=1",
    ]
    assert train_ldm.main(arguments) == 0
    assert "stage2: not measured: it needs more than 33 MB of memory, and 3 MB are free here" in capsys.readouterr().out


OUT_OF_MEMORY = """
import sys, torch
sys.path.insert(0, ".")
from ldm.config import loader
from ldm.data import index
from ldm.distributed.launch import join
from ldm.training import preflight
from ldm.utils.errors import UserError

settings = loader.load("configs/tiny.yaml", [f"run.dir={sys.argv[1]}", f"data.cache_dir={sys.argv[1]}"])
state = join(settings.run)

def train(*_):
    if state.process_index == 1:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried")
    torch.distributed.all_reduce(torch.ones(1))

try:
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    preflight.measure(settings, "stage1", data, train)
except UserError as error:
    print("error:", error, flush=True)
    sys.exit(2)
"""


def test_a_process_that_is_out_of_memory_does_not_wait_for_the_others(launch: Launch, tmp_path: Path) -> None:
    (tmp_path / "out_of_memory.py").write_text(OUT_OF_MEMORY)
    process = launch(tmp_path / "out_of_memory.py", tmp_path, processes=2)
    output, _ = process.communicate(timeout=60)
    assert process.returncode
    assert "error: stage1: the model does not fit in the memory of the device (CUDA out of memory); set" in output


def test_a_dry_run_of_two_processes_prints_once_and_leaves_nothing(
    launch: Launch,
    finish: Callable[..., str],
    environment: dict[str, str],
    tiny_run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(environment, "TMPDIR", str(tmp_path))
    output = finish(
        launch(
            "train_ldm.py",
            *TINY,
            "--dry-run",
            f"run.dir={tmp_path / 'run'}",
            f"data.cache_dir={tiny_run / 'cache'}",
            "--stage",
            "1",
            processes=2,
        )
    )
    assert output.count("stage 1  kl") == output.count("measured stage1: ") == 1
    assert not [*tmp_path.glob("ldm-*"), *tmp_path.glob("run")]


def test_a_validation_counts_for_all_its_images(drawings: Callable[..., tuple[Config, Index]]) -> None:
    settings, index = drawings("data.val_fraction=0.4", "stage2.evaluate_images=40")
    held, few = len(index.select(*HELD_OUT)), preflight._few(index, 16)
    assert held > 40
    assert len(few.select(*HELD_OUT)) == 32
    assert preflight._validation_images(settings, "stage1", index) == held
    assert preflight._validation_images(settings, "stage2", index) == 80
    assert preflight._validation_images(settings, "stage2", few) == 32 + 16


def test_the_whole_stage_is_counted_from_a_step_and_a_validation(root: Path) -> None:
    settings = load(
        root / "configs/openmoji.yaml", ["stage2.steps=1000", "stage2.evaluate_every=300", "sample.every=500"]
    )
    needs = ResourceEstimate(
        step=0.5, validation=10, sheet=15, encoding=60, memory=1_500_000_000, disk=120_000_000, device="a GPU"
    )
    assert needs.describe(settings, "stage2") == (
        f"measured stage2: {2 * settings.stage2.batch} images/s in global batches of {settings.stage2.batch}, "
        "1.5 GB of memory on a GPU; encoding takes 60 s, 1000 steps take 8 min, 4 × validation 40 s, 2 × samples 30 s: "
        "10 min in all, and 120 MB of disk"
    )


def test_stages_together_take_the_sum_of_their_times_and_the_larger_memory(root: Path, tmp_path: Path) -> None:
    settings = load(root / "configs/openmoji.yaml", [f"run.dir={tmp_path}", "stage1.steps=1000", "stage2.steps=1000"])
    assert preflight.describe_total(settings, ["stage1", "stage2"]) == ""
    needs = {"validation": 0, "sheet": 0, "encoding": 0, "disk": 10_000_000, "device": "a GPU"}
    measured = {
        stage: {"about": preflight._cache_key(settings, stage), "needs": {**needs, "step": step, "memory": memory}}
        for stage, step, memory in (("stage1", 0.06, 2_000_000_000), ("stage2", 0.3, 1_500_000_000))
    }
    (tmp_path / preflight.FILE).write_text(json.dumps(measured))
    assert preflight.describe_total(settings, ["stage1", "stage2"]) == (
        "in all: 6 min, 2.0 GB of memory, 20 MB of disk"
    )
    assert preflight.describe_total(settings, ["stage2"]) == "in all: 5 min, 1.5 GB of memory, 10 MB of disk"
    assert preflight.describe_total(settings, []) == ""
    more, other = (
        load(root / "configs/openmoji.yaml", [f"run.dir={tmp_path}", key])
        for key in ("stage2.steps=2000", "stage2.batch=32")
    )
    assert preflight.describe_total(more, ["stage2"]) == "in all: 10 min, 1.5 GB of memory, 10 MB of disk"
    assert preflight.describe_total(other, ["stage2"]) == ""


@pytest.mark.parametrize(
    ("where", "activity", "remedy"),
    [
        ("stage2_diffusion.train.Objective.losses", "a training step", "lower stage2.device_batch, or set"),
        ("stage2_diffusion.validation.Validation._errors", "a validation", "lower stage2.device_batch, which"),
        pytest.param(
            "stage2_diffusion.samples._generate",
            "a sample grid",
            "lower stage2.device_batch, which it follows",
            marks=pytest.mark.drill,
        ),
        ("ldm.data.cache.CropDataset.__getitem__", "encoding the data", "free the GPU of other programs"),
    ],
)
def test_what_does_not_fit_is_named(
    root: Path,
    tiny_run: Path,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    where: str,
    activity: str,
    remedy: str,
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.4 GiB")

    monkeypatch.setattr(where, full)
    arguments = [
        *TINY,
        "--dry-run",
        "--stage",
        "2",
        f"run.dir={tmp_path / 'run'}",
        f"stage1.pretrained={tiny_run / 'autoencoder'}",
        f"data.cache_dir={drawn}",
    ]
    assert train_ldm.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: stage2: {activity} does not fit in the memory of the device (CUDA out of memory); {remedy}" in error


def test_what_does_not_fit_is_not_named_after_the_stage_before(
    root: Path, tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.4 GiB")

    monkeypatch.setattr("stage2_diffusion.train.use_attention", full)  # before there is a run
    arguments = [*TINY, "--dry-run", f"run.dir={tmp_path / 'run'}", f"data.cache_dir={tiny_run / 'cache'}"]
    assert train_ldm.main(arguments) == 2
    output = capsys.readouterr()
    assert "measured stage1: " in output.out
    assert "error: stage2: the model does not fit in the memory of the device" in output.err.splitlines()[-1]


@pytest.mark.parametrize("fails", [False, True])
def test_nothing_of_what_was_measured_is_left(
    drawings: Callable[..., tuple[Config, Index]], monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    created: list[weakref.ref[object]] = []
    start, add_latent_losses = stage1.start, Objective.add_latent_losses

    def recorded_start(*args: Any) -> Any:
        vae = start(*args)
        created.append(weakref.ref(vae))
        return vae

    def failing_losses(*args: Any) -> Any:
        if fails:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 6.4 GiB")
        return add_latent_losses(*args)

    class RecordedTrainer(Trainer):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            created.extend(map(weakref.ref, (self, *self.parameters, *self.ema.main.shadow_params)))

    monkeypatch.setattr(stage1, "start", recorded_start)
    monkeypatch.setattr(Objective, "add_latent_losses", failing_losses)
    monkeypatch.setattr(stage1, "Trainer", RecordedTrainer)
    settings, index = drawings(
        "stage1.channels=[16, 16]", "stage1.groups=8", "stage1.gan.layers=1", "stage1.gan.warmup=5"
    )
    with pytest.raises(UserError, match="a training step does not fit") if fails else nullcontext():
        preflight.measure(settings, "stage1", index, stage1.train)
    assert len(created) > 10
    assert {reference() for reference in created} == {None}
    assert not (settings.run.dir / ".preflight").exists()


@pytest.mark.parametrize(
    ("overrides", "activity", "remedy"),
    [
        ([], "the model", "set stage1.optimizer=adamw8bit, or take a smaller stage1.model"),
        ([], "a validation", "take a smaller stage1.model or data.size"),
        ([], "a training step", "lower stage1.device_batch, or set stage1.gradient_checkpointing=true"),
        (["stage1.model=vq-f4"], "a training step", "lower stage1.device_batch"),
    ],
)
def test_remedies_are_those_of_stage_one(root: Path, overrides: list[str], activity: str, remedy: str) -> None:
    settings = load(root / "configs/openmoji.yaml", overrides)
    assert preflight._too_large(settings, "stage1", activity, "CUDA out of memory").endswith(f"; {remedy}")


@pytest.mark.parametrize(
    ("conditions", "sheet"), [("[text]", 2 * 70), ("[class]", 70), ("[]", 70), ("[text, inpaint]", 70)]
)
def test_a_sheet_counts_for_its_images_and_denoising_for_its_steps(
    root: Path, tmp_path: Path, conditions: str, sheet: float
) -> None:
    prompts = [f"image {i}" for i in range(16)]
    settings = load(
        root / "configs/openmoji.yaml",
        [f"stage2.conditions={conditions}", "stage2.pooled_text=false", f"sample.prompts={prompts}", "sample.steps=12"],
    )
    small = preflight._small(settings, "stage2", tmp_path)
    assert len(small.sample.prompts) == 8 and small.sample.steps == 2
    # 20 s, of which 5 s are the second step's: ten more steps take 50 s, and decoding what it took
    assert preflight._sheet(settings, small, 20.0, 5.0, 1) == sheet
    assert preflight._sheet(small, small, 20.0, 5.0, 1) == 20


def test_a_kept_estimate_is_not_used_for_other_sheets(root: Path) -> None:
    def cache_key(stage: str, *overrides: str) -> dict[str, Any]:
        return preflight._cache_key(load(root / "configs/openmoji.yaml", list(overrides)), stage)

    for other in ("prompts=[]", "steps=3", "solver=euler", "guidance=1"):
        assert cache_key("stage2", f"sample.{other}") != cache_key("stage2")
        assert cache_key("stage1", f"sample.{other}") == cache_key("stage1")
    assert cache_key("stage2", "sample.every=3") == cache_key("stage2")


def test_encoding_is_shared_by_as_many_processes_as_there_are_files(
    drawings: Callable[..., tuple[Config, Index]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, index = drawings()
    assert preflight._encoders(settings, index, 8) == 1
    monkeypatch.setattr("ldm.data.cache.PER_FILE", 100)
    assert preflight._encoders(settings, index, 8) == min(8, -(-len(index) // 100))
    assert preflight._encoders(settings, index, 2) == 2


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_a_budget_is_planned_once_for_a_run(
    tiny_run: Path,
    tmp_path: Path,
    two_threads: None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cpu_load, "threads_with_a_core", lambda threads: 1)  # the others are busy
    monkeypatch.setattr(budget, "seconds_since_start", lambda: 10.0)  # not of the process of all tests
    overrides = [*TINY[2:], f"run.dir={tmp_path / 'run'}", f"data.cache_dir={tiny_run / 'cache'}"]
    settings = load(Path(TINY[1]), overrides)
    encoder = text_encoder.of(settings.text)
    parts = partial(train_ldm.load_data, settings, encoder), partial(train_ldm.measure, settings, encoder)
    planned = plan_steps(settings, 5, ("stage1", "stage2"), *parts)
    assert torch.get_num_threads() == 1
    plan = json.loads((tmp_path / "run/plan.json").read_text())
    assert {name: getattr(planned, name).steps for name in ("stage1", "stage2")} == plan["steps"]
    assert 0.9 * 300 < sum(plan["seconds"].values()) <= 300 and planned != settings
    torch.set_num_threads(2)
    assert plan_steps(settings, 5, ("stage1", "stage2"), *parts) == planned
    assert torch.get_num_threads() == plan["threads"] == 1
    output = capsys.readouterr()
    assert output.out.count("plan     ") == 2
    assert output.err.count("threads  1 of 2: other programs use the other cores") == 1
    assert train_ldm.main(["--config", TINY[1], *overrides, "--budget", "6"]) == 2
    assert "was planned for 5 minutes; give that, or another run.dir" in capsys.readouterr().err
    assert train_ldm.main(["--config", TINY[1], f"run.dir={tiny_run}", *TINY[2:], "--budget", "5"]) == 2
    assert "has begun without a plan; leave it out, or give another run.dir" in capsys.readouterr().err

    metrics = tmp_path / "run/stage1/metrics.jsonl"
    metrics.parent.mkdir()
    begun, per_step = plan["seconds"]["start and plan"], plan["seconds_per_step"]["stage1"]

    def trained(ratio: float) -> None:
        """Stage one took this share of the time that was planned."""
        metrics.write_text(
            json.dumps({"step": 20, "images_per_second": settings.stage1.batch / (ratio * per_step)}) + "\n"
        )

    trained(0.5)  # and something else the other half
    monkeypatch.setattr(budget, "seconds_since_start", lambda: begun + plan["seconds"]["stage1"])
    assert adjust_steps(planned, begun) == planned
    trained(1.5)
    monkeypatch.setattr(budget, "seconds_since_start", lambda: begun + 1.5 * plan["seconds"]["stage1"])
    adjusted = adjust_steps(planned, begun)
    assert adjusted.stage2.steps < 0.8 * planned.stage2.steps
    assert adjusted.stage2.steps == json.loads((tmp_path / "run/plan.json").read_text())["steps"]["stage2"]
    assert "stage 1  steps took 150% of the time that was planned" in capsys.readouterr().out
    assert plan_steps(settings, 5, ("stage1", "stage2"), *parts) == adjusted  # as the same command continues


def test_a_paused_training_ends_with_the_same_weights(
    tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sample sheets and validations at the pause are made once."""

    def trained(name: str, *pauses: int) -> Path:
        given = [f"data.cache_dir={tiny_run / 'cache'}", f"stage1.pretrained={tiny_run / 'autoencoder'}"]
        often = ["sample.every=4", "stage2.evaluate_every=4", "stage2.steps=8"]
        settings = prepare_run_dir(load(Path(TINY[1]), [*TINY[2:], f"run.dir={tmp_path / name}", *given, *often]))
        encoder, waiting = text_encoder.of(settings.text), iter([*pauses, 0])
        monkeypatch.setattr(planned_steps, "pause_after", lambda _: next(waiting))
        monkeypatch.setattr(planned_steps, "adjust_rest", lambda settings, begun: settings)
        data = train_ldm.load_data(settings, encoder)
        assert train_ldm.train_stage2(settings, data, encoder, planned_now=True) == settings
        assert next(waiting, None) is None
        return tmp_path / name

    plain, paused = trained("plain"), trained("paused", 4, 6)
    output = capsys.readouterr()
    assert re.findall(r"stage2: continuing from step (\d) of 8", output.out + output.err) == ["4", "6"]
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    for name, tensor in load_file(plain / weights).items():
        torch.testing.assert_close(load_file(paused / weights)[name], tensor, rtol=0, atol=0)
    validated = [
        [line["step"] for line in map(json.loads, (run / "stage2/metrics.jsonl").open()) if "held_out_loss" in line]
        for run in (plain, paused)
    ]
    assert validated[0] == validated[1] == [4, 8]
    sheets = [sorted(file.name for file in (run / "stage2/samples").iterdir()) for run in (plain, paused)]
    assert sheets[0] == sheets[1] != []


def test_a_signal_at_a_pause_ends_the_run(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = [f"data.cache_dir={tiny_run / 'cache'}", f"stage1.pretrained={tiny_run / 'autoencoder'}", "stage2.steps=4"]
    settings = prepare_run_dir(load(Path(TINY[1]), [*TINY[2:], f"run.dir={tmp_path / 'run'}", *given]))
    encoder = text_encoder.of(settings.text)
    write = Trainer.checkpoint_if_due

    def checkpoint_and_signal(trainer: Trainer) -> None:
        write(trainer)
        if trainer.step == 2:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Trainer, "checkpoint_if_due", checkpoint_and_signal)
    monkeypatch.setattr(planned_steps, "pause_after", lambda _: 2)
    with pytest.raises(SystemExit) as ended:
        train_ldm.train_stage2(settings, train_ldm.load_data(settings, encoder), encoder, planned_now=True)
    assert ended.value.code == 128 + signal.SIGTERM
    assert steps_done(tmp_path / "run/stage2") == 2


def test_a_rest_fills_the_budget_at_the_speed_of_its_own_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load(Path(TINY[1]), [*TINY[2:], f"run.dir={tmp_path}", "stage2.steps=16"])
    need = ResourceEstimate(20.0, validation=0, sheet=0, encoding=0, memory=0, disk=0, device="the CPU")
    monkeypatch.setattr(preflight, "measured", lambda *_: need)
    monkeypatch.setattr(budget, "seconds_since_start", lambda: 200.0)
    monkeypatch.setattr(planned_steps, "steps_done", lambda _: 8)
    budget.Plan(5, {"stage2": 16}, {"stage2": 20.0}, {"saving": 0.0}, "").write(tmp_path)
    assert planned_steps.pause_after(settings) == 8
    for key in ("text.train=true", "stage2.compile=true", "run.tracker=wandb"):
        section, _, name = key.partition("=")[0].partition(".")
        value = {"true": True}.get(key.partition("=")[2], "wandb")
        changed = getattr(settings, section).model_copy(update={name: value})
        assert planned_steps.pause_after(settings.model_copy(update={section: changed})) == 0
    metrics = tmp_path / "stage2/metrics.jsonl"
    metrics.parent.mkdir()
    metrics.write_text(json.dumps({"step": 5, "images_per_second": settings.stage2.batch / 10}))
    assert planned_steps.adjust_rest(settings, begun=0.0).stage2.steps == 8 + 10  # of 10 s, in the 100 s that are left
    output = capsys.readouterr().out
    assert "stage 2  after 8 steps, of 10.00 s\nplan     18 steps, 5 min of 5 minutes" in output
    assert planned_steps.pause_after(settings) == 0  # 100 s are left
