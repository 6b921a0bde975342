"""The schedulers of diffusers by the names of their solvers, set up so that they sample any process.

A `Solver` is what the sampling loop sees of one: where it evaluates the network, and how it steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

from ldm.config.schema import SPACINGS, STRAIGHT
from ldm.diffusion.parameterization import (
    DIFFUSERS_PREDICTION_TYPES,
    PREDICTION_TYPE_OF,
    is_flow,
    predict_eps,
    predict_x0,
    target_from,
)
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.schedules import betas_of
from ldm.utils.errors import UserError

KINDS: dict[str, Any] = {
    "ddpm": DDPMScheduler, "ddim": DDIMScheduler, "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler, "heun": HeunDiscreteScheduler, "dpm++": DPMSolverMultistepScheduler,
    "dpm++sde": DPMSolverMultistepScheduler, "unipc": UniPCMultistepScheduler, "lcm": LCMScheduler,
}  # fmt: skip
BY_SIGMA = ("karras", "exponential")  # spacings that not every scheduler has
LEARNED = ("learned", "learned_range")  # kinds of variance of which a network tells
SMALLEST = 2.0**-24  # ᾱ at the end of a zero-SNR chain, where a scheduler divides by it


def scheduler(process: DiffusionProcess, solver: str, learned: bool = False, clip: bool = False) -> Any:
    """diffusers' scheduler of a solver for a process, configured so that it can be saved with a pipeline.

    `learned`: the network tells the reverse step's variance (ddpm alone makes use of it). `clip` keeps every predicted
    picture within [-1, 1], for pixels (ddim, ddpm).

    A flow runs on the solvers that know its straight path: `dpm++`, `dpm++sde`, `unipc`, and `euler` as dpm++ of first
    order, which on a straight path is the same step.
    """
    common: dict[str, Any] = {
        "num_train_timesteps": process.timesteps,
        "prediction_type": DIFFUSERS_PREDICTION_TYPES[process.prediction_type],
        "steps_offset": 1,
    }
    own: dict[str, Any] = {}
    if solver in ("ddim", "ddpm"):
        own["clip_sample"] = clip
    if solver == "ddim":
        own["set_alpha_to_one"] = True
    if solver == "ddpm":
        own["variance_type"] = "learned_range" if learned else "fixed_small"
    if solver == "dpm++sde":
        own["algorithm_type"] = "sde-dpmsolver++"
    if solver == "lcm":
        own |= {"clip_sample": False, "set_alpha_to_one": True}
    if process.prediction_type == "x0" and solver == "euler_a":
        raise UserError("solver: 'euler_a' can't be saved with x0, which diffusers' does not know; use another")
    if process.prediction_type == "flow":
        if solver not in STRAIGHT:
            raise UserError(f"solver: {solver!r} can't be saved with a flow; use {', '.join(STRAIGHT)}")
        common |= {"use_flow_sigmas": True, "flow_shift": process.shift}
        if solver != "unipc":
            common["solver_order"] = 1 if solver == "euler" else 2
        kind = DPMSolverMultistepScheduler if solver == "euler" else KINDS[solver]
        return kind(**common, **own)
    common["timestep_spacing"] = "trailing"
    if solver == "heun":
        own["use_karras_sigmas"] = True
    if solver == "heun" and process.zero_snr:  # it has no key for that
        common["trained_betas"] = betas_of(process.chain().alpha_bar.clamp(min=SMALLEST)).tolist()
    else:
        common["trained_betas"] = replace(process, zero_snr=False).chain().beta.tolist()
        if solver != "heun":
            common["rescale_betas_zero_snr"] = process.zero_snr
    return KINDS[solver](**common, **own)


def name_of(rule: Any) -> str:
    """The solver of a loaded scheduler; UserError where it is none of `KINDS`."""
    config = rule.config
    if isinstance(rule, DPMSolverMultistepScheduler):
        if "sde" in config.algorithm_type:
            return "dpm++sde"
        return "euler" if is_flow(config) and config.solver_order == 1 else "dpm++"
    found = next((name for name, kind in KINDS.items() if type(rule) is kind), None)
    if not found:
        raise UserError(f"spacing: the model comes with {type(rule).__name__}; name a solver too")
    return found


def with_solver(current: Any, solver: str, spacing: str | None = None, learned: bool = False) -> Any:
    """Another solver for the process that a loaded scheduler describes, `spacing` its steps in another way.

    `learned` is as in `scheduler`. UserError where a solver has no such spacing. A flow comes back as the chain of its
    noise levels where the solver knows no straight paths: see `Solver`.
    """
    if spacing and solver == "lcm":
        raise UserError(f"spacing: lcm has its own; leave out {spacing!r}, or use another solver")
    if spacing in BY_SIGMA and solver in ("ddim", "ddpm", "euler_a"):
        others = ", ".join(each for each in SPACINGS if each not in BY_SIGMA)
        raise UserError(f"spacing: {solver} has no {spacing!r}; use {others}, or another solver")
    config = dict(current.config)
    if is_flow(config):
        if not spacing and solver == "heun":
            return FlowMatchHeunDiscreteScheduler(config["num_train_timesteps"], shift=config.get("flow_shift", 1.0))
        if not spacing and solver in STRAIGHT:
            config["solver_order"] = 1 if solver == "euler" else 2
            return _from(DPMSolverMultistepScheduler if solver == "euler" else KINDS[solver], config, solver)
        config = _chain_of_flow(config)
    if spacing:
        config |= {f"use_{each}_sigmas": each == spacing for each in BY_SIGMA}
        if spacing not in BY_SIGMA:
            config["timestep_spacing"] = spacing
    if (
        solver == "euler_a" and config.get("prediction_type") == DIFFUSERS_PREDICTION_TYPES["x0"]
    ):  # which it does not know
        config["prediction_type"] = DIFFUSERS_PREDICTION_TYPES["v"]
    if solver == "heun" and config.get("rescale_betas_zero_snr"):  # which it does not know
        alpha_bar = DDIMScheduler.from_config(config).alphas_cumprod
        config["trained_betas"] = betas_of(alpha_bar.double().clamp(min=SMALLEST)).tolist()
    if solver == "ddpm" and learned and config.get("variance_type") not in LEARNED:
        config["variance_type"] = "learned_range"
    if not spacing and (solver == "heun" or isinstance(current, HeunDiscreteScheduler)):
        config["use_karras_sigmas"] = solver == "heun"  # evenly spaced times are too large steps for it at most noise
    return _from(KINDS[solver], config, solver)


def _from(kind: Any, config: dict[str, Any], solver: str) -> Any:
    """A scheduler of a kind from what of another's configuration it knows."""
    known = inspect.signature(kind.__init__).parameters
    given = {name: value for name, value in config.items() if name in known}
    if kind is DPMSolverMultistepScheduler:  # of a learned variance it would take three channels for the picture
        given |= {"variance_type": None, "algorithm_type": "sde-dpmsolver++" if solver == "dpm++sde" else "dpmsolver++"}
        given.setdefault("solver_order", 2)
    if solver in ("ddim", "ddpm", "lcm"):
        given["clip_sample"] = config.get("clip_sample", False)
    if solver in ("ddim", "lcm"):
        given["set_alpha_to_one"] = config.get("set_alpha_to_one", True)
    return kind(**given)


