"""The classifier of noisy images, and the gradient that guides sampling."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cases import for_each

from ldm.config.schema import FLOW_SOLVERS, SOLVERS, ClassifierConfig, Stage1Config
from ldm.diffusion.process import DiffusionProcess
from ldm.models.autoencoder import Autoencoder, Identity, build
from ldm.models.classifier import NoisyClassifier
from ldm.sampling.solvers import scheduler
from ldm.utils.errors import UserError

SMALL = {"channels": (16, 32), "layers": 1, "attention": (False, True), "attention_head_dim": 8, "norm_num_groups": 4}
CHAIN, FLOW = DiffusionProcess("v"), DiffusionProcess("flow")


def small(process: DiffusionProcess = CHAIN, autoencoder: Autoencoder | None = None) -> NoisyClassifier:
    torch.manual_seed(0)
    pixels = autoencoder or Autoencoder(Identity())
    return NoisyClassifier.of(ClassifierConfig(**SMALL), pixels, process, ["cat", "dog", "owl"]).eval()


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*(shape or (3, 3, 8, 8)), generator=generator, dtype=dtype)
    return x, torch.tensor([0, 400, 999])[: len(x)], torch.tensor([2, 0, 1])[: len(x)]


def test_the_gradient_equals_finite_differences() -> None:
    classifier = small().double()
    x, t, y = batch(dtype=torch.float64)
    directions = torch.randn(5, *x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradient, h = classifier.gradient(x, t, y), 1e-5
    assert gradient.dtype == torch.float64

    @torch.no_grad()
    def log_p(x: torch.Tensor) -> torch.Tensor:
        return classifier(x, t).log_softmax(1)[torch.arange(len(x)), y]

    for direction in directions:
        slope = (log_p(x + h * direction) - log_p(x - h * direction)) / (2 * h)
        torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=1e-6, atol=1e-9)


def test_an_images_gradient_does_not_depend_on_its_batch() -> None:
    classifier, (x, t, y) = small(), batch()
    together = classifier.gradient(x, t, y)
    for i in range(len(x)):
        alone = classifier.gradient(x[i : i + 1], t[i], y[i : i + 1])
        torch.testing.assert_close(alone, together[i : i + 1], rtol=1e-4, atol=1e-6)


def test_the_gradient_is_float32_under_no_grad_and_leaves_parameters_alone() -> None:
    classifier, (x, t, y) = small(), batch()
    expected = classifier.gradient(x, t, y)
    with torch.no_grad():
        assert torch.equal(classifier.gradient(x, t, y), expected)
    assert expected.dtype == torch.float32
    assert not expected.requires_grad
    assert classifier.to(torch.bfloat16).gradient(x.bfloat16(), t, y).dtype == torch.float32
    assert all(parameter.grad is None for parameter in classifier.parameters())


def test_the_gradients_of_all_classes_weighted_by_probability_sum_to_0() -> None:
    """Σ_y p(y | x)·∇ log p(y | x) = ∇ Σ_y p(y | x) = 0."""
    classifier = small().double()
    x, t, _ = batch(dtype=torch.float64)
    p = classifier(x, t).softmax(1).detach()
    gradients = [classifier.gradient(x, t, torch.full((len(x),), k)) for k in range(3)]
    total = sum(p[:, k, None, None, None] * gradient for k, gradient in enumerate(gradients))
    torch.testing.assert_close(total, torch.zeros_like(x), rtol=0, atol=1e-12)


@for_each("shape", [(2, 3, 8, 16), (1, 3, 5, 3), (2, 3, 1, 1)])
def test_images_may_have_any_shape(shape: tuple[int, ...]) -> None:
    classifier, (x, t, y) = small(), batch(*shape)
    assert classifier(x, t).shape == (len(x), 3)
    assert classifier.gradient(x, t, y).shape == x.shape


@pytest.mark.parametrize("process", [CHAIN, FLOW], ids=["chain", "flow"])
def test_a_saved_classifier_loads_unchanged(process: DiffusionProcess, tmp_path: Path) -> None:
    classifier, (x, t, _) = small(process), batch()
    classifier.save_pretrained(tmp_path / "model")
    for folder in (tmp_path, tmp_path / "model"):
        loaded = NoisyClassifier.load(folder)
        assert torch.equal(loaded(x, t), classifier(x, t))
        assert (loaded.classes, loaded.config.betas) == (
            ("cat", "dog", "owl"),
            None if process is FLOW else list(classifier.config.betas),
        )
    assert not list((tmp_path / "model").glob("*.bin"))


def test_a_folder_that_is_no_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    for content in (None, "{}", "no JSON"):
        if content is not None:
            (tmp_path / "config.json").write_text(content)
        with pytest.raises(UserError, match=r"^classifier: can't load one from '.+'.* give a folder of [^\n]+$"):
            NoisyClassifier.load(tmp_path)


@for_each("solver", SOLVERS)
@for_each(
    "process",
    [
        CHAIN,
        DiffusionProcess("eps", "cosine", timesteps=20),
        DiffusionProcess("v", zero_snr=True),
        DiffusionProcess("eps", shift=2.0),
    ],
)
def test_a_chain_with_the_same_noise_is_accepted_for_any_solver_and_prediction_type(
    process: DiffusionProcess, solver: str
) -> None:
    autoencoder = Autoencoder(Identity())
    classifier = small(process)
    classifier.check(scheduler(process, solver), autoencoder)
    for other in (DiffusionProcess("v", "linear"), DiffusionProcess("v", timesteps=50), FLOW):
        with pytest.raises(UserError, match="another process's noise"):
            classifier.check(scheduler(other, "dpm++" if other is FLOW else solver), autoencoder)


@for_each("solver", FLOW_SOLVERS)
def test_a_flow_is_accepted_with_any_shift(solver: str) -> None:
    autoencoder, classifier = Autoencoder(Identity()), small(FLOW)
    for shift in (1.0, 3.0):
        classifier.check(scheduler(replace(FLOW, shift=shift), solver), autoencoder)
    with pytest.raises(UserError, match="another process's noise"):
        classifier.check(scheduler(CHAIN, solver), autoencoder)


def test_latents_of_another_autoencoder_are_refused() -> None:
    torch.manual_seed(0)
    shape = Stage1Config(channels=(16, 16), layers=1, latent_channels=4, norm_num_groups=8, mid_attention=False)
    first, second = Autoencoder(build(shape, 16)), Autoencoder(build(shape, 16))
    noise_scheduler = scheduler(CHAIN, "ddim")
    small(CHAIN, first).check(noise_scheduler, first)
    with pytest.raises(UserError, match="another autoencoder"):
        small(CHAIN, first).check(noise_scheduler, second)


def test_settings_that_no_network_fits_are_named() -> None:
    for key, change in (
        ("attention", {"attention": (True,)}),
        ("norm_num_groups", {"norm_num_groups": 5}),
        ("attention_head_dim", {"attention_head_dim": 12}),
    ):
        with pytest.raises(ValueError, match=key):
            ClassifierConfig(**{**SMALL, **change})
