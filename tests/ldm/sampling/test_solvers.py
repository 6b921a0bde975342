"""Solvers against diffusers' own loops, and on data whose perfect denoiser is known: x_0 ~ N(m, s²)."""

import itertools
import math
import re

import pytest
import torch
from cases import for_each
from diffusers import FlowMatchEulerDiscreteScheduler, PNDMScheduler, SchedulerMixin
from gaussian import M, S, drawn, perfect, solver_of

from ldm.config.schema import FLOW_SOLVERS, SOLVERS, SPACINGS
from ldm.diffusion.process import DiffusionProcess
from ldm.sampling.guidance import PredictFn
from ldm.sampling.loop import sample
from ldm.sampling.solvers import Level, Solver, scheduler, solver_name, with_solver
from ldm.utils.errors import UserError

NOISY = ("ddpm", "euler_a", "dpm++sde", "lcm")
ODE = tuple(solver for solver in SOLVERS if solver not in NOISY)
CPU = torch.device("cpu")


BY_SIGMA = ("karras", "exponential")
REFUSED_SPACINGS = {"ddpm": BY_SIGMA, "ddim": BY_SIGMA, "euler_a": BY_SIGMA, "lcm": SPACINGS}
REFUSED_AS_FULL_CHAIN = {"ddim": ("leading",), "dpm++": ("leading", "linspace"), "unipc": ("leading", "linspace")}


@for_each("solver", [solver for solver in SOLVERS if solver != "lcm"])
@for_each("target", ["eps", "v", "x0", "flow"])
def test_every_solver_turns_noise_into_the_data(solver: str, target: str) -> None:
    noise = torch.randn(4000, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    x = drawn(DiffusionProcess(target, "linear"), solver, {"ddpm": 1000, "euler_a": 400}.get(solver, 100), noise)
    assert float(x.mean()) == pytest.approx(M, abs=0.02)
    assert float(x.std()) == pytest.approx(S, abs=0.02)


@for_each("target", ["eps", "v", "flow"])
def test_lcm_ends_at_what_the_network_sees(target: str) -> None:
    """A network that has learned one point gives it in a single step, whatever the noise; arXiv 2310.04378."""
    process = DiffusionProcess(target, "scaled_linear")
    rule = with_solver(scheduler(process, "dpm++"), "lcm")
    for steps in (1, 4):
        solver = Solver(rule, steps, CPU, target)
        x = sample(perfect(target, 0.9, 0.0), solver, torch.randn(8, 1, 1, 1), [torch.Generator()] * 8)
        torch.testing.assert_close(x, torch.full_like(x, 0.9), atol=2e-3, rtol=0)


def loop_of_diffusers(rule, denoise: PredictFn, noise: torch.Tensor, steps: int, target: str) -> torch.Tensor:
    """As its pipelines write it, a seed an image."""
    rule.set_timesteps(steps)
    levels = Solver(type(rule).from_config(rule.config), steps, CPU, target).levels
    x = noise * rule.init_noise_sigma
    generators = [torch.Generator().manual_seed(i) for i in range(len(noise))]
    options = {"generator": generators} if "generator" in rule.step.__code__.co_varnames else {}
    for t, level in zip(rule.timesteps, levels, strict=True):
        x = rule.step(denoise(rule.scale_model_input(x, t), level), t, x, **options, return_dict=False)[0]
    return x


@for_each("spacing", [None, *SPACINGS])
@for_each("target", ["eps", "v"])
@for_each("solver", SOLVERS)
def test_our_loop_gives_bit_for_bit_what_diffusers_own_does(solver: str, target: str, spacing: str | None) -> None:
    noise, process = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1), DiffusionProcess(target)
    if spacing in REFUSED_SPACINGS.get(solver, ()):
        with pytest.raises(UserError, match=f"^timestep_spacing: {re.escape(solver)} has "):
            with_solver(scheduler(process, "dpm++"), solver, spacing)
        return
    rule = with_solver(scheduler(process, "dpm++"), solver, spacing)
    expected = loop_of_diffusers(rule, perfect(target), noise, 12, target)
    assert torch.equal(drawn(process, solver, 12, noise, spacing=spacing), expected)


@for_each("solver", FLOW_SOLVERS)
def test_our_loop_on_a_flow_gives_bit_for_bit_what_diffusers_own_does(solver: str) -> None:
    noise, process = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1), DiffusionProcess("flow", shift=2.0)
    rule = with_solver(scheduler(process, "dpm++"), solver)
    expected = loop_of_diffusers(rule, perfect("flow"), noise, 12, "flow")
    assert torch.equal(drawn(process, solver, 12, noise), expected)


