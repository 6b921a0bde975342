"""Faster inference, at the price of bit-exact results."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.attention import use_attention
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

if TYPE_CHECKING:
    from ldm.sampling.pipeline import LatentDiffusion


def optimize(model: LatentDiffusion, precision: str, compile: str) -> None:
    """Changes a model's networks in place; `LatentDiffusion.optimize_for_inference` documents the options."""
    gpu = model.device.type == "cuda"
    if precision == "auto":
        native = torch.cuda.is_bf16_supported(including_emulation=False) if gpu else _fast_bf16()
        precision = "bf16" if native else "no"
    if precision not in DTYPES:
        raise UserError(f"precision: {precision!r}; give auto, {', '.join(DTYPES)}")
    if precision == "fp16" and not gpu:
        raise UserError("precision: fp16 is for GPUs; use bf16 or no")
    if compile not in ("no", "yes", "graphs") or (compile == "graphs" and not gpu):
        raise UserError(f"compile: {compile!r}; give no, yes or, on a GPU, graphs")
    use_attention(model.unet, "auto", model.device)
    nn.Module.to(model.unet, DTYPES[precision])  # diffusers' own `to` warns about layers to keep in float32
    for conv in model.unet.modules() if precision == "bf16" and not gpu else ():
        if isinstance(conv, nn.Conv2d) and conv.stride != (1, 1):
            conv.register_forward_hook(_in_float32_where_narrow)
    if gpu:
        model.unet.to(memory_format=torch.channels_last)
        if precision == "bf16":
            model.autoencoder.bfloat16()
    if compile != "no":
        model.unet.compile(mode="reduce-overhead" if compile == "graphs" else None)


def _in_float32_where_narrow(conv: nn.Conv2d, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """The output of a strided bf16 convolution, computed again in float32 where the image is 1 or 2 wide.

    There oneDNN 3.13 with AMX reads memory that nobody wrote, if the image is 9 or more high.
    """
    if inputs[0].shape[-1] > 2:
        return output
    bias = None if conv.bias is None else conv.bias.float()
    shape = (conv.stride, conv.padding, conv.dilation, conv.groups)
    return F.conv2d(inputs[0].float(), conv.weight.float(), bias, *shape).to(output.dtype)  # type: ignore[arg-type]


def _fast_bf16() -> bool:
    return bool(torch.cpu._is_avx512_bf16_supported())