def _chain_of_flow(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a chain with the noise levels that a flow's own solvers visit, in as many steps."""
    steps, shift = config["num_train_timesteps"], config.get("flow_shift", 1.0)
    t = torch.arange(1, steps + 1, dtype=torch.float64) / steps * (1 - 1 / steps)
    t = shift * t / (1 + (shift - 1) * t)
    alpha_bar = (1 - t).square() / ((1 - t).square() + t.square())
    return {
        "num_train_timesteps": steps, "trained_betas": betas_of(alpha_bar).tolist(), "prediction_type": "v_prediction",
        "timestep_spacing": "trailing", "steps_offset": 1,
    }  # fmt: skip


class Level(NamedTuple):
    """Where the network is evaluated: on x_t = α·x_0 + σ·ε, at the time t that it takes."""

    t: torch.Tensor
    alpha: float
    sigma: float
    noise: float
    """Share of the process that lies before it: 1 is pure noise, 0 the picture."""


class Solver:
    """A scheduler of diffusers, set to a number of steps, as a sampling loop asks of it.

    The network is asked at `levels`, one after the other, `per_step` of them a step. Each scheduler scales x_t in its
    own way; `input` brings it to the network's.

    A flow's x_t = (1 − t)·x_0 + t·ε, divided by √((1 − t)² + t²), is that of a chain with the same noise levels. So
    schedulers that know chains alone sample it too; this translates between them and the network.
    """

    def __init__(
        self, scheduler: Any, steps: int, device: torch.device, prediction_type: str | None = None, eta: float = 0.0
    ):
        """`prediction_type` is the network's, if the scheduler's differs; `eta` in [0, 1] scales ddim's noise."""
        self.scheduler = scheduler
        try:
            scheduler.set_timesteps(steps)  # on the CPU, where reading them waits for no device
        except ValueError as error:
            raise UserError(f"steps: {steps}; {str(error).splitlines()[0]}") from None
        if isinstance(scheduler, EulerAncestralDiscreteScheduler):
            _keep_real(scheduler)
        config = scheduler.config
        straight = isinstance(scheduler, FlowMatchHeunDiscreteScheduler)
        self._expected = "flow" if straight else PREDICTION_TYPE_OF[config.prediction_type]
        self.prediction_type = prediction_type or self._expected
        self.translated = self.prediction_type == "flow" and not (straight or is_flow(config))
        self.per_step = scheduler.order
        self._times = list(scheduler.timesteps)
        left = self._expected != "flow" and float(max(self._times)) >= config.num_train_timesteps
        together = hasattr(scheduler, "sigmas") and self.per_step == 1 and bool((scheduler.sigmas.diff() == 0).any())
        if left or together:
            raise UserError(f"steps: {steps}; the chain has no place for so many, so spaced; fewer, or other spacing")
        self._alphas_sigmas = _alphas_sigmas(scheduler, straight or is_flow(config))
        self._by_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0  # such keep x_t / α
        total = config.num_train_timesteps
        times = [float(t) for t in self._times]
        if self.translated:
            times = [total * sigma / (alpha + sigma) for alpha, sigma in self._alphas_sigmas]
        model_times = torch.tensor(times, device=device)
        if all(t == int(t) for t in times):
            model_times = model_times.long()
        self.levels = [
            Level(t, *(_straight(alpha, sigma) if self.translated else (alpha, sigma)), min(1.0, at / total))
            for t, (alpha, sigma), at in zip(model_times.unbind(), self._alphas_sigmas, times, strict=True)
        ]
        known = inspect.signature(scheduler.step).parameters
        self._eta = {"eta": eta} if "eta" in known else {}
        self._takes_generator = "generator" in known

    @property
    def steps(self) -> int:
        return -(-len(self.levels) // self.per_step)

    @property
    def ancestral(self) -> bool:
        """Whether it is DDPM, which takes the mean and the variance of each step from the network."""
        return isinstance(self.scheduler, DDPMScheduler)

    def begin(self, eps: torch.Tensor, x0: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """x at the step `first`: from pure noise, or of a picture with noise."""
        if hasattr(self.scheduler, "set_begin_index"):  # or it looks for the time, which may stand there twice
            self.scheduler.set_begin_index(first * self.per_step)
        if x0 is None or first == 0:
            return eps * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return self.noised(x0, eps, first * self.per_step)

    def noised(self, x0: torch.Tensor, eps: torch.Tensor, i: int) -> torch.Tensor:
        """A picture with the noise of the i-th level, as the scheduler scales it; beyond the last, without any."""
        if i >= len(self.levels):
            return x0
        alpha, sigma = self._alphas_sigmas[i]
        return x0 + sigma / alpha * eps if self._by_sigma else alpha * x0 + sigma * eps

    def input(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """What the network is given of x at the i-th level."""
        if self._by_sigma:
            x = self.scheduler.scale_model_input(x, self._times[i])
        return x * self.slope(i) if self.translated else x

    def slope(self, i: int) -> float:
        """By how much the network's input changes with the chain's x_t at the i-th level."""
        return 1 / sum(self._alphas_sigmas[i]) if self.translated else 1.0

    def output(self, prediction: torch.Tensor, x: torch.Tensor, i: int) -> torch.Tensor:
        """The network's answer to `input`, `x`, as the scheduler expects it."""
        if self.prediction_type == self._expected:
            return prediction
        level, (alpha, sigma) = self.levels[i], self._alphas_sigmas[i]
        known = prediction, x, level.alpha, level.sigma
        return target_from(
            self._expected,
            predict_x0(self.prediction_type, *known),
            predict_eps(self.prediction_type, *known),
            alpha,
            sigma,
        )

    def step(
        self, output: torch.Tensor, i: int, x: torch.Tensor, generators: Sequence[torch.Generator] | None
    ) -> torch.Tensor:
        """x after the i-th evaluation; `generators`, one a picture, feed solvers that add noise."""
        drawn = {"generator": list(generators)} if generators and self._takes_generator else {}
        given = {**self._eta, **drawn, "return_dict": False}
        return self.scheduler.step(output, self._times[i], x, **given)[0]  # type: ignore[no-any-return]

    def variance(self, output: torch.Tensor, i: int) -> torch.Tensor | float:
        """Of ddpm's step at the i-th level."""
        t, kind = self._times[i], self.scheduler.config.variance_type
        if kind not in LEARNED:
            found = float(self.scheduler._get_variance(t))
            return found**2 if kind == "fixed_small_log" else found  # which is the deviation there
        log_variance = self.scheduler._get_variance(t, output.chunk(2, dim=1)[1])
        return log_variance.exp() if kind == "learned_range" else log_variance


def _alphas_sigmas(scheduler: Any, flow: bool) -> list[tuple[float, float]]:
    """α and σ at each evaluation."""
    if hasattr(scheduler, "sigmas") and len(scheduler.sigmas) >= len(scheduler.timesteps):
        sigmas = scheduler.sigmas[: len(scheduler.timesteps)].double()
        if flow:
            pairs = torch.stack([1 - sigmas, sigmas], dim=1)
        else:
            alpha = (1 + sigmas.square()).rsqrt()
            pairs = torch.stack([alpha, sigmas * alpha], dim=1)
    else:
        alpha_bar = scheduler.alphas_cumprod.double()[scheduler.timesteps.long()]
        pairs = torch.stack([alpha_bar.sqrt(), (1 - alpha_bar).sqrt()], dim=1)
    return [(float(alpha), float(sigma)) for alpha, sigma in pairs]


def _keep_real(scheduler: EulerAncestralDiscreteScheduler) -> None:
    """Gives it σ in float64 where its √(σ_to² − σ_up²) would, by rounding, be of a negative number."""
    before, after = scheduler.sigmas[:-1], scheduler.sigmas[1:]
    up = (after**2 * (before**2 - after**2) / before**2) ** 0.5
    if bool((after**2 < up**2).any()):
        scheduler.sigmas = scheduler.sigmas.double()


def _straight(alpha: float, sigma: float) -> tuple[float, float]:
    """The point of the straight path with the signal-to-noise ratio of α and σ."""
    return alpha / (alpha + sigma), sigma / (alpha + sigma)