def test_euler_on_a_flow_is_diffusers_flow_matching_euler() -> None:
    """Its own steps, at the times that our solver takes."""
    noise, process = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1), DiffusionProcess("flow")
    solver = solver_of(process, "euler", 10)
    flow_euler = FlowMatchEulerDiscreteScheduler()
    flow_euler.set_timesteps(sigmas=[level.sigma for level in solver.levels])
    x, denoise = noise, perfect("flow")
    for t, level in zip(flow_euler.timesteps, solver.levels, strict=True):
        x = flow_euler.step(denoise(x, level), t, x, return_dict=False)[0]
    torch.testing.assert_close(sample(denoise, solver, noise), x, atol=2e-6, rtol=0)


@for_each(
    ("solver", "target", "spacing", "order"),
    [
        ("ddim", "v", None, 1),
        ("euler", "v", None, 1),
        ("euler", "flow", None, 1),
        ("heun", "v", "karras", 2),
        ("heun", "flow", None, 2),
        ("dpm++", "v", "karras", 2),
        ("dpm++", "v", "exponential", 2),
        ("unipc", "v", "karras", 3),
    ],
)
def test_a_solver_s_error_falls_with_its_order(solver: str, target: str, spacing: str | None, order: int) -> None:
    """The probability-flow ODE of Gaussian data keeps quantiles: q = (x_t − α m) / √(α² s² + σ²) stays what it was.

    The largest error of nine of them, before the last step, which goes to no noise at all and is of first order in
    each; between step counts of which the second is four times the first. (UniPC of order 2 has a corrector.)
    """
    process, errors = DiffusionProcess(target, "linear"), []
    noise = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)

    def quantile(x: torch.Tensor, level: Level) -> torch.Tensor:
        return (x - level.alpha * M) / math.sqrt((level.alpha * S) ** 2 + level.sigma**2)

    for steps in (125, 500) if order == 1 else (20, 80):  # ddim wants divisors of 1000
        rule = solver_of(process, solver, steps, spacing)
        levels = list(rule.levels)
        began = quantile(rule.input(rule.begin(noise), 0), levels[0])
        rule = solver_of(process, solver, steps, spacing)
        del rule.levels[-1]
        x = sample(perfect(target), rule, noise)
        errors.append(float((quantile(rule.input(x, len(levels) - 1), levels[-1]) - began).abs().max()))
    measured = math.log(errors[0] / errors[1], 4)
    print(f"{solver:6} {target:4} {spacing or '':11} errors {errors[0]:.1e} {errors[1]:.1e}, order {measured:.2f}")
    assert order - 0.35 < measured < order + 0.6


def test_ddim_on_a_flow_is_its_euler() -> None:
    """Translated to a chain of the same noise levels and back: x_s = α_s·x̂_0 + σ_s·ε̂ on any path."""
    noise, process = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1), DiffusionProcess("flow", shift=1.5)
    ddim, euler = drawn(process, "ddim", 20, noise), drawn(process, "euler", 20, noise)
    torch.testing.assert_close(ddim, euler, atol=5e-4, rtol=0)


@for_each("target", ["eps", "v", "flow"])
def test_ddim_with_eta_1_has_the_statistics_of_ddpm(target: str) -> None:
    """In each single step: the same mean and, over noise, the same deviation; DDIM, arXiv 2010.02502, section 4.1."""
    process = DiffusionProcess(target, "linear")
    x = torch.full((1000, 1, 1, 1), 0.5)
    steps = []
    for name in ("ddim", "ddpm"):
        solver = solver_of(process, name, 50, eta=1.0)
        generators = [torch.Generator().manual_seed(i) for i in range(len(x))]
        model_input = solver.input(x, 30)
        output = solver.output(perfect(target)(model_input, solver.levels[30]), model_input, 30)
        steps.append(solver.step(output, 30, x, generators))
    torch.testing.assert_close(*steps, atol=2e-4, rtol=1e-3)  # with the same noise, the same draw


def test_ddim_with_eta_0_adds_no_noise() -> None:
    noise = torch.zeros(2, 1, 1, 1)
    x = drawn(DiffusionProcess("v"), "ddim", 20, noise)
    assert x[0] == x[1]
    assert len(drawn(DiffusionProcess("v"), "ddim", 20, noise, eta=0.5).unique()) == 2


@for_each("solver", ["euler", "unipc", "dpm++", "heun"])
def test_a_flow_follows_its_straight_paths(solver: str) -> None:
    """The flow's ODE keeps quantiles: x_0 = m + s·ε."""
    noise = torch.linspace(-2, 2, 41).reshape(-1, 1, 1, 1)
    torch.testing.assert_close(drawn(DiffusionProcess("flow"), solver, 500, noise), M + S * noise, atol=0.02, rtol=0)


