"""Distillation on a tiny run: what the student is asked, and the command."""

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
from forked import Process
from safetensors.torch import load_file

from ldm.config.schema import Config, DistillConfig, Stage2Config
from ldm.data.index import Index
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import Condition, predict
from ldm.models.unet import build, make_guidance_conditioned, without_variance
from ldm.sampling.few_steps import grid
from ldm.sampling.pipeline import LatentDiffusion
from stage2_diffusion.distillation import train
from stage2_diffusion.distillation.methods import Consistency, Guidance, Halving

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


def asked(kind: Any, unet: Any, target: str = "flow", *more: Any, **settings: Any) -> tuple[Any, Any]:
    """A lesson, and what it asks of three latents."""
    process = DiffusionProcess(target, zero_snr=target == "v")
    g = torch.Generator().manual_seed(1)
    text, x0, null = (torch.randn(*shape, generator=g) for shape in ((3, 5, 16), (3, 4, 8, 8), (5, 16)))
    lesson = kind(unet, process, DistillConfig(guidance_to=4.0, **settings), 0, null, None, *more)
    return lesson, lesson.make_batch(torch.arange(3), x0, Condition(text))


def test_a_student_told_of_guidance_answers_at_first_as_its_teacher(unet: Any) -> None:
    x, t, text = torch.randn(3, 4, 8, 8), torch.tensor([1.0, 500.0, 999.0]), torch.randn(3, 5, 16)
    before = predict(unet, x, t, Condition(text))
    make_guidance_conditioned(unet)
    assert torch.equal(predict(unet, x, t, Condition(text, guidance=torch.tensor([1.0, 2.5, 4.0]))), before)
    unet.time_embedding.cond_proj.weight.data.normal_()
    make_guidance_conditioned(unet)  # what it has learned stays
    assert not torch.equal(predict(unet, x, t, Condition(text, guidance=torch.tensor([1.0, 2.5, 4.0]))), before)


def test_the_target_of_guidance_is_the_guided_teacher_and_at_scale_1_the_conditional_one(unet: Any) -> None:
    lesson, question = asked(Guidance, unet)
    text, w = question.condition.text, question.condition.guidance
    assert (w >= 1).all() and (w < 4).all() and len(set(w.tolist())) == 3
    given, none = (
        predict(unet, question.z, question.model_time, Condition(e)) for e in (text, lesson.null.expand(3, 5, 16))
    )
    torch.testing.assert_close(lesson.target(question, None), none + w[:, None, None, None] * (given - none))
    ones = question._replace(condition=Condition(text, guidance=torch.ones(3)))
    torch.testing.assert_close(lesson.target(ones, None), given)
    assert torch.equal(lesson.losses(given, ones, given), torch.zeros(3))


@pytest.mark.parametrize("target", ["flow", "v", "x0"])
def test_a_halving_asks_at_the_students_times_and_costs_nothing_where_the_target_is_found(
    unet: Any, target: str
) -> None:
    lesson, question = asked(Halving, unet, target, 4)
    process, own = lesson.process, grid(lesson.process, 4)
    assert torch.equal(question.model_time, own.model_time[question.at])
    make_guidance_conditioned(unet)
    found = lesson.target(question, None)
    t, alpha, sigma = own.t[question.at], own.alpha[question.at], own.sigma[question.at]
    right = process.target_from(found, (question.z - alpha * found) / sigma, t)
    assert (lesson.losses(right, question, found) < 1e-8).all()
    assert (lesson.losses(right + 1, question, found) > 1e-4).all()


def test_what_is_asked_follows_from_positions(unet: Any) -> None:
    lesson, _ = asked(Halving, unet, "flow", 8)
    x0, text = torch.zeros(3, 4, 8, 8), torch.zeros(3, 5, 16)
    together, alone = (
        lesson.make_batch(torch.tensor(n), x0[: len(n)], Condition(text[: len(n)])) for n in ([7, 8], [8])
    )
    for name in ("z", "at", "model_time"):
        assert torch.equal(getattr(together, name)[1:], getattr(alone, name))
    assert torch.equal(together.condition.guidance[1:], alone.condition.guidance)


def test_captions_are_blended_by_their_share_and_lie_between_two(unet: Any) -> None:
    n, text = torch.arange(200), torch.zeros(200, 5, 16)
    for share in (0.0, 0.5, 1.0):
        lesson, _ = asked(Guidance, unet, blended=share)
        assert torch.equal(lesson.blended(n, Condition(text)).text, text)  # there are no others
        lesson.others = torch.ones(3, 5, 16)
        found = lesson.blended(n, Condition(text)).text
        assert ((found >= 0) & (found < 1)).all()
        moved = (found > 0).all((1, 2)).float().mean()
        assert abs(float(moved) - share) < 0.1


