"""The sampling loop: where it starts, what it keeps, and beyond the network's size."""

import pytest
import torch
from gaussian import M, perfect, solver_of

from ldm.config.schema import SOLVERS
from ldm.diffusion.process import DiffusionProcess
from ldm.models.conditioning import Condition
from ldm.sampling.loop import InpaintMask, Step, in_tiles, initial_noise, sample, slerp


def test_a_picture_s_noise_follows_from_its_own_seed() -> None:
    together = initial_noise((2, 3, 3), [5, 6, 7])
    assert torch.equal(initial_noise((2, 3, 3), [6])[0], together[1])
    assert torch.equal(together[1], torch.randn(1, 2, 3, 3, generator=torch.Generator("cpu").manual_seed(6))[0])


def test_noise_between_two_is_noise() -> None:
    a, b = initial_noise((4, 32, 32), [0, 1])
    assert torch.equal(slerp(a, b, 0.0), a)
    torch.testing.assert_close(slerp(a, b, 1.0), b)
    assert float(slerp(a, b, 0.5).std()) == pytest.approx(1, abs=0.03)  # a mean's would be 0.7
    torch.testing.assert_close(slerp(a, a, 0.3), a)


@pytest.mark.parametrize("target", ["v", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_start_from_a_picture_has_its_share_of_noise(solver: str, target: str) -> None:
    """What the network is given at the first level is α·x_0 + σ·ε, in every scheduler's own scale."""
    x0, eps = torch.full((2, 1, 1, 1), 0.9), torch.tensor([-1.0, 2.0]).reshape(2, 1, 1, 1)
    rule = solver_of(DiffusionProcess(target), solver, 10)
    x = rule.begin(eps, x0, 6)
    i = 6 * rule.per_step
    level = rule.levels[i]
    torch.testing.assert_close(rule.input(x, i), level.alpha * x0 + level.sigma * eps, atol=1e-4, rtol=1e-4)
    found = sample(perfect(target, 0.9, 0.0), solver_of(DiffusionProcess(target), solver, 10), eps, x0=x0, first=6)
    torch.testing.assert_close(found, x0, atol=5e-3, rtol=0)


@pytest.mark.parametrize("target", ["v", "flow"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_what_is_kept_comes_back_as_it_was(solver: str, target: str) -> None:
    x0, mask = torch.randn(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    mask[..., :2] = 1
    eps = torch.randn(2, 1, 4, 4)
    generators = [torch.Generator().manual_seed(i) for i in range(2)]
    rule = solver_of(DiffusionProcess(target), solver, 40)
    found = sample(perfect(target), rule, eps, generators, inpaint=InpaintMask(x0, mask, eps))
    assert torch.equal(found[..., 2:], x0[..., 2:])
    assert float((found[..., :2] - M).abs().mean()) < 0.6


def test_each_step_tells_what_the_network_sees() -> None:
    seen_steps: list[Step] = []
    process = DiffusionProcess("flow")
    x = sample(
        perfect("flow", 0.5, 0.0), solver_of(process, "euler", 7), torch.randn(2, 1, 1, 1), callback=seen_steps.append
    )
    assert [(step.number, step.total) for step in seen_steps] == [(i, 7) for i in range(1, 8)]
    for step in seen_steps:
        torch.testing.assert_close(step.x0, torch.full_like(x, 0.5), atol=1e-4, rtol=0)


def test_tiles_of_a_local_network_are_the_whole_without_a_seam() -> None:
    """A network that answers each place by itself has no edges: in tiles it gives the same."""

    def local(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        assert condition.image is not None
        assert max(x.shape[2:]) <= 8
        return x**2 + condition.image[:, :1]

    for h, w in ((8, 8), (9, 8), (20, 13), (5, 30)):
        x, beside = torch.randn(2, 1, h, w), torch.randn(2, 3, h, w)
        found = in_tiles(local, 8)(x, torch.tensor(0), Condition(image=beside))
        torch.testing.assert_close(found, x**2 + beside[:, :1])


def test_tiles_of_a_network_that_sees_its_edges_fade_into_one_another() -> None:
    """One that answers with the place within its tile: the blend has no jump as large as an edge's."""

    def places(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        return torch.linspace(0, 1, x.shape[3]).expand_as(x)

    found = in_tiles(places, 16)(torch.zeros(1, 1, 16, 40), torch.tensor(0), Condition())
    assert float(found[0, 0, 0].diff().abs().max()) < 0.45  # side by side it would be 1
