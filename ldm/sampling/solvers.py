"""diffusers' schedulers under the names of solvers, configured to sample any process.

A `Solver` is the sampling loop's view of a scheduler: where it evaluates the network, and how it steps.
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

from ldm.config.schema import FLOW_SOLVERS, SPACINGS
from ldm.diffusion.parameterization import (
    DIFFUSERS_PREDICTION_TYPES,
    PREDICTION_TYPE_OF,
    is_flow,
    predict_eps,
    predict_x0,
    target_from,
)
from ldm.diffusion.process import DiffusionProcess
from ldm.diffusion.schedules import betas_of, shift_time
from ldm.utils.errors import UserError, first_line

SCHEDULERS: dict[str, Any] = {
    "ddpm": DDPMScheduler,
    "ddim": DDIMScheduler,
    "euler": EulerDiscreteScheduler,
    "euler_a": EulerAncestralDiscreteScheduler,
    "heun": HeunDiscreteScheduler,
    "dpm++": DPMSolverMultistepScheduler,
    "dpm++sde": DPMSolverMultistepScheduler,
    "unipc": UniPCMultistepScheduler,
    "lcm": LCMScheduler,
}
SIGMA_SPACINGS = ("karras", "exponential")  # spacings that not every solver supports
LEARNED = ("learned", "learned_range")  # variance types that the network predicts
MIN_ALPHA_BAR = 2.0**-24  # at the end of a zero-SNR chain, for schedulers that divide by ᾱ


def scheduler(process: DiffusionProcess, solver: str, learned: bool = False, clip: bool = False) -> Any:
    """diffusers' scheduler for a solver and a process, configured so that it can be saved with a pipeline.

    `learned`: the network predicts the variance of the reverse step, which ddpm alone uses. `clip` clamps the predicted
    x_0 to [-1, 1], for pixels (ddim, ddpm).

    A flow has the solvers that diffusers implements for its straight path: `dpm++`, `dpm++sde`, `unipc`, and `euler` as
    dpm++ of first order, which takes the same step there. UserError for a solver that can't sample the process.
    """
    common: dict[str, Any] = {
        "num_train_timesteps": process.timesteps,
        "prediction_type": DIFFUSERS_PREDICTION_TYPES[process.prediction_type],
        "steps_offset": 1,
    }
    options: dict[str, Any] = {}
    if solver in ("ddim", "ddpm"):
        options["clip_sample"] = clip
    if solver == "ddim":
        options["set_alpha_to_one"] = True
    if solver == "ddpm":
        options["variance_type"] = "learned_range" if learned else "fixed_small"
    if solver == "dpm++sde":
        options["algorithm_type"] = "sde-dpmsolver++"
    if solver == "lcm":
        options |= {"clip_sample": False, "set_alpha_to_one": True}
    if process.prediction_type == "x0" and solver == "euler_a":
        raise UserError("solver: 'euler_a' can't be saved with x0, which its scheduler does not know; use another")
    if process.prediction_type == "flow":
        if solver not in FLOW_SOLVERS:
            raise UserError(f"solver: {solver!r} can't be saved with a flow; use {', '.join(FLOW_SOLVERS)}")
        common |= {"use_flow_sigmas": True, "flow_shift": process.shift}
        if solver != "unipc":
            common["solver_order"] = 1 if solver == "euler" else 2
        kind = DPMSolverMultistepScheduler if solver == "euler" else SCHEDULERS[solver]
        return kind(**common, **options)
    common["timestep_spacing"] = "trailing"
    if solver == "heun":
        options["use_karras_sigmas"] = True
    if solver == "heun" and process.zero_snr:  # HeunDiscreteScheduler has no rescale_betas_zero_snr
        common["trained_betas"] = betas_of(process.chain().alpha_bar.clamp(min=MIN_ALPHA_BAR)).tolist()
    else:
        common["trained_betas"] = replace(process, zero_snr=False).chain().beta.tolist()
        if solver != "heun":
            common["rescale_betas_zero_snr"] = process.zero_snr
    return SCHEDULERS[solver](**common, **options)


def solver_name(scheduler: Any) -> str:
    """The solver's name for a loaded scheduler; UserError if its class is not in `SCHEDULERS`."""
    config = scheduler.config
    if isinstance(scheduler, DPMSolverMultistepScheduler):
        if "sde" in config.algorithm_type:
            return "dpm++sde"
        return "euler" if is_flow(config) and config.solver_order == 1 else "dpm++"
    solver = next((name for name, kind in SCHEDULERS.items() if type(scheduler) is kind), None)
    if not solver:
        raise UserError(f"timestep_spacing: the model comes with {type(scheduler).__name__}; name a solver too")
    return solver


