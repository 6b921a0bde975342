"""Speed and agreement of attention kernels: `scripts/benchmark.py attention`."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from benchmark_rows import Report, parse_rows, peak, reset_peak, timed

from ldm.config.schema import RunConfig
from ldm.distributed.launch import precision
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

ATTENTION_LAYERS = ((5, 1), (10, 2), (20, 4))
"""Heads of 64 channels, and downsampling of the latents, of each resolution at which `unet-860m` has attention."""
REPEATS = 10
MAX_DIFFERENCE = 0.05  # of the largest value, between kernels


def compare_attention_kernels(args: argparse.Namespace) -> None:
    """Prints a line per kernel: FLOP/s of forward and backward, and its results' difference from the first kernel's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    default = args.precision or precision(RunConfig())
    kernels: dict[str, Callable[..., torch.Tensor]] = {
        "eager": _eager,
        "sdpa": F.scaled_dot_product_attention,
        "xformers": _xformers,
    }
    report, first = Report.of("attention", "GFLOP/s", args), None
    names = args.rows or ("sdpa,xformers" if device.type == "cuda" else "eager,sdpa")
    for row in parse_rows(names, tuple(kernels), default):
        if row.subject == "xformers" and not importlib.util.find_spec("xformers"):
            raise UserError("--rows: xformers is not installed; pip install it, or leave it out")
        reset_peak()
        seconds, tensors = _run(kernels[row.subject], args, DTYPES[row.precision], device)
        first = tensors if first is None else first
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(tensors, first, strict=True))
        # 7 matrix products: two of the forward; in the backward one of these again, and two for each of them
        flops = sum(7 * 2 * 64 * args.batch * math.prod(shape) for shape in _shapes(args.size))
        report.row(row.name, flops / seconds / 1e9, f"off by {off:.2g}", peak(), difference=off)
        if not off <= MAX_DIFFERENCE:
            raise UserError(
                f"--rows: {row.name} is off by {off:.2g} of the largest value; its version may not fit torch's"
            )


def _shapes(size: int) -> list[tuple[int, int, int]]:
    """Heads, queries and keys of self-attention and of attention to 77 tokens, for images of `size` pixels a side."""
    positions = [(heads, (size // 8 // downsampling) ** 2) for heads, downsampling in ATTENTION_LAYERS]
    return [(heads, n, keys) for heads, n in positions for keys in (n, 77)]


def _run(
    kernel: Callable[..., torch.Tensor], args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[float, list[torch.Tensor]]:
    """Seconds of forward and backward on all shapes, in the fastest round; the results and gradients."""
    results: list[torch.Tensor] = []
    total = 0.0
    for heads, queries, keys in _shapes(args.size):
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(args.batch, heads, n, 64) for n in (queries, keys, keys, queries)]
        *qkv, grad_output = (torch.randn(s, device=device, dtype=dtype, generator=generator) for s in shapes)
        step = partial(_forward_and_backward, kernel, [tensor.requires_grad_() for tensor in qkv], grad_output)
        results += [tensor.float().cpu() for tensor in step(1)]
        repeats = REPEATS if device.type == "cuda" else 1
        total += min(timed(partial(step, repeats)) for _ in range(args.rounds)) / repeats
    return total, results


def _forward_and_backward(
    kernel: Callable[..., torch.Tensor], qkv: list[torch.Tensor], grad_output: torch.Tensor, repeats: int
) -> list[torch.Tensor]:
    """Result and gradients of the last of `repeats` repetitions."""
    for _ in range(repeats):
        out = kernel(*qkv)
        gradients = torch.autograd.grad(out, qkv, grad_output)
    return [out.detach(), *gradients]


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    transposed = (tensor.transpose(1, 2) for tensor in (q, k, v))  # xformers has positions before heads
    return memory_efficient_attention(*transposed).transpose(1, 2)  # type: ignore[no-any-return]
