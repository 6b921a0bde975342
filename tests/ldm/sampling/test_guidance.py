"""Guidance on a counting network, and on data whose optimal denoisers and classifiers are known."""

import pytest
import torch
from cases import for_each
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from gaussian import M, S, perfect, solver_of

from ldm.diffusion.parameterization import predict_eps, predict_x0, target_from
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import Condition
from ldm.sampling.guidance import by_classifier, classifier_free, rescaled, thresholded
from ldm.sampling.loop import sample
from ldm.sampling.solvers import Level

TEXT, UNCOND = Condition(torch.ones(2, 3, 4)), Condition(torch.zeros(1, 3, 4).expand(2, 3, 4))
LEVEL = Level(torch.tensor(400), 0.6, 0.8, 0.4)
PREDICTION_TYPES = ("eps", "x0", "v", "flow")


class Network:
    """Predicts x + the mean of the text embedding + `offset`; records the batch size of every forward pass."""

    def __init__(self, offset: float = 0.0) -> None:
        self.batches: list[int] = []
        self.offset = offset

    def __call__(self, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        self.batches.append(len(x))
        assert condition.text is not None
        return x + condition.text.mean((1, 2))[:, None, None, None] + self.offset


X = torch.zeros(2, 1, 1, 1)


def test_guidance_1_is_the_conditional_prediction_in_a_single_forward_pass_without_uncond() -> None:
    network = Network()
    assert classifier_free(network, TEXT, UNCOND, 1)(X, LEVEL).flatten().tolist() == [1, 1]
    assert network.batches == [2]
    assert classifier_free(network, TEXT, UNCOND, 3)(X, LEVEL).flatten().tolist() == [3, 3]  # 0 + 3·(1 − 0)
    assert classifier_free(network, TEXT, UNCOND, 0)(X, LEVEL).flatten().tolist() == [0, 0]
    assert network.batches == [2, 4, 4]  # both in a single forward pass
    # no unconditional embedding to extrapolate from
    assert classifier_free(network, TEXT, None, 3)(X, LEVEL).flatten().tolist() == [1, 1]


def test_each_image_may_have_its_own_scale() -> None:
    scales = torch.tensor([1.0, 3.0])
    assert classifier_free(Network(), TEXT, UNCOND, scales)(X, LEVEL).flatten().tolist() == [1, 3]
    network = Network()
    classifier_free(network, TEXT, UNCOND, torch.ones(2))(X, LEVEL)
    assert network.batches == [2]


def test_outside_its_interval_guidance_is_off_and_costs_nothing() -> None:
    for interval, expected, batch in (((0.0, 0.4), 3, 4), ((0.5, 1.0), 1, 2), ((0.1, 0.3), 1, 2)):
        network = Network()
        guided = classifier_free(network, TEXT, UNCOND, 3, interval=interval)
        assert guided(X, LEVEL).flatten().tolist() == [expected] * 2
        assert network.batches == [batch]


def test_autoguidance_extrapolates_from_a_weaker_network_with_the_same_condition() -> None:
    network, weaker = Network(), Network(offset=-0.5)
    prediction = classifier_free(network, TEXT, UNCOND, 3, weaker=weaker)(X, LEVEL)
    assert prediction.flatten().tolist() == [0.5 + 3 * 0.5] * 2
    assert network.batches == weaker.batches == [2]
    assert classifier_free(network, TEXT, None, 3, weaker=weaker)(X, LEVEL).flatten().tolist() == [2, 2]


def test_rescaling_equals_diffusers_and_restores_the_standard_deviation() -> None:
    guided, conditional = 5 * torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(rescaled(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7))
    torch.testing.assert_close(rescaled(guided, conditional, 1.0).std((1, 2, 3)), conditional.std((1, 2, 3)))
    assert torch.equal(rescaled(guided, conditional, 0.0), guided)


@for_each("target", PREDICTION_TYPES)
def test_thresholding_equals_diffusers(target: str) -> None:
    alpha, sigma = (0.6, 0.8) if target != "flow" else (0.4, 0.6)
    level = Level(torch.tensor(0), alpha, sigma, 0.5)
    x, x0 = torch.randn(3, 3, 8, 8), 2 * torch.randn(3, 3, 8, 8)
    prediction = target_from(target, x0, (x - alpha * x0) / sigma, alpha, sigma)
    thresholded_prediction = thresholded(lambda *_: prediction, target, 0.9)(x, level)
    reference = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    clipped = predict_x0(target, thresholded_prediction, x, alpha, sigma)
    torch.testing.assert_close(clipped, reference._threshold_sample(x0), atol=1e-5, rtol=1e-5)
    eps = predict_eps(target, thresholded_prediction, x, alpha, sigma)
    torch.testing.assert_close(alpha * clipped + sigma * eps, x)  # x_t is unchanged


@for_each("target", PREDICTION_TYPES)
def test_classifier_guidance_shifts_eps_by_the_papers_formula(target: str) -> None:
    """ε̂ = ε − √(1 − ᾱ)·s·∇, for every prediction type; arXiv 2105.05233, Algorithm 2."""
    alpha, sigma = (0.6, 0.8) if target != "flow" else (0.4, 0.6)
    level = Level(torch.tensor(7), alpha, sigma, 0.5)
    x, prediction, slope = torch.randn(3, 2, 4, 4).unbind()[0:3]
    x, prediction, slope = x[None], prediction[None], slope[None]
    guided = by_classifier(lambda *_: prediction, target, lambda *_: slope, 2.5)(x, level)
    before, after = (predict_eps(target, output, x, alpha, sigma) for output in (prediction, guided))
    torch.testing.assert_close(after, before - sigma * 2.5 * slope)


@for_each("name", ["ddim", "ddpm", "dpm++"])
@for_each("target", ["v", "flow"])
def test_the_optimal_classifier_at_scale_1_samples_its_class(name: str, target: str) -> None:
    """x_0 is ±m with standard deviation s, and its sign is the class: ∇ log p(y | x_t) is its score minus that of both.

    Guided by it, a model without classes samples the class of the classifier.
    """
    process = DiffusionProcess(target, "linear")
    solver = solver_of(process, name, 1000 if name == "ddpm" else 250)
    level_at = {float(level.t): level for level in solver.levels}
    noise = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def score(x: torch.Tensor, level: Level, mean: float) -> torch.Tensor:
        return -(x - level.alpha * mean) / (level.alpha**2 * S**2 + level.sigma**2)

    def score_of_both(x: torch.Tensor, level: Level) -> torch.Tensor:
        variance = level.alpha**2 * S**2 + level.sigma**2
        p_plus = torch.sigmoid(2 * x * level.alpha * M / variance)  # p(+ | x_t)
        return p_plus * score(x, level, M) + (1 - p_plus) * score(x, level, -M)

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:  # of both classes, by Tweedie's formula
        eps = -level.sigma * score_of_both(x, level)
        return target_from(target, (x - level.sigma * eps) / level.alpha, eps, level.alpha, level.sigma)

    def gradient(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = level_at[float(t)]
        return score(x, level, M) - score_of_both(x, level)

    generators = [torch.Generator().manual_seed(0)]
    unguided = sample(denoise, solver, noise, generators)
    assert 0.4 < float((unguided > 0).float().mean()) < 0.6
    solver = solver_of(process, name, 1000 if name == "ddpm" else 250)
    if solver.ancestral:
        samples = sample(denoise, solver, noise, generators, classifier=(gradient, 1.0))
    else:
        samples = sample(by_classifier(denoise, target, gradient, 1.0), solver, noise, generators)
    assert float(samples.mean()) == pytest.approx(M, abs=0.05)
    assert float(samples.std()) == pytest.approx(S, abs=0.04)


def test_a_classifier_with_gradient_0_leaves_the_prediction_unchanged() -> None:
    x = torch.randn(4, 1, 1, 1)
    denoise = perfect("v")
    assert torch.equal(by_classifier(denoise, "v", lambda x, t: torch.zeros_like(x), 9.0)(x, LEVEL), denoise(x, LEVEL))
