"""The dtype of each precision that a user can choose."""

from __future__ import annotations

import torch

DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""`no` is float32: no mixed or lower precision, as in accelerate's `mixed_precision`."""
