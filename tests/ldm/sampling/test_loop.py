"""The sampling loop: its noise, its start from an image, inpainting, and tiles beyond the network's size."""

import pytest
import torch
from cases import for_each
from gaussian import M, perfect, solver_of

from ldm.config.schema import SOLVERS
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import Condition
from ldm.sampling.loop import InpaintMask, Step, in_tiles, initial_noise, sample, slerp


def test_an_images_noise_depends_only_on_its_own_seed() -> None:
    together = initial_noise((2, 3, 3), [5, 6, 7])
    assert torch.equal(initial_noise((2, 3, 3), [6])[0], together[1])
    assert torch.equal(together[1], torch.randn(1, 2, 3, 3, generator=torch.Generator("cpu").manual_seed(6))[0])


def test_interpolated_noise_has_unit_variance() -> None:
    a, b = initial_noise((4, 32, 32), [0, 1])
    assert torch.equal(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert float(slerp(a, b, 0.5).std()) == pytest.approx(1, abs=0.03)  # linear interpolation would give 0.7
    torch.testing.assert_close(slerp(a, a, 0.3), a)


@for_each("target", ["v", "flow"])
@for_each("name", SOLVERS)
def test_a_start_from_an_image_has_the_first_levels_noise(name: str, target: str) -> None:
    """The network's input at the first level is α·x_0 + σ·ε, whatever the scheduler's own scale."""
    x0, eps = torch.full((2, 1, 1, 1), 0.9), torch.tensor([-1.0, 2.0]).reshape(2, 1, 1, 1)
    solver = solver_of(DiffusionProcess(target), name, 10)
    x = solver.begin(eps, x0, 6)
    i = 6 * solver.per_step
    level = solver.levels[i]
    torch.testing.assert_close(solver.input(x, i), level.alpha * x0 + level.sigma * eps, atol=1e-4, rtol=1e-4)
    samples = sample(perfect(target, 0.9, 0.0), solver_of(DiffusionProcess(target), name, 10), eps, x0=x0, first=6)
    torch.testing.assert_close(samples, x0, atol=5e-3, rtol=0)


@for_each("target", ["v", "flow"])
@for_each("name", SOLVERS)
def test_inpainting_returns_the_known_latents_unchanged(name: str, target: str) -> None:
    x0, mask = torch.randn(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    eps = torch.randn(2, 1, 4, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    solver = solver_of(DiffusionProcess(target), name, 40)
    samples = sample(perfect(target), solver, eps, generators, inpaint=InpaintMask(x0, mask, eps))
    assert torch.equal(samples[..., 2:], x0[..., 2:])
    assert float((samples[..., :2] - M).abs().mean()) < 0.6


def test_the_callback_gets_every_step_with_its_prediction_of_x0() -> None:
    steps: list[Step] = []
    process = DiffusionProcess("flow")
    x = sample(
        perfect("flow", 0.5, 0.0), solver_of(process, "euler", 7), torch.randn(2, 1, 1, 1), callback=steps.append
    )
    assert [(step.number, step.total) for step in steps] == [(i, 7) for i in range(1, 8)]
    for step in steps:
        torch.testing.assert_close(step.x0, torch.full_like(x, 0.5), atol=1e-4, rtol=0)


def test_tiles_of_a_pointwise_network_equal_the_full_image() -> None:
    """A network that computes every position by itself sees no edges, so tiles change nothing."""

    def pointwise(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        assert condition.image is not None
        assert max(x.shape[2:]) <= 8
        return x**2 + condition.image[:, :1]

    for h, w in ((8, 8), (9, 8), (20, 13), (5, 30)):
        x, image = torch.randn(2, 1, h, w), torch.randn(2, 3, h, w)
        output = in_tiles(pointwise, 8)(x, torch.tensor(0), Condition(image=image))
        torch.testing.assert_close(output, x**2 + image[:, :1])


def test_tiles_of_a_network_that_sees_edges_are_blended() -> None:
    """A network that returns the position within its tile: the blend has no jump as large as between two tiles."""

    def positions(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return torch.linspace(0, 1, x.shape[3]).expand_as(x)

    output = in_tiles(positions, 16)(torch.zeros(1, 1, 16, 40), torch.tensor(0), Condition())
    assert float(output[0, 0, 0].diff().abs().max()) < 0.45  # 1 without blending