@for_each("target", ["eps", "v", "flow"])
def test_a_changed_solver_is_the_one_that_would_have_been_built(target: str) -> None:
    noise = torch.linspace(-9, 9, 5).reshape(-1, 1, 1, 1)  # wide, so that clipping would show
    process, solvers = DiffusionProcess(target), FLOW_SOLVERS if target == "flow" else SOLVERS
    rules = {solver: scheduler(process, solver) for solver in solvers}

    def samples(rule: SchedulerMixin) -> torch.Tensor:
        return sample(perfect(target), Solver(rule, 10, CPU, target), noise, [torch.Generator().manual_seed(0)] * 5)

    expected = {solver: samples(rule) for solver, rule in rules.items()}
    for old, new in itertools.permutations(solvers, 2):
        torch.testing.assert_close(samples(with_solver(rules[old], new)), expected[new], msg=f"{old} to {new}")


@for_each("solver", SOLVERS)
def test_a_scheduler_is_known_by_the_name_of_its_solver(solver: str) -> None:
    assert solver_name(scheduler(DiffusionProcess("eps"), solver)) == solver
    if solver in FLOW_SOLVERS:
        assert solver_name(scheduler(DiffusionProcess("flow"), solver)) == solver


def test_other_solvers_take_over_the_chain_of_any_scheduler() -> None:
    """Stable Diffusion 1 comes with PNDM."""
    pndm = PNDMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True)
    noise = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
    expected = sample(perfect("eps"), Solver(pndm, 50, CPU), noise)
    for name in ODE:
        x = sample(perfect("eps"), Solver(with_solver(pndm, name), 200, CPU), noise)
        torch.testing.assert_close(x, expected, atol=0.05, rtol=0)


def test_a_solver_or_spacing_that_does_not_fit_is_one_line() -> None:
    with pytest.raises(UserError, match=r"'ddim' can't be saved with a flow; use euler, dpm\+\+"):
        scheduler(DiffusionProcess("flow"), "ddim")
    with pytest.raises(UserError, match="ddim has no 'karras'; use leading, trailing, linspace, or another solver"):
        with_solver(scheduler(DiffusionProcess("eps"), "dpm++"), "ddim", "karras")
    with pytest.raises(UserError, match="lcm has its own"):
        with_solver(scheduler(DiffusionProcess("eps"), "dpm++"), "lcm", "trailing")


@for_each("spacing", ["karras", "exponential"])
def test_sigmas_are_spaced_as_the_papers_say(spacing: str) -> None:
    """EDM, arXiv 2206.00364, eq. 5, with ρ = 7; exponential: evenly in log σ."""
    solver = solver_of(DiffusionProcess("eps", "linear"), "euler", 10, spacing)
    sigmas = torch.tensor([level.sigma / level.alpha for level in solver.levels], dtype=torch.float64)
    shaped = sigmas ** (1 / 7) if spacing == "karras" else sigmas.log()
    torch.testing.assert_close(shaped.diff(), shaped.diff().mean().expand(9), rtol=1e-3, atol=0)


@for_each("solver", SOLVERS)
@for_each(
    "process",
    [
        DiffusionProcess("v", "scaled_linear", zero_snr=True),
        DiffusionProcess("v", "sigmoid", timesteps=400),
        DiffusionProcess("eps", "cosine", shift=2.0),
        DiffusionProcess("eps", "log_linear"),
        DiffusionProcess("flow", shift=2.0),
    ],
)
def test_a_scheduler_has_the_noise_levels_of_its_process(process: DiffusionProcess, solver: str) -> None:
    """diffusers' own tables, read back from a saved configuration, are those of the process."""
    if process.prediction_type == "flow":
        if solver not in FLOW_SOLVERS:
            return
        rule = scheduler(process, solver)
        rule = type(rule).from_config(rule.config)
        rule.set_timesteps(10)
        t = rule.timesteps.float() / process.timesteps
        straight = t / (process.shift - (process.shift - 1) * t)  # unshifted, they are spread evenly
        steps = straight.diff()
        assert len(straight) == 10
        torch.testing.assert_close(steps, steps.mean().expand_as(steps), atol=3e-3, rtol=0)
        return
    rule = type(scheduler(process, solver)).from_config(scheduler(process, solver).config)
    expected = process.chain().alpha_bar.float()
    if process.zero_snr and solver not in ("ddim", "lcm"):  # the others put 2^-24 where they would divide by it
        assert rule.alphas_cumprod[-1] <= 2**-24 * 1.001
        expected, alphas_cumprod = expected[:-1], rule.alphas_cumprod[:-1]
    else:
        alphas_cumprod = rule.alphas_cumprod
    torch.testing.assert_close(alphas_cumprod, expected, atol=2e-6, rtol=2e-4)
    assert rule.config.num_train_timesteps == process.timesteps


