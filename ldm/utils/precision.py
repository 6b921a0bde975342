"""The dtype of each precision that a user can choose, and that of a network."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`no` is float32: no mixed or lower precision, as in accelerate's `mixed_precision`."""


def placement(network: nn.Module) -> tuple[torch.device, torch.dtype]:
    """The device and the floating-point type of a network's weights.

    They are diffusers' `device` and `dtype`, which visit all layers before they look at a weight.
    """
    weight = next(parameter for parameter in network.parameters() if parameter.is_floating_point())
    return weight.device, weight.dtype
