"""Guidance by itself, and on data whose perfect denoisers and classifiers are known."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from gaussian import M, S, perfect, solver_of

from ldm.diffusion.parameterization import predict_eps, predict_x0, target_from
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import Condition
from ldm.sampling.guidance import by_classifier, classifier_free, rescaled, thresholded
from ldm.sampling.loop import sample
from ldm.sampling.solvers import Level

TOLD, NULL = Condition(torch.ones(2, 3, 4)), Condition(torch.zeros(1, 3, 4).expand(2, 3, 4))
LEVEL = Level(torch.tensor(400), 0.6, 0.8, 0.4)
PREDICTION_TYPES = ("eps", "x0", "v", "flow")


class Network:
    """x + the text's mean; counts what it is asked."""

    def __init__(self, plus: float = 0.0) -> None:
        self.asked: list[int] = []
        self.plus = plus

    def __call__(self, x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        self.asked.append(len(x))
        assert condition.text is not None
        return x + condition.text.mean((1, 2))[:, None, None, None] + self.plus


X = torch.zeros(2, 1, 1, 1)


def test_guidance_of_one_is_the_conditional_prediction_and_one_forward() -> None:
    network = Network()
    assert classifier_free(network, TOLD, NULL, 1)(X, LEVEL).flatten().tolist() == [1, 1]
    assert network.asked == [2]
    assert classifier_free(network, TOLD, NULL, 3)(X, LEVEL).flatten().tolist() == [3, 3]  # 0 + 3·(1 − 0)
    assert classifier_free(network, TOLD, NULL, 0)(X, LEVEL).flatten().tolist() == [0, 0]
    assert network.asked == [2, 4, 4]  # both in one forward
    assert classifier_free(network, TOLD, None, 3)(X, LEVEL).flatten().tolist() == [1, 1]  # nothing to be pulled from


def test_each_picture_may_have_its_own_scale() -> None:
    scales = torch.tensor([1.0, 3.0])
    assert classifier_free(Network(), TOLD, NULL, scales)(X, LEVEL).flatten().tolist() == [1, 3]
    network = Network()
    classifier_free(network, TOLD, NULL, torch.ones(2))(X, LEVEL)
    assert network.asked == [2]


def test_outside_its_interval_nothing_is_guided_and_nothing_paid() -> None:
    for interval, found, asked in (((0.0, 0.4), 3, 4), ((0.5, 1.0), 1, 2), ((0.1, 0.3), 1, 2)):
        network = Network()
        guided = classifier_free(network, TOLD, NULL, 3, interval=interval)
        assert guided(X, LEVEL).flatten().tolist() == [found] * 2
        assert network.asked == [asked]


def test_autoguidance_extrapolates_from_a_weaker_network_with_the_same_condition() -> None:
    network, weaker = Network(), Network(plus=-0.5)
    found = classifier_free(network, TOLD, NULL, 3, weaker=weaker)(X, LEVEL)
    assert found.flatten().tolist() == [0.5 + 3 * 0.5] * 2
    assert network.asked == weaker.asked == [2]
    assert classifier_free(network, TOLD, None, 3, weaker=weaker)(X, LEVEL).flatten().tolist() == [2, 2]


def test_rescaling_is_diffusers_own_and_gives_the_deviation_back() -> None:
    guided, conditional = 5 * torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    torch.testing.assert_close(rescaled(guided, conditional, 0.7), rescale_noise_cfg(guided, conditional, 0.7))
    torch.testing.assert_close(rescaled(guided, conditional, 1.0).std((1, 2, 3)), conditional.std((1, 2, 3)))
    assert torch.equal(rescaled(guided, conditional, 0.0), guided)


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_thresholding_is_diffusers_own(target: str) -> None:
    alpha, sigma = (0.6, 0.8) if target != "flow" else (0.4, 0.6)
    level = Level(torch.tensor(0), alpha, sigma, 0.5)
    x, x0 = torch.randn(3, 3, 8, 8), 2 * torch.randn(3, 3, 8, 8)
    prediction = target_from(target, x0, (x - alpha * x0) / sigma, alpha, sigma)
    found = thresholded(lambda *_: prediction, target, 0.9)(x, level)
    theirs = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    kept = predict_x0(target, found, x, alpha, sigma)
    torch.testing.assert_close(kept, theirs._threshold_sample(x0), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        alpha * kept + sigma * predict_eps(target, found, x, alpha, sigma), x
    )  # still of this x_t


@pytest.mark.parametrize("target", PREDICTION_TYPES)
def test_a_classifiers_pull_moves_eps_by_its_formula(target: str) -> None:
    """ε̂ = ε − √(1 − ᾱ)·s·∇, whatever the network's target; arXiv 2105.05233, Algorithm 2."""
    alpha, sigma = (0.6, 0.8) if target != "flow" else (0.4, 0.6)
    level = Level(torch.tensor(7), alpha, sigma, 0.5)
    x, prediction, slope = torch.randn(3, 2, 4, 4).unbind()[0:3]
    x, prediction, slope = x[None], prediction[None], slope[None]
    found = by_classifier(lambda *_: prediction, target, lambda *_: slope, 2.5)(x, level)
    before, after = (predict_eps(target, each, x, alpha, sigma) for each in (prediction, found))
    torch.testing.assert_close(after, before - sigma * 2.5 * slope)


@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpm++"])
@pytest.mark.parametrize("target", ["v", "flow"])
def test_a_perfect_classifier_at_scale_one_gives_the_class(name: str, target: str) -> None:
    """x_0 is ±m with spread s, the class its sign: ∇ log p(y | x_t) is the score of the class minus that of both.

    Guided by it, a model that knows no classes samples the one asked for.
    """
    process = DiffusionProcess(target, "linear")
    solver = solver_of(process, name, 1000 if name == "ddpm" else 250)
    by_time = {float(level.t): level for level in solver.levels}
    ones = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))

    def score(x: torch.Tensor, level: Level, mean: float) -> torch.Tensor:
        return -(x - level.alpha * mean) / (level.alpha**2 * S**2 + level.sigma**2)

    def of_both(x: torch.Tensor, level: Level) -> torch.Tensor:
        variance = level.alpha**2 * S**2 + level.sigma**2
        share = torch.sigmoid(2 * x * level.alpha * M / variance)  # p(+ | x_t)
        return share * score(x, level, M) + (1 - share) * score(x, level, -M)

    def denoise(x: torch.Tensor, level: Level) -> torch.Tensor:  # of both: by Tweedie's formula
        eps = -level.sigma * of_both(x, level)
        return target_from(target, (x - level.sigma * eps) / level.alpha, eps, level.alpha, level.sigma)

    def gradient(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        level = by_time[float(t)]
        return score(x, level, M) - of_both(x, level)

    generators = [torch.Generator().manual_seed(0)]
    free = sample(denoise, solver, ones, generators)
    assert 0.4 < float((free > 0).float().mean()) < 0.6
    solver = solver_of(process, name, 1000 if name == "ddpm" else 250)
    if solver.ancestral:
        found = sample(denoise, solver, ones, generators, classifier=(gradient, 1.0))
    else:
        found = sample(by_classifier(denoise, target, gradient, 1.0), solver, ones, generators)
    assert float(found.mean()) == pytest.approx(M, abs=0.05)
    assert float(found.std()) == pytest.approx(S, abs=0.04)


def test_a_perfect_classifier_needs_no_other_target() -> None:
    """The same pull on the perfect denoiser of a class is that of the class, where its gradient is 0."""
    x = torch.randn(4, 1, 1, 1)
    denoise = perfect("v")
    assert torch.equal(by_classifier(denoise, "v", lambda x, t: torch.zeros_like(x), 9.0)(x, LEVEL), denoise(x, LEVEL))
