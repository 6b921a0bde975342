"""What the network predicts: ε, x_0, v or a flow's velocity. Conversions between them, and diffusers' names."""

from __future__ import annotations

from typing import Any

import torch

from ldm.utils.errors import unknown_choice

PREDICTION_TYPES = ("eps", "x0", "v", "flow")
DIFFUSERS_PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction", "x0": "sample", "flow": "flow_prediction"}
PREDICTION_TYPE_OF = {diffusers_name: name for name, diffusers_name in DIFFUSERS_PREDICTION_TYPES.items()}

Coefficient = torch.Tensor | float


def target_from(
    prediction_type: str, x0: torch.Tensor, eps: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """The training target of a network with `prediction_type`, for x_t = α·x_0 + σ·ε."""
    if prediction_type == "eps":  # DDPM, eq. 14
        return eps
    if prediction_type == "x0":
        return x0
    if prediction_type == "v":  # progressive distillation, arXiv 2202.00512, appendix D
        return alpha * eps - sigma * x0
    if prediction_type != "flow":
        raise unknown_choice("prediction_type", prediction_type, PREDICTION_TYPES)
    return eps - x0  # dx_t/dt of the straight path


def predict_x0(
    prediction_type: str, prediction: torch.Tensor, x_t: torch.Tensor, alpha: Coefficient, sigma: Coefficient
) -> torch.Tensor:
    """x_0 from a prediction. α² + σ² = 1; for `flow`, α + σ = 1."""
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
    """ε from a prediction, with α and σ as in `predict_x0`."""
    if prediction_type == "eps":
        return prediction
    if prediction_type == "x0":
        return (x_t - alpha * prediction) / sigma
    if prediction_type == "v":
        return alpha * prediction + sigma * x_t
    return x_t + alpha * prediction


def is_flow(config: Any) -> bool:
    """Whether the configuration of a diffusers scheduler is a flow's."""
    return bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == DIFFUSERS_PREDICTION_TYPES["flow"]