def test_a_variance_that_was_learned_is_left_out(unet: Any) -> None:
    torch.manual_seed(0)
    twice = build(STAGE.model_copy(update={"variance": "learned"}), 4, 8, text_width=16)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)
    before = predict(twice, x, t, Condition(text))
    without_variance(twice, 4)
    torch.testing.assert_close(predict(twice, x, t, Condition(text)), before[:, :4])
    assert twice.config.out_channels == 4


def test_a_consistency_model_is_taught_a_step_apart_and_by_its_averages(unet: Any) -> None:
    lesson, question = asked(Consistency, unet, "v", original_steps=20)
    assert ((question.at + 1) % 50 == 0).all()
    z = torch.randn(1, 4, 8, 8)
    at_0 = torch.zeros(1, dtype=torch.long)
    assert torch.equal(lesson._consistent(torch.randn_like(z), z, at_0), z)  # f(z, 0) = z


@pytest.mark.parametrize(
    ("method", "names"), [("progressive", ["guidance", "steps-1"]), ("consistency", ["consistency"])]
)
def test_no_more_images_are_validated_at_once_than_trained_on_and_the_loss_is_that_of_the_whole_batch(
    method: str,
    names: list[str],
    drawings: Callable[..., tuple[Config, Index]],
    words: Path,
    random_model: Callable[..., LatentDiffusion],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_run, _ = drawings(
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
    computed: list[tuple[bool, int]] = []  # by a student, or by a teacher that is not told of guidance; images
    forward = UNet2DConditionModel.forward

    def spy(self: Any, sample: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        computed.append((self.config.time_cond_proj_dim is not None, len(sample)))
        return forward(self, sample, *arguments, **options)

    monkeypatch.setattr(UNet2DConditionModel, "forward", spy)

    def distilled(device_batch: int | None) -> tuple[list[float], int, int]:
        """Each held-out loss, and the most images that students and teachers computed at once."""
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
        train.distill(of_run, settings, method, random_model("text"), folder)
        lines = [json.loads(line) for name in names for line in (folder / name / "metrics.jsonl").open()]
        losses = [line["held_out_loss"] for line in lines if "held_out_loss" in line]
        student, teacher = (max(n for hears, n in computed if hears is own) for own in (True, False))
        return losses, student, teacher

    whole, in_passes = distilled(None), distilled(2)
    assert len(whole[0]) == len(names)
    assert whole[1:] == (8, 16)  # the teacher with and without the caption
    assert in_passes[1:] == (2, 4)
    assert in_passes[0] == pytest.approx(whole[0], rel=1e-5)


# --------------------------------------------------------------------------------------------------------- the command


@pytest.fixture
def few(call: Callable[..., str], tiny_run: Path) -> Callable[..., str]:
    """Distills the tiny run, or another; returns what was said."""

    def given(out: Path, *more: object, run: Path | None = None, status: int = 0) -> str:
        return call(train.main, run or tiny_run, "--out", out, *QUICK, *more, status=status)

    return given


@pytest.fixture
def chain_run(train: Callable[..., str], tiny_run: Path, tmp_path: Path) -> Callable[..., Path]:
    """A short run like the tiny one with another process, in the tiny one's latents."""

    def made(*more: str) -> Path:
        known = [f"stage1.pretrained={tiny_run / 'autoencoder'}", f"data.cache_dir={tiny_run / 'cache'}"]
        short = ["stage2.steps=2", "sample.prompts=[]", "run.tracker=none"]
        train(tmp_path / "chain", *known, *short, *more)
        return tmp_path / "chain"

    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "unet/diffusion_pytorch_model.safetensors")


def drawn(folder: Path, steps: int, **options: Any) -> np.ndarray:
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "np"}
    return np.asarray(pipe("red heart", **given, **options).images)


def ours(folder: Path, **options: Any) -> np.ndarray:
    """The same by our loop, whose steps are those that the folder remembers."""
    return np.stack([np.asarray(each) / 255 for each in LatentDiffusion.load(folder, "cpu")("red heart", **options)])


def test_every_halving_is_exported_for_plain_diffusers_and_one_killed_ends_as_the_uninterrupted(
    few: Callable[..., str],
    launch: Callable[..., Process],
    wait_for: Callable[..., None],
    tiny_run: Path,
    tmp_path: Path,
) -> None:
    whole, drilled = tmp_path / "whole", tmp_path / "drilled"
    few(whole)
    assert {path.name for path in whole.glob("pipeline*")} == {
        "pipeline",
        "pipeline-guidance",
        "pipeline-4",
        "pipeline-2",
    }
    for steps in (4, 2):
        folder = whole / f"pipeline-{steps}"
        pipe = StableDiffusionPipeline.from_pretrained(folder)
        assert isinstance(pipe.scheduler, DPMSolverMultistepScheduler)
        assert pipe.unet.config.time_cond_proj_dim
        assert json.loads((folder / "ldm.json").read_text())["steps"] == steps
        pipe.scheduler.set_timesteps(steps)
        assert torch.equal(pipe.scheduler.timesteps, grid(DiffusionProcess("flow"), steps).model_time)
        guided, more = (drawn(folder, steps, guidance_scale=w) for w in (2.0, 4.0))
        assert np.abs(guided - ours(folder, guidance_scale=2.0)).max() <= 1 / 255
        assert guided.shape == (1, 32, 32, 3)
        assert not np.array_equal(guided, more)
        logged = [json.loads(line) for line in (whole / f"steps-{steps}/metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in logged if "held_out_loss" in line] == [2, 4]
    assert all(
        torch.equal(a, b)
        for a, b in zip(weights(whole / "pipeline").values(), weights(whole / "pipeline-2").values(), strict=True)
    )

    process = launch("-m", "stage2_diffusion.distillation.train", tiny_run, "--out", drilled, *QUICK)
    wait_for(drilled / "steps-4/checkpoints/step-000002", process)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    kept = (drilled / "pipeline-guidance/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns
    few(drilled)
    assert (drilled / "pipeline-guidance/unet/diffusion_pytorch_model.safetensors").stat().st_mtime_ns == kept
    resumed, straight = weights(drilled / "pipeline"), weights(whole / "pipeline")
    assert {name for name in straight if not torch.equal(resumed[name], straight[name])} == set()

    assert "finished" in few(whole)
    assert "finished" in few(whole, "checkpoint_every=3")
    assert "lr: 0.0001 → 0.1" in few(whole, "lr=0.1", status=2)
    assert "another distillation (guidance_to" in few(whole, "guidance_to=5", status=2)
    assert "steps_to" in few(whole, "steps_to=4", status=2)
    assert "run of another kind" in few(tiny_run, status=2)
    other = shutil.copytree(tiny_run, tmp_path / "other", ignore=shutil.ignore_patterns("cache", "stage*"))
    shutil.rmtree(other / "pipeline/unet")
    shutil.copytree(whole / "pipeline-guidance/unet", other / "pipeline/unet")
    assert "teacher: " in few(whole, run=other, status=2)


def test_a_chain_is_distilled_by_consistency_and_sampled_by_lcm_in_plain_diffusers(
    few: Callable[..., str], chain_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = chain_run("stage2.prediction_type=eps", "sample.solver=ddim")
    out = tmp_path / "lcm"
    few(out, "--method", "consistency", "original_steps=10", run=run)
    pipe = StableDiffusionPipeline.from_pretrained(out / "pipeline")
    assert isinstance(pipe.scheduler, LCMScheduler)
    assert (pipe.scheduler.config.original_inference_steps, pipe.scheduler.config.prediction_type) == (10, "epsilon")
    theirs = drawn(out / "pipeline", 2, guidance_scale=3.0)
    assert theirs.shape == (1, 32, 32, 3)
    assert (
        np.abs(theirs - ours(out / "pipeline", guidance_scale=3.0)).max() <= 1 / 255
    )  # noise after each step included
    assert "'eps' says nothing about the image" in few(tmp_path / "no", run=run, status=2)
    assert not (tmp_path / "no").exists()


def test_a_chain_without_text_that_ends_in_noise_is_halved_without_guidance(
    few: Callable[..., str], chain_run: Callable[..., Path], tmp_path: Path
) -> None:
    run = chain_run(
        "stage2.prediction_type=v",
        "stage2.zero_snr=true",
        "stage2.conditions=[class]",
        "stage2.pooled_text=false",
        "sample.solver=ddpm",
        "stage2.variance=learned",
    )
    few(tmp_path / "few", run=run)
    assert {path.name for path in (tmp_path / "few").glob("pipeline*")} == {"pipeline", "pipeline-4", "pipeline-2"}
    unet = yaml.safe_load((tmp_path / "few/pipeline/unet/config.json").read_text())
    assert unet["out_channels"] == 4
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "few/pipeline").values())


@pytest.mark.parametrize(
    ("more", "said"),
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
    few: Callable[..., str], tmp_path: Path, more: list[str], said: str
) -> None:
    printed = few(tmp_path / "few", *more, status=2)
    assert said in printed
    assert printed.count("\n") == 1
    assert not (tmp_path / "few").exists()


def test_a_folder_that_is_no_finished_run_is_refused(few: Callable[..., str], tmp_path: Path) -> None:
    assert "no finished run (it has no pipeline)" in few(tmp_path / "few", run=tmp_path, status=2)
