"""Distillation: batches, targets and losses of each method, and the command on a tiny run."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from forked import ScriptProcess
from safetensors.torch import load_file

from ldm.config.schema import Config, DistillConfig, Stage2Config
from ldm.data.index import Index
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import Condition, TextEmbedding, predict
from ldm.models.unet import build, make_guidance_conditioned, remove_variance_channels
from ldm.sampling.few_steps import noise_levels
from ldm.sampling.pipeline import LatentDiffusion
from stage2_diffusion.distillation import train
from stage2_diffusion.distillation.methods import Consistency, Guidance, ProgressiveDistillation

pytestmark = pytest.mark.usefixtures("two_noise_levels")  # of the run that is distilled
STAGE = Stage2Config(
    channels=(8, 8), attention=(False, True), layers=1, attention_head_dim=8, norm_num_groups=4, mid_attention=False
)
QUICK = [
    "steps=4",
    "guidance_steps=4",
    "batch=8",
    "steps_from=8",
    "steps_to=2",
    "evaluate_every=2",
    "checkpoint_every=2",
    "guidance_to=4",
]


@pytest.fixture
def unet() -> Any:
    torch.manual_seed(0)
    return build(STAGE, 4, 8, text_width=16)


def method_and_batch(kind: Any, unet: Any, target: str = "flow", *args: Any, **settings: Any) -> tuple[Any, Any]:
    """A distillation method and its batch of three latents."""
    process = DiffusionProcess(target, zero_snr=target == "v")
    g = torch.Generator().manual_seed(1)
    text, x0, null = (torch.randn(*shape, generator=g) for shape in ((3, 5, 16), (3, 4, 8, 8), (5, 16)))
    method = kind(unet, process, DistillConfig(guidance_to=4.0, **settings), 0, TextEmbedding(null[None]), None, *args)
    return method, method.make_batch(torch.arange(3), x0, Condition(text))


def test_a_guidance_conditioned_student_starts_with_its_teachers_output(unet: Any) -> None:
    x, t, text = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 500.0, 999.0]), torch.randn(3, 5, 16)
    before = predict(unet, x, t, Condition(text))
    make_guidance_conditioned(unet)
    assert torch.equal(predict(unet, x, t, Condition(text, guidance=torch.tensor([1.0, 2.5, 4.0]))), before)
    unet.time_embedding.cond_proj.weight.data.normal_()
    make_guidance_conditioned(unet)  # keeps the learned projection
    assert not torch.equal(predict(unet, x, t, Condition(text, guidance=torch.tensor([1.0, 2.5, 4.0]))), before)


def test_the_guidance_target_is_the_guided_teacher_and_at_scale_1_the_conditional_one(unet: Any) -> None:
    method, batch = method_and_batch(Guidance, unet)
    text, w = batch.condition.text, batch.condition.guidance
    assert (w >= 1).all() and (w < 4).all() and len(set(w.tolist())) == 3
    conditional, unconditional = (
        predict(unet, batch.z, batch.model_time, Condition(e)) for e in (text, method.null.states.expand(3, 5, 16))
    )
    torch.testing.assert_close(
        method.target(batch, None), unconditional + w[:, None, None, None] * (conditional - unconditional)
    )
    ones = batch._replace(condition=Condition(text, guidance=torch.ones(3)))
    torch.testing.assert_close(method.target(ones, None), conditional)
    assert torch.equal(method.losses(conditional, ones, conditional), torch.zeros(3))


@pytest.mark.parametrize("target", ["flow", "v", "x0"])
def test_progressive_distillation_uses_the_students_timesteps_and_has_no_loss_at_the_target(
    unet: Any, target: str
) -> None:
    method, batch = method_and_batch(ProgressiveDistillation, unet, target, 4)
    process, steps = method.process, noise_levels(method.process, 4)
    assert torch.equal(batch.model_time, steps.model_time[batch.at])
    make_guidance_conditioned(unet)
    x0 = method.target(batch, None)
    t, alpha, sigma = steps.t[batch.at], steps.alpha[batch.at], steps.sigma[batch.at]
    exact = process.target_from(x0, (batch.z - alpha * x0) / sigma, t)
    assert (method.losses(exact, batch, x0) < 1e-8).all()
    assert (method.losses(exact + 1, batch, x0) > 1e-4).all()


def test_batches_depend_on_positions_only(unet: Any) -> None:
    method, _ = method_and_batch(ProgressiveDistillation, unet, "flow", 8)
    x0, text = torch.zeros(3, 4, 8, 8), torch.zeros(3, 5, 16)
    batched, single = (
        method.make_batch(torch.tensor(n), x0[: len(n)], Condition(text[: len(n)])) for n in ([7, 8], [8])
    )
    for name in ("z", "at", "model_time"):
        assert torch.equal(getattr(batched, name)[1:], getattr(single, name))
    assert torch.equal(batched.condition.guidance[1:], single.condition.guidance)


def test_the_blended_share_of_captions_is_interpolated_with_others(unet: Any) -> None:
    n, text = torch.arange(200), torch.zeros(200, 5, 16)
    for share in (0.0, 0.5, 1.0):
        method, _ = method_and_batch(Guidance, unet, blended=share)
        assert torch.equal(method.blended(n, Condition(text)).text, text)  # without others nothing is blended
        method.others = TextEmbedding(torch.ones(3, 5, 16))
        blended = method.blended(n, Condition(text)).text
        assert ((blended >= 0) & (blended < 1)).all()
        moved = (blended > 0).all((1, 2)).float().mean()
        assert abs(float(moved) - share) < 0.1


def test_a_learned_variance_is_removed_from_the_student(unet: Any) -> None:
    torch.manual_seed(0)
    with_variance = build(STAGE.model_copy(update={"variance": "learned"}), 4, 8, text_width=16)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    before = predict(with_variance, x, t, Condition(text))
    remove_variance_channels(with_variance, 4)
    torch.testing.assert_close(predict(with_variance, x, t, Condition(text)), before[:, :4])
    assert with_variance.config.out_channels == 4


def test_consistency_timesteps_lie_on_the_teachers_grid_and_f_at_0_is_the_identity(unet: Any) -> None:
    method, batch = method_and_batch(Consistency, unet, "v", original_steps=20)
    assert ((batch.at + 1) % 50 == 0).all()
    z = torch.randn(1, 4, 8, 8)
    at_0 = torch.zeros(1, dtype=torch.long)
    assert torch.equal(method._consistent(torch.randn_like(z), z, at_0), z)  # f(z, 0) = z


@pytest.mark.parametrize(
    ("method", "names"),
    [
        pytest.param("progressive", ["guidance", "steps-1"], marks=pytest.mark.drill),
        ("consistency", ["consistency"]),
    ],
)
def test_validation_is_split_into_device_batches_without_changing_the_loss(
    method: str,
    names: list[str],
    drawings: Callable[..., tuple[Config, Index]],
    words: Path,
    random_model: Callable[..., LatentDiffusion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run_settings, _ = drawings(
        f"text.model={words}",
        "text.max_tokens=8",
        "stage1.channels=[16, 16]",
        "stage2.prediction_type=v",
        "stage2.beta_schedule=cosine",
        "stage2.conditions=[text]",
        "stage2.pooled_text=false",
        "data.cache=none",
        "run.precision=no",
    )
    computed: list[tuple[bool, int]] = []  # (by a student, number of images)
    forward = UNet2DConditionModel.forward

    def spy(self: Any, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        computed.append((self.config.time_cond_proj_dim is not None, len(sample)))
        return forward(self, sample, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)

    def distilled(device_batch: int | None) -> tuple[list[float], int, int]:
        """The held-out losses, and the most images that students and teachers computed at once."""
        folder = tmp_path / str(device_batch)
        folder.mkdir()
        settings = DistillConfig(
            batch=8,
            device_batch=device_batch,
            steps=1,
            guidance_steps=1,
            steps_from=2,
            steps_to=1,
            original_steps=10,
            guidance_to=4.0,
            lr=1e-30,  # the weights stay: only the validation can differ
        )
        computed.clear()
        train.distill(run_settings, settings, method, random_model("text"), folder)
        lines = [json.loads(line) for name in names for line in (folder / name / "metrics.jsonl").open()]
        losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
        of_student, of_teacher = (
            max(n for by_student, n in computed if by_student is student) for student in (True, False)
        )
        return losses, of_student, of_teacher

    full_batch, device_batches = distilled(None), distilled(2)
    assert len(full_batch[0]) == len(names)
    assert full_batch[1:] == (8, 16)  # the teacher with and without the caption
    assert device_batches[1:] == (2, 4)
    assert device_batches[0] == pytest.approx(full_batch[0], rel=1e-5)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def distill(call: Callable[..., str], tiny_run: Path) -> Callable[..., str]:
    """Distills the tiny run, or another; returns the output."""

    def run_command(out: Path, *more: object, run: Path | None = None, status: int = 0) -> str:
        return call(train.main, run or tiny_run, "--out", out, *QUICK, *more, status=status)

    return run_command


@pytest.fixture
def run_with(train: Callable[..., str], tiny_run: Path, words: Path, tmp_path: Path) -> Callable[..., Path]:
    """Trains a short run with overrides, on the autoencoder and cache of the tiny run; returns its folder.

    Its text encoder is a small one, which is exported in a moment.
    """

    def train_run(*more: str) -> Path:
        reused = [f"stage1.pretrained={tiny_run / 'autoencoder'}", f"data.cache_dir={tiny_run / 'cache'}"]
        reused.append(f"text.model={words}")
        short = ["stage2.steps=2", "sample.prompts=[]", "run.tracker=none"]
        train(tmp_path / "run", *reused, *short, *more)
        return tmp_path / "run"

    return train_run


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def sample_diffusers(folder: Path, steps: int, **options: Any) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return np.asarray(pipe("red heart", **settings, **options).images)


def sample_ldm(folder: Path, **options: Any) -> np.ndarray:
    """The same by this package's own loop, with the number of steps saved in the folder."""
    return np.stack([np.asarray(image) / 255 for image in LatentDiffusion.load(folder, "cpu")("red heart", **options)])


