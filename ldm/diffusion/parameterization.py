"""What the network predicts: ε, x_0, v or a flow's velocity. Conversions between them, and diffusers' names."""

from __future__ import annotations

from typing import Any

import torch

TARGETS = ("eps", "x0", "v", "flow")


Coefficient = torch.Tensor | float


def target_from(
    target: str, x0: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """What a network with a target answers to x_t = α·x_0 + σ·ε, where it knows the picture and the noise."""
    if target == "eps":  # DDPM, eq. 14
        return eps
    if target == "x0":
        return x0
    if target == "v":  # progressive distillation, arXiv 2202.00512, appendix D
        return alpha * eps - sigma * x0
    if target != "flow":
        raise ValueError(f"target: {target!r} is not {', '.join(TARGETS[:-1])} or {TARGETS[-1]}")
    return eps - x0  # dx_t/dt of the straight path


def predict_x0(
    target: str, prediction: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """x_0 by a prediction; α² + σ² = 1, but for `flow`, where α + σ = 1."""
    if target == "eps":
        return (x_t - sigma * prediction) / alpha
    if target == "x0":
        return prediction
    if target == "v":
        return alpha * x_t - sigma * prediction
    return x_t - sigma * prediction


def predict_eps(
    target: str, prediction: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """ε by a prediction, as `predict_x0` gives x_0."""
    if target == "eps":
        return prediction
    if target == "x0":
        return (x_t - alpha * prediction) / sigma
    if target == "v":
        return alpha * prediction + sigma * x_t
    return x_t + alpha * prediction


DIFFUSERS_PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


PREDICTION_TYPE_OF = {theirs: ours for ours, theirs in DIFFUSERS_PREDICTION_TYPES.items()}


def is_flow(config: Any) -> bool:
    """Whether the configuration of a scheduler is of a flow."""
    return bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == DIFFUSERS_PREDICTION_TYPES["flow"]