@for_each("solver", ["ddim", "heun", "dpm++", "unipc", "ddpm"])
def test_a_zero_snr_chain_keeps_the_brightness_of_the_data(solver: str) -> None:
    """Data that are one bright value: sampled from pure noise they keep it, exactly where the chain ends in noise."""
    process = DiffusionProcess("v", "scaled_linear", zero_snr=True)
    noise = torch.randn(500, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    generators = [torch.Generator().manual_seed(i) for i in range(500)]
    x = sample(perfect("v", 0.9, 0.0), solver_of(process, solver, 20), noise, generators)
    assert float(x.mean()) == pytest.approx(0.9, abs=1e-3)


def test_solvers_leave_out_a_learned_variance_and_ddpm_uses_it() -> None:
    process, plain = DiffusionProcess("eps", "cosine"), perfect("eps")

    def with_variance(v: float) -> PredictFn:
        return lambda x, level: torch.cat([plain(x, level), torch.full_like(x, v)], dim=1)

    noise = torch.linspace(-2, 2, 9).reshape(-1, 1, 1, 1)
    learned = scheduler(process, "ddpm", learned=True)
    for solver in ODE:
        x = sample(with_variance(0.3), Solver(with_solver(learned, solver), 10, CPU), noise)
        torch.testing.assert_close(x, sample(plain, Solver(scheduler(process, solver), 10, CPU), noise))

    def ddpm(rule: object, denoise: PredictFn) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(i) for i in range(len(noise))]
        return sample(denoise, Solver(rule, 50, CPU), noise, generators)

    fixed = ddpm(scheduler(process, "ddpm"), plain)
    torch.testing.assert_close(ddpm(learned, with_variance(-1.0)), fixed)  # −1 stands for the fixed β̃
    assert not torch.allclose(ddpm(learned, with_variance(1.0)), fixed)


@for_each("solver", SOLVERS)
def test_few_steps_over_the_widest_chain_stay_finite(solver: str) -> None:
    """euler_a's three steps had a deviation whose square was, by rounding, below zero."""
    noise = torch.linspace(-2, 2, 5).reshape(-1, 1, 1, 1)
    for steps in range(1, 8):
        assert drawn(DiffusionProcess("v", "cosine"), solver, steps, noise).isfinite().all(), steps


@pytest.mark.parametrize("spacing", [None, *SPACINGS])
@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize(
    "process",
    [
        DiffusionProcess("v", "cosine"),
        DiffusionProcess("flow", shift=3.0, timesteps=60),
        *(
            pytest.param(process, marks=pytest.mark.drill)
            for process in (
                DiffusionProcess("v", "linear", zero_snr=True),
                DiffusionProcess("eps", "scaled_linear", timesteps=100),
            )
        ),
    ],
)
def test_every_number_of_steps_gives_an_image_or_a_line(
    process: DiffusionProcess, solver: str, spacing: str | None
) -> None:
    """Also where neighbouring steps round to one time of the chain, or leave it.

    As many steps as the chain has: on long chains in the default spacing, on short ones in all.
    """
    noise = torch.randn(8, 1, 1, 1, generator=torch.Generator().manual_seed(0))
    takes_all = solver in ("ddim", "dpm++", "unipc") and (spacing is None or process.timesteps < 1000)
    for steps in (1, 3, 50, *([process.timesteps] if takes_all else [])):
        if spacing in REFUSED_SPACINGS.get(solver, ()):
            reason = f"^timestep_spacing: {re.escape(solver)} has "
        elif steps == process.timesteps and spacing in REFUSED_AS_FULL_CHAIN.get(solver, ()):
            reason = f"^num_inference_steps: {steps}; too many for the chain"
        else:
            assert drawn(process, solver, steps, noise, spacing=spacing).isfinite().all(), steps
            continue
        with pytest.raises(UserError, match=reason):
            drawn(process, solver, steps, noise, spacing=spacing)


def test_ddpm_uses_a_learned_variance_whatever_the_model_was_saved_with() -> None:
    process = DiffusionProcess("eps", "cosine")
    for saved in ("ddim", "dpm++", "ddpm"):
        rule = with_solver(scheduler(process, saved), "ddpm", learned=True)
        assert rule.config.variance_type == "learned_range"
