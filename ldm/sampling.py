"""From noise to latents: solvers, guidance and the loop. The steps themselves are diffusers' schedulers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    UniPCMultistepScheduler,
)

from ldm.condition import Condition
from ldm.diffusion import Process
from ldm.errors import UserError

Denoiser = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # (x_t, t) → prediction
Network = Callable[[torch.Tensor, torch.Tensor, Condition], torch.Tensor]  # (x_t, t, condition) → prediction
PREDICTION = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


def scheduler(process: Process, solver: str, learned: bool = False, clip: bool = False) -> Any:
    """diffusers' scheduler of a solver for a process, configured so that it can be saved with a pipeline.

    `learned`: the network tells the reverse step's variance (ddpm alone makes use of it). `clip` keeps every predicted
    picture within [-1, 1], for pixels (ddim, ddpm).

    A flow runs on the solvers that know its straight path: `dpm++`, `unipc`, and `euler` as dpm++ of first order,
    which on a straight path is the same step.
    """
    common: dict[str, Any] = {
        "num_train_timesteps": process.timesteps,
        "prediction_type": PREDICTION[process.target],
        "steps_offset": 1,
    }
    if process.target == "flow":
        common |= {"use_flow_sigmas": True, "flow_shift": process.shift}
        order = 1 if solver == "euler" else 2
        if solver == "unipc":
            return UniPCMultistepScheduler(**common)
        return DPMSolverMultistepScheduler(**common, solver_order=order)
    common["trained_betas"] = replace(process, zero_snr=False).chain().beta.tolist()
    common["rescale_betas_zero_snr"] = process.zero_snr
    common["timestep_spacing"] = "trailing"
    if solver == "ddim":
        return DDIMScheduler(**common, clip_sample=clip, set_alpha_to_one=True)
    if solver == "ddpm":
        return DDPMScheduler(**common, clip_sample=clip, variance_type="learned_range" if learned else "fixed_small")
    if solver == "euler":
        return EulerDiscreteScheduler(**common)
    return (UniPCMultistepScheduler if solver == "unipc" else DPMSolverMultistepScheduler)(**common)


def with_solver(current: Any, solver: str) -> Any:
    """Another solver for the process that a loaded scheduler describes; UserError where it can't sample a flow."""
    config = current.config
    if solver == "unipc":
        return UniPCMultistepScheduler.from_config(config, solver_order=2)
    if solver == "dpm++":  # of a learned variance it would take three channels for the picture
        return DPMSolverMultistepScheduler.from_config(config, solver_order=2, variance_type=None)
    if config.get("use_flow_sigmas"):
        if solver != "euler":
            raise UserError(f"solver: {solver!r} can't sample a flow; use euler, dpm++ or unipc")
        return DPMSolverMultistepScheduler.from_config(config, solver_order=1)
    if solver == "euler":
        return EulerDiscreteScheduler.from_config(config)
    if solver == "ddpm":
        return DDPMScheduler.from_config(config, clip_sample=config.get("clip_sample", False))
    last = config.get("set_alpha_to_one", True)
    return DDIMScheduler.from_config(config, clip_sample=config.get("clip_sample", False), set_alpha_to_one=last)


def initial_noise(shape: Sequence[int], seeds: Sequence[int]) -> torch.Tensor:
    """`(len(seeds), *shape)`; each picture's noise follows from its own seed, whatever the batch."""
    return torch.stack([torch.randn(*shape, generator=torch.Generator("cpu").manual_seed(seed)) for seed in seeds])


def guided(network: Network, condition: Condition, null: Condition | None, scale: float) -> Denoiser:
    """Classifier-free guidance, arXiv 2207.12598, in Imagen's form: ε_∅ + scale·(ε_c − ε_∅). Scale 1 is one forward.

    `network(x, t, condition)`; `null` is the condition without what guidance pulls towards, None where nothing does.
    """
    if scale == 1 or null is None:
        return lambda x, t: network(x, t, condition)
    both = null.of(condition)

    def denoise(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        without, with_it = network(torch.cat([x, x]), t, both).chunk(2)
        return without + scale * (with_it - without)

    return denoise


@torch.no_grad()
def sample(
    denoise: Denoiser, solver: Any, noise: torch.Tensor, steps: int, generators: list[torch.Generator] | None = None
) -> torch.Tensor:
    """Solves the reverse process from standard normal `noise` `(N, C, h, w)` in `steps` steps; returns x_0.

    `generators`, one a picture, feed solvers that add noise (ddpm).
    """
    solver.set_timesteps(steps, device=noise.device)
    x = noise * solver.init_noise_sigma
    ancestral = isinstance(solver, DDPMScheduler)
    stochastic = {"generator": generators} if ancestral else {}
    for t in solver.timesteps:
        output = denoise(solver.scale_model_input(x, t), t)
        if not ancestral and output.shape[1] == 2 * x.shape[1]:  # the variance has no meaning to the others
            output = output.chunk(2, dim=1)[0]
        x = solver.step(output, t, x, **stochastic, return_dict=False)[0]
    return x
