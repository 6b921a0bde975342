"""The validation loss by noise level against closed forms and a direct computation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from ldm.config.schema import Config
from ldm.data.crops import crop_resize
from ldm.data.images import to_tensor
from ldm.data.index import Index
from ldm.diffusion.process import DiffusionProcess
from ldm.models import text_encoder, unet
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import Condition
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training.diffusion_process import diffusion_process
from ldm.training.trainer import Trainer
from ldm.utils.rng import normal
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.validation import EVAL_LOG_SNRS, Validation, velocity_error

PROCESSES = [
    DiffusionProcess("eps", "linear"),
    DiffusionProcess("x0", "cosine"),
    DiffusionProcess("v", "scaled_linear", zero_snr=True),
    DiffusionProcess("flow"),
    DiffusionProcess("eps", "log_linear"),
]


def network(process: DiffusionProcess, predict: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Any:
    """A stand-in for diffusers' U-Net, from a function (x_t, t) → x_0."""

    def forward(x: torch.Tensor, model_time: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        t = model_time / process.timesteps if process.prediction_type == "flow" else model_time
        alpha, sigma = process.alpha_sigma(t)
        x0 = predict(x, t)
        return (process.target_from(x0, (x - alpha * x0) / sigma, t),)

    forward.parameters = lambda: iter([torch.empty(0)])  # type: ignore[attr-defined]  # in float32
    return forward


def signs(std: float) -> tuple[torch.Tensor, torch.Tensor]:
    """x_0 and ε at ±std × ±1: their mean is the expectation of any quadratic form under Gaussians."""
    x0, eps = torch.tensor([[1.0, 1.0, -1.0, -1.0], [1.0, -1.0, 1.0, -1.0]])[:, :, None, None, None]
    return std * x0, eps


@pytest.mark.parametrize("std", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("level", EVAL_LOG_SNRS)
def test_the_perfect_denoisers_loss_is_the_same_for_every_prediction_type_and_schedule(
    level: float, std: float
) -> None:
    """(1 + SNR) times the variance of x_0 given x_t: std²·(1 + SNR) / (1 + std²·SNR), for data N(0, std²)."""
    x0, eps = signs(std)
    for process in PROCESSES:
        exact_level = float(process.log_snr(process.time_at(torch.tensor([level]))))
        assert exact_level == pytest.approx(level, abs=0.12)  # the nearest of 1000 steps

        def perfect(x: torch.Tensor, t: torch.Tensor, process: DiffusionProcess = process) -> torch.Tensor:
            alpha, sigma = process.alpha_sigma(t)
            return alpha * std**2 / (alpha**2 * std**2 + sigma**2) * x

        error = velocity_error(process, network(process, perfect), x0, eps, level, Condition()).mean()
        snr = torch.tensor(exact_level).exp()
        assert float(error) == pytest.approx(float(std**2 * (1 + snr) / (1 + std**2 * snr)), rel=1e-3)


@pytest.mark.parametrize("process", PROCESSES, ids=str)
def test_trivial_predictions_have_a_loss_of_about_one(process: DiffusionProcess) -> None:
    x0, eps = signs(1.0)
    zero = network(process, lambda x, t: torch.zeros_like(x))
    rescaled = network(process, lambda x, t: x / process.alpha_sigma(t)[0])
    at_noise = velocity_error(process, zero, x0, eps, EVAL_LOG_SNRS[0], Condition()).mean()
    at_data = velocity_error(process, rescaled, x0, eps, EVAL_LOG_SNRS[-1], Condition()).mean()
    assert float(at_noise) == pytest.approx(1, abs=0.02)
    assert float(at_data) == pytest.approx(1, abs=0.02)


def test_a_learned_variance_does_not_count() -> None:
    process, (x0, eps) = DiffusionProcess("v", "cosine"), signs(1.0)

    def both(x: torch.Tensor, t: torch.Tensor, return_dict: bool) -> tuple[torch.Tensor]:
        return (torch.cat([torch.zeros_like(x), torch.full_like(x, torch.inf)], dim=1),)

    both.parameters = lambda: iter([torch.empty(0)])  # type: ignore[attr-defined]  # in float32
    plain = network(process, lambda x, t: process.alpha_sigma(t)[0] * x)  # v = 0
    for level in EVAL_LOG_SNRS:
        error = velocity_error(process, both, x0, eps, level, Condition())
        torch.testing.assert_close(error, velocity_error(process, plain, x0, eps, level, Condition()))


@pytest.mark.parametrize("target", ["flow", "x0"])
def test_losses_are_means_over_held_out_and_training_images_with_ema_weights(
    few: Callable[..., tuple[Config, Index]], vae: Autoencoder, target: str
) -> None:
    settings, index = few(
        "stage2.conditions=[text, class, size]",
        f"stage2.prediction_type={target}",
        "stage2.evaluate_images=3",
        "stage2.beta_schedule=cosine",
    )
    stage, process, encoder = settings.stage2, diffusion_process(settings.stage2), text_encoder.of(settings.text)
    classes = tuple(index.select("train").labels())
    torch.manual_seed(1)
    denoiser = Denoiser(unet.build(stage, 4, 8, encoder.width, len(classes)), stage, encoder.embed([""]))
    run = Trainer(settings.run, stage, "stage2", denoiser)
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.zero_()  # the EMA keeps the weights as built
    model = LatentDiffusion(encoder, denoiser.unet, vae, scheduler(process, "dpm++"), classes=classes)
    validation = Validation(settings, index, model, Conditions(settings, vae, None, len(classes)), process)
    measured = validation(run)

    chosen = {"held_out": index.select("combination").subset(3), "trained_on": index.select("train").subset(3)}
    assert [len(part) for part in chosen.values()] == [3, 3]
    errors = {}
    with run.ema_weights("a test"), torch.no_grad():
        for name, part in chosen.items():
            table = torch.zeros(3, len(EVAL_LOG_SNRS))
            for k, entry in enumerate(part):
                x0 = vae.encode(to_tensor(crop_resize(part.load_image(k), (16, 16))[0])[None])
                eps = normal(0, "validation", [k], x0.shape[1:])
                for j, level in enumerate(EVAL_LOG_SNRS):
                    t = process.time_at(torch.tensor([level]))
                    x_t = process.add_noise(x0, eps, t)
                    label = classes.index(entry.label) if entry.label in classes else len(classes)
                    sizes = torch.tensor([[entry.height, entry.width, 0, 0, 16, 16]]).float()
                    output = denoiser.unet(
                        x_t,
                        process.model_time(t),
                        encoder.encode(entry.captions[:1]),
                        class_labels=torch.tensor([label]),
                        added_cond_kwargs={"time_ids": sizes, "text_embeds": torch.zeros(1, 0)},
                    ).sample
                    snr = process.log_snr(t).exp()
                    alpha, sigma = (snr / (1 + snr)).sqrt(), (1 / (1 + snr)).sqrt()
                    guess = process.predict_x0(output, x_t, t)
                    scaled = x_t * alpha / process.alpha_sigma(t)[0]  # where α² + σ² = 1
                    v, v_hat = alpha * eps - sigma * x0, alpha * (scaled - alpha * guess) / sigma - sigma * guess
                    table[k, j] = (v - v_hat).square().mean()
            errors[name] = table.mean(0)
    assert measured.keys() == {
        "held_out_loss",
        "trained_on_loss",
        *(f"held_out_loss_at_{level:+.0f}" for level in EVAL_LOG_SNRS),
    }
    for name, by_level in errors.items():
        assert measured[f"{name}_loss"] == pytest.approx(float(by_level.mean()), rel=1e-4)
    by_level = [measured[f"held_out_loss_at_{level:+.0f}"] for level in EVAL_LOG_SNRS]
    assert by_level == pytest.approx(errors["held_out"].tolist(), rel=1e-4)


def test_without_held_out_images_nothing_is_measured(
    few: Callable[..., tuple[Config, Index]], vae: Autoencoder
) -> None:
    settings, index = few()
    stage, process, encoder = settings.stage2, diffusion_process(settings.stage2), text_encoder.of(settings.text)
    network = unet.build(stage, 4, 8, encoder.width)
    model = LatentDiffusion(encoder, network, vae, scheduler(process, "dpm++"))
    validation = Validation(settings, index.select("train"), model, Conditions(settings, vae, None, 0), process)
    assert validation(Trainer(settings.run, stage, "stage2", Denoiser(network, stage, encoder.embed([""])))) == {}
    assert not (settings.run.dir / "stage2/metrics.jsonl").exists()
