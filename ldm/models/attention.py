"""The attention backend of a U-Net: eager, torch's scaled_dot_product_attention, or xformers after a check."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import torch
import torch.distributed as dist
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    XFormersAttnProcessor,
)

from ldm.models.unet import UNet
from ldm.utils.errors import UserError, first_line


def check_backend(backend: str, gpu: bool) -> None:
    """UserError if an attention backend can't work on this machine."""
    if backend == "xformers" and not (gpu and importlib.util.find_spec("xformers")):
        raise UserError("stage2.attention_backend: xformers needs a GPU and pip install 'ldm[xformers]'; use auto")


class HalfPrecisionXFormers(XFormersAttnProcessor):
    """xformers' attention under autocast and in half-precision networks; torch's own in float32.

    Most of xformers' kernels need half precision; those for float32 need a GPU of compute capability 9.0 or lower.
    """

    def __init__(self) -> None:
        super().__init__()
        self.in_float32 = AttnProcessor2_0()

    def __call__(self, attn: Attention, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        half = hidden_states.dtype != torch.float32 or torch.is_autocast_enabled(hidden_states.device.type)
        compute = super().__call__ if half else self.in_float32
        return compute(attn, hidden_states, *args, **kwargs)  # type: ignore[no-any-return]


def use_attention(unet: UNet, backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> None:
    """Sets the attention backend of a U-Net; `dtype` is that of training's computations.

    xformers' kernels are used in half precision alone, after a comparison with torch's own attention: UserError if they
    differ.
    """
    check_backend(backend, device.type == "cuda")
    eager = backend == "eager" or (backend == "auto" and device.type == "cpu")
    processor: type[Any] = AttnProcessor if eager else AttnProcessor2_0
    if backend == "xformers":
        if dtype == torch.float32:
            _log_xformers_unused()
        else:
            processor = HalfPrecisionXFormers
    for layer in unet.modules():
        if isinstance(layer, Attention):
            layer.set_processor(processor())
            layer.upcast_softmax = eager  # float32, as in sdpa; on a CPU bf16's takes six times as long
    if processor is HalfPrecisionXFormers:
        check_kernels(unet, device, dtype)


@cache
def _log_xformers_unused() -> None:
    """Prints once, on the main process, that float32 leaves xformers unused."""
    if not (dist.is_initialized() and dist.get_rank()):
        print(
            "stage2.attention_backend: xformers computes in half precision, and this run in float32, so that sdpa is "
            "used; run.precision=bf16 or fp16 would use it",
            flush=True,
        )


def check_kernels(unet: UNet, device: torch.device, dtype: torch.dtype) -> None:
    """UserError if the U-Net's first attention layer differs from torch's own attention.

    It compares output and gradient on a small example, under autocast to `dtype` as in training.
    """
    layer = next((m for m in unet.modules() if isinstance(m, Attention)), None)
    if layer is None:
        return
    processor, residual, g = layer.processor, layer.residual_connection, torch.Generator().manual_seed(0)
    states = torch.randn(2, 64, layer.to_q.in_features, generator=g).to(device, layer.to_q.weight.dtype)
    text = torch.randn(2, 64, layer.to_k.in_features, generator=g).to(states)
    kwargs = {} if layer.to_k.in_features == layer.to_q.in_features else {"encoder_hidden_states": text}

    def computed() -> tuple[torch.Tensor, torch.Tensor]:
        x = states.clone().requires_grad_()
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            output = layer(x, **kwargs).float()
        (gradient,) = torch.autograd.grad(output.square().sum(), x)
        return output.detach().cpu(), gradient.float().cpu()

    layer.residual_connection = False  # the residual would hide errors of attention itself
    try:
        actual = computed()
    except RuntimeError as error:  # no kernel for this GPU, this precision or heads of this size
        reason = first_line(error).rstrip(":")
        raise UserError(
            f"stage2.attention_backend: xformers can't compute it in {str(dtype)[6:]} here: {reason}; use sdpa"
        ) from None
    layer.set_processor(AttnProcessor2_0())
    expected = computed()
    layer.set_processor(processor)
    layer.residual_connection = residual
    for name, value, reference in zip(("output", "gradient"), actual, expected, strict=True):
        off, scale = float((value - reference).abs().max()), float(reference.abs().max())
        if not off <= max(0.01, 4 * torch.finfo(dtype).eps) * scale:  # two ways of rounding are up to 1.5 eps apart
            raise UserError(
                f"stage2.attention_backend: xformers is off by {off:.2g} of {scale:.2g} in its {name} here; its "
                "version may not fit torch's; use sdpa"
            )
