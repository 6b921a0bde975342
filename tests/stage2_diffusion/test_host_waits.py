"""How often a step makes the host wait for a GPU: once, to learn whether it is finite."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from host_waits import DEVICE, HostWaits

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.diffusion.schedules import chain
from ldm.distributed.launch import join
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder
from ldm.training.trainer import Trainer
from stage2_diffusion.train import train

STEPS = 8
KINDS = {
    "text": (),
    "accumulated": ("stage2.device_batch=4",),
    "without a cache": ("data.cache=none", "data.latents=sample", "stage2.conditions=[class]"),
    "all noise": ("stage2.noise_offset=0.1", "stage2.input_perturbation=0.1", "stage2.stratified=true"),
    "classes": ("stage2.conditions=[text, class]", "stage2.dropout_each=true"),
    "inpainting": ("stage2.conditions=[text, size, inpaint]", "stage2.uncond_embedding=learned"),
    "upscaling": ("stage2.conditions=[text, upscale]",),
    "timesteps by loss": (
        "stage2.timestep_sampling=loss",
        "stage2.prediction_type=eps",
        "stage2.timesteps=2",  # so few that all have a history, and some lose all of it in a step
    ),
    "learned schedule": ("stage2.beta_schedule=learned", "stage2.prediction_type=eps"),
    "learned variance": ("stage2.variance=learned", "stage2.prediction_type=eps", "sample.solver=ddpm"),
    "learned weights": ("stage2.loss_weighting=learned",),
}
OFTEN = ("text", "inpainting", "timesteps by loss")


@pytest.fixture
def waits_of(
    few: Callable[..., tuple[Config, Index]], vae: Autoencoder, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., list[list[str]]]:
    """Trains with overrides; what the host waited for in each step, but for the first and the last one."""

    def train_counting(*overrides: str) -> list[list[str]]:
        settings, index = few(f"stage2.steps={STEPS}", f"stage2.checkpoint_every={STEPS}", *overrides)
        join(settings.run).device = DEVICE
        chain.cache_clear()  # its tables are on another test's device
        steps: dict[int, list[str]] = {}
        batches = Trainer.batches

        def counting(trainer: Trainer, *args: Any) -> Iterator[Any]:
            loader = batches(trainer, *args)
            while True:
                waits.lines = steps.setdefault(trainer.step, [])
                if (batch := next(loader, None)) is None:
                    return
                yield batch

        monkeypatch.setattr(Trainer, "batches", counting)
        with HostWaits() as waits:
            train(settings, index, vae, text_encoder.of(settings.text) if settings.stage2.text else None)
        assert list(steps) == [*range(STEPS + 1)]
        return [steps[step] for step in range(1, STEPS - 1)]  # the first one fills tables

    return train_counting


@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=() if kind in OFTEN else pytest.mark.drill) for kind in KINDS]
)
def test_a_step_waits_once_for_the_device(kind: str, waits_of: Callable[..., list[list[str]]]) -> None:
    for lines in waits_of("run.log_every=100", *KINDS[kind]):
        assert len(lines) == 1, lines
        assert "at signals.py" in lines[0]  # whether the step is finite


def test_a_line_of_metrics_waits_once_more(waits_of: Callable[..., list[list[str]]]) -> None:
    *_, third, fourth, fifth, sixth = waits_of(
        "run.log_every=2"
    )  # the step after the first line also counts FLOPs, once
    assert [len(lines) for lines in (third, fourth, fifth, sixth)] == [2, 1, 2, 1]


def test_a_step_that_is_not_finite_is_skipped_and_named(
    waits_of: Callable[..., list[list[str]]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    backward = Trainer.backward
    monkeypatch.setattr(
        Trainer, "backward", lambda trainer, loss: backward(trainer, loss * (torch.nan if trainer.step == 4 else 1))
    )
    counts = [len(lines) for lines in waits_of("run.log_every=100")]
    assert counts[:3] == [1, 1, 1] and counts[3] > 1 and counts[4:] == [1] * (STEPS - 6)
    lines = [json.loads(line) for line in (tmp_path / "run/stage2/metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines if "loss" in line] == [1]


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.to("cpu"),
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x + torch.ones(3),
        lambda x: x + torch.ones(3).to(x.device),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
    ],
)
def test_what_makes_the_host_wait_is_counted(read: Callable[[torch.Tensor], Any]) -> None:
    with HostWaits() as waits:
        x = torch.ones(3).to(DEVICE, non_blocking=True)
        assert x.device == DEVICE and (x * 2).device == DEVICE and torch.ones(3).device != DEVICE
        assert not waits.lines
        read(x)
    assert len(waits.lines) == 1, waits.lines


def test_what_the_device_computes_alone_is_not_counted() -> None:
    with HostWaits() as waits:
        x = torch.ones(3).to(DEVICE, non_blocking=True).requires_grad_()
        y = torch.where(x > 0, x * 2, torch.zeros_like(x)) + torch.arange(3, device=x.device)
        (y * y.new_full((), 3.0)).sum().backward()
        torch.nn.utils.clip_grad_norm_([x], 1.0)
        torch.optim.AdamW([x], fused=True).step()
    assert not waits.lines


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_step_on_a_gpu_synchronizes_once(
    few: Callable[..., tuple[Config, Index]], vae: Autoencoder, recwarn: pytest.WarningsRecorder
) -> None:
    from count_synchronizations import synchronizations

    settings, index = few("run.device=auto", "run.log_every=100", f"stage2.steps={STEPS}")
    counts = synchronizations(settings, index, vae, text_encoder.of(settings.text))
    assert max(counts[1:]) <= 1
