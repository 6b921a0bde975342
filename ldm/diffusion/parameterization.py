"""What the network predicts: ε, x_0, v or a flow's velocity. Conversions between them, and diffusers' names."""

from __future__ import annotations

from typing import Any

import torch

PREDICTION_TYPES = ("eps", "x0", "v", "flow")


Coefficient = torch.Tensor | float


def target_from(
    prediction_type: str, x0: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """What a network with a target answers to x_t = α·x_0 + σ·ε, where it knows the picture and the noise."""
    if prediction_type == "eps":  # DDPM, eq. 14
        return eps
    if prediction_type == "x0":
        return x0
    if prediction_type == "v":  # progressive distillation, arXiv 2202.00512, appendix D
        return alpha * eps - sigma * x0
    if prediction_type != "flow":
        raise ValueError(
            f"prediction_type: {prediction_type!r} is not {', '.join(PREDICTION_TYPES[:-1])} or {PREDICTION_TYPES[-1]}"
        )
    return eps - x0  # dx_t/dt of the straight path


def predict_x0(
    prediction_type: str, prediction: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """x_0 by a prediction; α² + σ² = 1, but for `flow`, where α + σ = 1."""
    if prediction_type == "eps":
        return (x_t - sigma * prediction) / alpha
    if prediction_type == "x0":
        return prediction
    if prediction_type == "v":
        return alpha * x_t - sigma * prediction
    return x_t - sigma * prediction


def predict_eps(
    prediction_type: str, prediction: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """ε by a prediction, as `predict_x0` gives x_0."""
    if prediction_type == "eps":
        return prediction
    if prediction_type == "x0":
        return (x_t - alpha * prediction) / sigma
    if prediction_type == "v":
        return alpha * prediction + sigma * x_t
    return x_t + alpha * prediction


DIFFUSERS_PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}


PREDICTION_TYPE_OF = {theirs: ours for ours, theirs in DIFFUSERS_PREDICTION_TYPES.items()}


def is_flow(config: Any) -> bool:
    """Whether the configuration of a scheduler is of a flow."""
    return bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == DIFFUSERS_PREDICTION_TYPES["flow"]
