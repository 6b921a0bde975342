"""Solvers and guidance, on data whose perfect denoiser is known: x_0 ~ N(m, s²)."""

import itertools

import pytest
import torch

from ldm.diffusion import Process
from ldm.errors import UserError
from ldm.sampling import guided, initial_noise, sample, scheduler, with_solver

M, S = 0.7, 0.3


def perfect(process: Process):
    """E[target | x_t]: from E[x_0 | x_t] = m + α s² (x_t − α m) / (α² s² + σ²)."""

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        t = t.reshape(1)
        t = t.float() / 1000 if process.target == "flow" else t.long()
        alpha, sigma = process.alpha_sigma(t)
        x0 = M + alpha * S**2 * (x - alpha * M) / (alpha**2 * S**2 + sigma**2)
        eps = (x - alpha * x0) / sigma
        return process.target_of(x0, eps, t)

    return denoise


@pytest.mark.parametrize("solver", ["ddim", "euler", "dpm++", "unipc", "ddpm"])
@pytest.mark.parametrize("target", ["eps", "v", "x0"])
def test_every_solver_turns_noise_into_the_data(solver: str, target: str) -> None:
    process = Process(target, "linear")
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    steps = 1000 if solver == "ddpm" else 100
    generators = [torch.Generator().manual_seed(0)] if solver == "ddpm" else None
    x = sample(perfect(process), scheduler(process, solver), noise, steps, generators)
    assert float(x.mean()) == pytest.approx(M, abs=0.02)
    assert float(x.std()) == pytest.approx(S, abs=0.02)


@pytest.mark.parametrize("solver", ["euler", "dpm++", "unipc"])
def test_a_flow_follows_its_straight_paths(solver: str) -> None:
    """The flow's ODE keeps quantiles: x_0 = m + s·ε."""
    process = Process("flow")
    noise = torch.linspace(-2, 2, 41).reshape(-1, 1, 1, 1)
    x = sample(perfect(process), scheduler(process, solver), noise, 500)
    torch.testing.assert_close(x, M + S * noise, atol=0.02, rtol=0)


@pytest.mark.parametrize("target", ["eps", "v", "flow"])
def test_a_changed_solver_is_the_one_that_would_have_been_built(target: str) -> None:
    process = Process(target)
    noise = torch.linspace(-9, 9, 5).reshape(-1, 1, 1, 1)  # wide, so that clipping would show
    solvers = ["euler", "dpm++", "unipc", *(["ddim", "ddpm"] if target != "flow" else [])]
    for old, new in itertools.permutations(solvers, 2):
        one, other = (
            sample(perfect(process), rule, noise, 20, [torch.Generator().manual_seed(0)])
            for rule in (with_solver(scheduler(process, old), new), scheduler(process, new))
        )
        torch.testing.assert_close(one, other, msg=f"{old} to {new}")


def test_a_flow_refuses_a_solver_that_can_not_sample_it() -> None:
    with pytest.raises(UserError, match=r"ddim.*use euler"):
        with_solver(scheduler(Process("flow"), "dpm++"), "ddim")


def test_guidance_of_one_is_the_conditional_prediction_and_one_forward() -> None:
    calls = []

    def network(x, t, encoder_hidden_states, return_dict):
        calls.append(len(x))
        return (x + encoder_hidden_states.mean((1, 2))[:, None, None, None],)

    x, t = torch.zeros(2, 1, 1, 1), torch.tensor(1)
    text, null = torch.ones(2, 3, 4), torch.zeros(2, 3, 4)
    assert guided(network, text, null, 1)(x, t).flatten().tolist() == [1, 1]
    assert calls == [2]
    assert guided(network, text, null, 3)(x, t).flatten().tolist() == [3, 3]  # 0 + 3·(1 − 0)


def test_a_picture_s_noise_follows_from_its_own_seed() -> None:
    together = initial_noise((2, 3, 3), [5, 6, 7])
    assert torch.equal(initial_noise((2, 3, 3), [6])[0], together[1])
    assert torch.equal(together[1], torch.randn(1, 2, 3, 3, generator=torch.Generator("cpu").manual_seed(6))[0])