def with_solver(current: Any, solver: str, spacing: str | None = None, learned: bool = False) -> Any:
    """A scheduler of another solver, or another `spacing`, for the process of the loaded scheduler `current`.

    `learned` is as in `scheduler`. UserError if the solver has no such spacing. For a flow and a solver without
    straight paths it is a chain with the flow's noise levels: see `Solver`.
    """
    if spacing and solver == "lcm":
        raise UserError(f"timestep_spacing: lcm has its own; leave out {spacing!r}, or use another solver")
    if spacing in SIGMA_SPACINGS and solver in ("ddim", "ddpm", "euler_a"):
        others = ", ".join(name for name in SPACINGS if name not in SIGMA_SPACINGS)
        raise UserError(f"timestep_spacing: {solver} has no {spacing!r}; use {others}, or another solver")
    config = dict(current.config)
    if is_flow(config):
        if not spacing and solver == "heun":
            return FlowMatchHeunDiscreteScheduler(config["num_train_timesteps"], shift=config.get("flow_shift", 1.0))
        if not spacing and solver in FLOW_SOLVERS:
            config["solver_order"] = 1 if solver == "euler" else 2
            return _scheduler_from_config(
                DPMSolverMultistepScheduler if solver == "euler" else SCHEDULERS[solver], config, solver
            )
        config = _chain_of_flow(config)
    if spacing:
        config |= {f"use_{name}_sigmas": name == spacing for name in SIGMA_SPACINGS}
        if spacing not in SIGMA_SPACINGS:
            config["timestep_spacing"] = spacing
    # EulerAncestralDiscreteScheduler has no "sample" prediction; the Solver converts.
    if solver == "euler_a" and config.get("prediction_type") == DIFFUSERS_PREDICTION_TYPES["x0"]:
        config["prediction_type"] = DIFFUSERS_PREDICTION_TYPES["v"]
    if solver == "heun" and config.get("rescale_betas_zero_snr"):  # a key that HeunDiscreteScheduler lacks
        alpha_bar = DDIMScheduler.from_config(config).alphas_cumprod
        config["trained_betas"] = betas_of(alpha_bar.double().clamp(min=MIN_ALPHA_BAR)).tolist()
    if solver == "ddpm" and learned and config.get("variance_type") not in LEARNED:
        config["variance_type"] = "learned_range"
    if not spacing and (solver == "heun" or isinstance(current, HeunDiscreteScheduler)):
        config["use_karras_sigmas"] = solver == "heun"  # evenly spaced times make its first steps too large
    return _scheduler_from_config(SCHEDULERS[solver], config, solver)


def _scheduler_from_config(kind: Any, config: dict[str, Any], solver: str) -> Any:
    """A scheduler of class `kind` with those options of another one's configuration that it has."""
    parameters = inspect.signature(kind.__init__).parameters
    options = {name: value for name, value in config.items() if name in parameters}
    if kind is DPMSolverMultistepScheduler:  # with a learned variance_type it would keep three channels of the output
        options["variance_type"] = None
        options["algorithm_type"] = "sde-dpmsolver++" if solver == "dpm++sde" else "dpmsolver++"
        options.setdefault("solver_order", 2)
    if solver in ("ddim", "ddpm", "lcm"):
        options["clip_sample"] = config.get("clip_sample", False)
    if solver in ("ddim", "lcm"):
        options["set_alpha_to_one"] = config.get("set_alpha_to_one", True)
    return kind(**options)