def test_every_halving_is_exported_for_plain_diffusers_and_a_killed_one_resumes_exactly(
    distill: Callable[..., str],
    launch: Callable[..., ScriptProcess],
    wait_for: Callable[..., None],
    run_with: Callable[..., Path],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    run, uninterrupted, killed = run_with(), tmp_path / "uninterrupted", tmp_path / "killed"
    distill(uninterrupted, run=run)
    assert {path.name for path in uninterrupted.glob("pipeline*")} == {
        "pipeline",
        "pipeline-guidance",
        "pipeline-4",
        "pipeline-2",
    }
    for steps in (4, 2):
        folder = uninterrupted / f"pipeline-{steps}"
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
        assert pipe.unet.config.time_cond_proj_dim
        assert json.loads((folder / "ldm.json").read_text())["steps"] == steps
        pipe.scheduler.set_timesteps(steps)
        assert torch.equal(pipe.scheduler.timesteps, noise_levels(DiffusionProcess("flow"), steps).model_time)
        guided, guided_more = (sample_diffusers(folder, steps, guidance_scale=w) for w in (2.0, 4.0))
        assert np.abs(guided - sample_ldm(folder, guidance_scale=2.0)).max() <= 1 / 255
        assert guided.shape == (1, 32, 32, 3)
        assert not np.array_equal(guided, guided_more)
        logged = [json.loads(line) for line in (uninterrupted / f"steps-{steps}/metrics.jsonl").open()]
        assert [line["step"] for line in logged if "held_out_loss" in line] == [2, 4]
    final, last = weights(uninterrupted / "pipeline"), weights(uninterrupted / "pipeline-2")
    assert all(torch.equal(a, b) for a, b in zip(final.values(), last.values(), strict=True))

    process = launch("-m", "stage2_diffusion.distillation.train", run, "--out", killed, *QUICK)
    wait_for(killed / "steps-4/checkpoints/step-000002", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    modified = (killed / "pipeline-guidance/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    distill(killed, run=run)
    assert (killed / "pipeline-guidance/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == modified
    resumed, expected = weights(killed / "pipeline"), weights(uninterrupted / "pipeline")
    assert {name for name in expected if not torch.equal(resumed[name], expected[name])} == set()

    assert "finished" in distill(uninterrupted, run=run)
    assert "finished" in distill(uninterrupted, "checkpoint_every=3", run=run)
    assert "lr: 0.0001 → 0.1" in distill(uninterrupted, "lr=0.1", run=run, status=2)
    assert "another training (guidance_to" in distill(uninterrupted, "guidance_to=5", run=run, status=2)
    assert "steps_to" in distill(uninterrupted, "steps_to=4", run=run, status=2)
    assert "folder of another kind" in distill(tiny_run, status=2)
    other = shutil.copytree(run, tmp_path / "other", ignore=shutil.ignore_patterns("cache", "stage*"))
    shutil.rmtree(other / "pipeline/unet")
    shutil.copytree(uninterrupted / "pipeline-guidance/unet", other / "pipeline/unet")
    assert "teacher: " in distill(uninterrupted, run=other, status=2)


def test_a_ddpm_is_distilled_by_consistency_and_sampled_by_lcm_in_plain_diffusers(
    distill: Callable[..., str], run_with: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_with("stage2.prediction_type=eps", "sample.solver=ddim")
    out = tmp_path / "lcm"
    distill(out, "--method", "consistency", "original_steps=10", run=run)
    pipe = StableDiffusionPipeline.from_pretrained(out / "pipeline")
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert (pipe.scheduler.config.original_inference_steps, pipe.scheduler.config.prediction_type) == (10, "epsilon")
    sampled = sample_diffusers(out / "pipeline", 2, guidance_scale=3.0)
    assert sampled.shape == (1, 32, 32, 3)
    expected = sample_ldm(out / "pipeline", guidance_scale=3.0)  # with the same noise after each step
    assert np.abs(sampled - expected).max() <= 1 / 255
    assert "'eps' says nothing about the image" in distill(tmp_path / "no", run=run, status=2)
    assert not (tmp_path / "no").exists()


@pytest.mark.drill
def test_a_zero_snr_ddpm_without_text_is_distilled_without_guidance(
    distill: Callable[..., str], run_with: Callable[..., Path], tmp_path: Path
) -> None:
    run = run_with(
        "stage2.prediction_type=v",
        "stage2.zero_snr=true",
        "stage2.conditions=[class]",
        "stage2.pooled_text=false",
        "sample.solver=ddpm",
        "stage2.variance=learned",
    )
    distill(tmp_path / "out", run=run)
    assert {path.name for path in (tmp_path / "out").glob("pipeline*")} == {"pipeline", "pipeline-4", "pipeline-2"}
    unet = yaml.safe_load((tmp_path / "out/pipeline/unet/config.json").read_text())
    assert unet["out_channels"] == 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "out/pipeline").values())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["steps_to=3"], "steps_to: 3 is not reached by halving steps_from, 8; steps_from=48 would lead there"),
        (["steps_to=8"], "steps_to: 8 is not reached by halving"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--method", "consistency"], "LCMScheduler can't sample a flow; use --method progressive"),
        (["guidance_from=5"], "guidance_to: 4.0 is not more than guidance_from, 5.0"),
        (["guidance=5"], "distill: unknown key 'guidance'; did you mean 'guidance_"),
        (["loss=l2"], "distill: loss: 'l2'"),
    ],
)
def test_a_mistake_is_one_line_and_makes_no_folder(
    distill: Callable[..., str], tmp_path: Path, more: list[str], message: str
) -> None:
    output = distill(tmp_path / "out", *more, status=2)
    assert message in output
    assert output.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_finished_run_is_refused(distill: Callable[..., str], tmp_path: Path) -> None:
    assert "no finished run (it has no pipeline)" in distill(tmp_path / "out", run=tmp_path, status=2)
