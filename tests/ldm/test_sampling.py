"""Solvers and guidance, on data whose perfect denoiser is known: x_0 ~ N(m, s²)."""

import itertools

import pytest
import torch

from ldm.condition import Condition
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

    def network(x: torch.Tensor, t: torch.Tensor, condition: Condition) -> torch.Tensor:
        calls.append(len(x))
        return x + condition.text.mean((1, 2))[:, None, None, None]

    x, t = torch.zeros(2, 1, 1, 1), torch.tensor(1)
    told, null = Condition(torch.ones(2, 3, 4)), Condition(torch.zeros(2, 3, 4))
    assert guided(network, told, null, 1)(x, t).flatten().tolist() == [1, 1]
    assert calls == [2]
    assert guided(network, told, null, 3)(x, t).flatten().tolist() == [3, 3]  # 0 + 3·(1 − 0)
    assert guided(network, told, None, 3)(x, t).flatten().tolist() == [1, 1]  # nothing to be pulled towards


@pytest.mark.parametrize("solver", ["ddim", "ddpm", "euler", "dpm++", "unipc"])
@pytest.mark.parametrize(
    "process",
    [
        Process("v", "scaled_linear", zero_snr=True), Process("v", "sigmoid", timesteps=400),
        Process("eps", "cosine", shift=2.0), Process("eps", "log_linear"), Process("flow", shift=2.0),
    ],
)  # fmt: skip
def test_a_scheduler_has_the_noise_levels_of_its_process(process: Process, solver: str) -> None:
    """diffusers' own tables, read back from a saved configuration, are those of the process."""
    if process.target == "flow":
        if solver in ("ddim", "ddpm"):
            return
        rule = scheduler(process, solver)
        rule = type(rule).from_config(rule.config)
        rule.set_timesteps(10)
        even = torch.linspace(1, 0, 12)[:11] if solver == "unipc" else None
        t = rule.timesteps.float() / process.timesteps
        straight = t / (process.shift - (process.shift - 1) * t)  # unshifted, they are spread evenly
        steps = straight.diff()
        assert even is None or len(straight) == 10
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), atol=3e-3, rtol=0)
        return
    rule = type(scheduler(process, solver)).from_config(scheduler(process, solver).config)
    expected = process.chain().alpha_bar.float()
    if process.zero_snr and solver != "ddim":  # the others put 2^-24 where they would divide by it
        assert rule.alphas_cumprod[-1] <= 2**-24
        expected, found = expected[:-1], rule.alphas_cumprod[:-1]
    else:
        found = rule.alphas_cumprod
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=2e-4)
    assert rule.config.num_train_timesteps == process.timesteps


def test_a_zero_snr_chain_gives_the_brightness_that_others_miss() -> None:
    """Data that are one bright value: sampled from pure noise they keep it, exactly where the chain ends in noise."""

    def brightness(process: Process) -> float:
        def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            t = t.reshape(1).long()
            alpha, sigma = process.alpha_sigma(t)
            x0 = torch.full_like(x, 0.9)
            return process.target_of(x0, (x - alpha * x0) / sigma, t)

        noise = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
        return float(sample(denoise, scheduler(process, "ddim"), noise, 20).mean())

    assert brightness(Process("v", "scaled_linear", zero_snr=True)) == pytest.approx(0.9, abs=1e-4)


def test_solvers_leave_out_a_learned_variance_and_ddpm_uses_it() -> None:
    process = Process("eps", "cosine")
    plain = perfect(process)

    def with_variance(v: float):
        return lambda x, t: torch.cat([plain(x, t), torch.full_like(x, v)], dim=1)

    noise = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
    for solver in ("ddim", "dpm++", "unipc", "euler"):
        rule = with_solver(scheduler(process, "ddpm", learned=True), solver)
        torch.testing.assert_close(
            sample(with_variance(0.3), rule, noise, 10), sample(plain, scheduler(process, solver), noise, 10)
        )

    def ddpm(learned: bool, denoise) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(noise))]
        return sample(denoise, scheduler(process, "ddpm", learned=learned), noise, 50, generators)

    torch.testing.assert_close(ddpm(True, with_variance(-1.0)), ddpm(False, plain))  # −1 stands for the fixed β̃
    assert not torch.allclose(ddpm(True, with_variance(1.0)), ddpm(False, plain))


def test_a_picture_s_noise_follows_from_its_own_seed() -> None:
    together = initial_noise((2, 3, 3), [5, 6, 7])
    assert torch.equal(initial_noise((2, 3, 3), [6])[0], together[1])
    assert torch.equal(together[1], torch.randn(1, 2, 3, 3, generator=torch.Generator("cpu").manual_seed(6))[0])