def _chain_of_flow(config: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a chain with as many steps as the flow, and the noise levels of its own solvers."""
    steps, shift = config["num_train_timesteps"], config.get("flow_shift", 1.0)
    t = shift_time(torch.arange(1, steps + 1, dtype=torch.float64) / steps * (1 - 1 / steps), shift)
    alpha_bar = (1 - t).square() / ((1 - t).square() + t.square())
    return {
        "num_train_timesteps": steps,
        "trained_betas": betas_of(alpha_bar).tolist(),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
        "steps_offset": 1,
    }


class Level(NamedTuple):
    """The noise level of one evaluation: x_t = α·x_0 + σ·ε, and the time t that the network gets."""

    t: torch.Tensor
    alpha: float
    sigma: float
    noise: float
    """Share of noise: t over the number of training timesteps, 1 at pure noise, 0 at the image."""


class Solver:
    """A diffusers scheduler, set to a number of steps, with one interface for the sampling loop.

    The network is evaluated at each of `levels`, in order, `per_step` times per step. Schedulers scale x_t in different
    ways; `input` converts it to the network's scale.

    A flow's x_t = (1 − t)·x_0 + t·ε, divided by √((1 − t)² + t²), is that of a chain with the same noise levels. So
    schedulers for chains can sample a flow too: the class converts their x_t for the network, and its prediction back.
    """

    def __init__(
        self, scheduler: Any, steps: int, device: torch.device, prediction_type: str | None = None, eta: float = 0.0
    ):
        """`prediction_type` is the network's, if the scheduler's differs; `eta` in [0, 1] scales ddim's noise."""
        self.scheduler = scheduler
        try:
            scheduler.set_timesteps(steps)  # on the CPU, so that reading them needs no synchronisation
        except ValueError as error:
            raise UserError(f"num_inference_steps: {steps}; {first_line(error)}") from None
        if isinstance(scheduler, EulerAncestralDiscreteScheduler):
            _avoid_negative_root(scheduler)
        config = scheduler.config
        flow_match = isinstance(scheduler, FlowMatchHeunDiscreteScheduler)
        self._expected = "flow" if flow_match else PREDICTION_TYPE_OF[config.prediction_type]
        self.prediction_type = prediction_type or self._expected
        self.translated = self.prediction_type == "flow" and not (flow_match or is_flow(config))
        self.per_step = scheduler.order
        self._times = list(scheduler.timesteps)
        outside = self._expected != "flow" and float(max(self._times)) >= config.num_train_timesteps
        repeated = hasattr(scheduler, "sigmas") and self.per_step == 1 and bool((scheduler.sigmas.diff() == 0).any())
        if outside or repeated:
            raise UserError(
                f"num_inference_steps: {steps}; too many for the chain with this spacing; use fewer, or another spacing"
            )
        self._alphas_sigmas = _alphas_sigmas(scheduler, flow_match or is_flow(config))
        self._by_sigma = float(getattr(scheduler, "init_noise_sigma", 1.0)) != 1.0  # these schedulers keep x_t / α
        total = config.num_train_timesteps
        times = [float(t) for t in self._times]
        if self.translated:
            times = [total * sigma / (alpha + sigma) for alpha, sigma in self._alphas_sigmas]
        model_times = torch.tensor(times, device=device)
        if all(t == int(t) for t in times):
            model_times = model_times.long()
        self.levels = [
            Level(t, *(_to_flow(alpha, sigma) if self.translated else (alpha, sigma)), min(1.0, time / total))
            for t, (alpha, sigma), time in zip(model_times.unbind(), self._alphas_sigmas, times, strict=True)
        ]
        parameters = inspect.signature(scheduler.step).parameters
        self.takes_eta = "eta" in parameters
        self._eta = {"eta": eta} if self.takes_eta else {}
        self._takes_generator = "generator" in parameters

    @property
    def steps(self) -> int:
        return -(-len(self.levels) // self.per_step)

    @property
    def ancestral(self) -> bool:
        """Whether it is ddpm, which samples each step from a mean and a variance that the network may predict."""
        return isinstance(self.scheduler, DDPMScheduler)

    def begin(self, eps: torch.Tensor, x0: torch.Tensor | None = None, first: int = 0) -> torch.Tensor:
        """x at the step `first`: pure noise, or x0 with the noise of that step."""
        if hasattr(self.scheduler, "set_begin_index"):  # else it searches for the time, which may occur twice
            self.scheduler.set_begin_index(first * self.per_step)
        if x0 is None or first == 0:
            return eps * float(getattr(self.scheduler, "init_noise_sigma", 1.0))
        return self.noised(x0, eps, first * self.per_step)

    def noised(self, x0: torch.Tensor, eps: torch.Tensor, i: int) -> torch.Tensor:
        """x0 with the noise of the i-th level, in the scheduler's scale; without noise after the last level."""
        if i >= len(self.levels):
            return x0
        alpha, sigma = self._alphas_sigmas[i]
        return x0 + sigma / alpha * eps if self._by_sigma else alpha * x0 + sigma * eps

    def input(self, x: torch.Tensor, i: int) -> torch.Tensor:
        """The network's input at the i-th level, from the scheduler's x."""
        if self._by_sigma:
            x = self.scheduler.scale_model_input(x, self._times[i])
        return x * self.input_scale(i) if self.translated else x

    def input_scale(self, i: int) -> float:
        """The factor from the chain's x_t to the network's input at the i-th level."""
        return 1 / sum(self._alphas_sigmas[i]) if self.translated else 1.0

    def output(self, prediction: torch.Tensor, x: torch.Tensor, i: int) -> torch.Tensor:
        """The network's prediction for the input x in the form that the scheduler expects."""
        if self.prediction_type == self._expected:
            return prediction
        level, (alpha, sigma) = self.levels[i], self._alphas_sigmas[i]
        x0 = predict_x0(self.prediction_type, prediction, x, level.alpha, level.sigma)
        eps = predict_eps(self.prediction_type, prediction, x, level.alpha, level.sigma)
        return target_from(self._expected, x0, eps, alpha, sigma)

    def step(
        self, output: torch.Tensor, i: int, x: torch.Tensor, generators: Sequence[torch.Generator] | None
    ) -> torch.Tensor:
        """x after the i-th evaluation; `generators`, one per image, are for solvers that add noise."""
        options: dict[str, Any] = {**self._eta, "return_dict": False}
        if generators and self._takes_generator:
            options["generator"] = list(generators)
        return self.scheduler.step(output, self._times[i], x, **options)[0]  # type: ignore[no-any-return]

    def variance(self, output: torch.Tensor, i: int) -> torch.Tensor | float:
        """The variance of ddpm's step at the i-th level."""
        t, variance_type = self._times[i], self.scheduler.config.variance_type
        if variance_type not in LEARNED:
            variance = float(self.scheduler._get_variance(t))
            return variance**2 if variance_type == "fixed_small_log" else variance  # a standard deviation for that type
        log_variance = self.scheduler._get_variance(t, output.chunk(2, dim=1)[1])
        return log_variance.exp() if variance_type == "learned_range" else log_variance


def _alphas_sigmas(scheduler: Any, flow: bool) -> list[tuple[float, float]]:
    """α and σ at each evaluation of the network."""
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


def _avoid_negative_root(scheduler: EulerAncestralDiscreteScheduler) -> None:
    """Moves its σ to float64 where rounding would make σ_to² − σ_up², whose root it takes, negative."""
    before, after = scheduler.sigmas[:-1], scheduler.sigmas[1:]
    up = (after**2 * (before**2 - after**2) / before**2) ** 0.5
    if bool((after**2 < up**2).any()):
        scheduler.sigmas = scheduler.sigmas.double()


def _to_flow(alpha: float, sigma: float) -> tuple[float, float]:
    """α and σ of the straight path with the same signal-to-noise ratio."""
    return alpha / (alpha + sigma), sigma / (alpha + sigma)
