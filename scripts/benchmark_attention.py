"""How fast attention's kernels are, and whether they agree: `scripts/benchmark.py attention`."""

from __future__ import annotations

import argparse
import importlib.util
import math
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from benchmark_rows import Report, forget_peak, peak, rows, timed

from ldm.config.schema import RunConfig
from ldm.distributed.launch import precision
from ldm.training.engine import DTYPES
from ldm.utils.errors import UserError

LEVELS = ((5, 1), (10, 2), (20, 4))
"""Heads of 64 channels, and pixels of the latents along a position's side, where `unet-860m` has attention."""
REPEATS = 10


def attention(args: argparse.Namespace) -> None:
    """Prints a line a kernel: FLOP/s of forward and backward, and how far what they give is from the first's."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = args.precision or precision(RunConfig())
    kernels: dict[str, Callable[..., torch.Tensor]] = {
        "eager": _eager,
        "sdpa": F.scaled_dot_product_attention,
        "xformers": _xformers,
    }
    table, first = Report.of("attention", "GFLOP/s", args), None
    for row in rows(args.rows or ("sdpa,xformers" if device.type == "cuda" else "eager,sdpa"), tuple(kernels), chosen):
        if row.who == "xformers" and not importlib.util.find_spec("xformers"):
            raise UserError("--rows: xformers is not installed; pip install it, or leave it out")
        forget_peak()
        seconds, found = _attended(kernels[row.who], args, DTYPES[row.precision], device)
        first = found if first is None else first
        off = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, first, strict=True))
        # two products forward; of the backward, one that is computed again and two for each
        flops = sum(7 * 2 * 64 * args.batch * math.prod(shape) for shape in _shapes(args.size))
        table.row(row.name, flops / seconds / 1e9, f"off by {off:.2g}", peak(), difference=off)
        if not off <= 0.05:
            raise UserError(
                f"--rows: {row.name} is off by {off:.2g} of the largest value; its version may not fit torch's"
            )


def _shapes(size: int) -> list[tuple[int, int, int]]:
    """Heads, queries and keys, in self-attention and in attention to 77 tokens, of pictures of `size` pixels a side."""
    positions = [(heads, (size // 8 // side) ** 2) for heads, side in LEVELS]
    return [(heads, n, keys) for heads, n in positions for keys in (n, 77)]


def _attended(
    kernel: Callable[..., torch.Tensor], args: argparse.Namespace, dtype: torch.dtype, device: torch.device
) -> tuple[float, list[torch.Tensor]]:
    """Seconds of forward and backward on all shapes, the best of some rounds; their results and gradients."""
    found: list[torch.Tensor] = []
    total = 0.0
    for heads, queries, keys in _shapes(args.size):
        generator = torch.Generator(device).manual_seed(0)
        shapes = [(args.batch, heads, n, 64) for n in (queries, keys, keys, queries)]
        *taken, error = (torch.randn(s, device=device, dtype=dtype, generator=generator) for s in shapes)
        both = partial(_forward_and_backward, kernel, [each.requires_grad_() for each in taken], error)
        found += [each.float().cpu() for each in both(1)]
        repeats = REPEATS if device.type == "cuda" else 1
        total += min(timed(partial(both, repeats)) for _ in range(args.rounds)) / repeats
    return total, found


def _forward_and_backward(
    kernel: Callable[..., torch.Tensor], taken: list[torch.Tensor], error: torch.Tensor, repeats: int
) -> list[torch.Tensor]:
    """Result and gradients of the last of so many repetitions."""
    for _ in range(repeats):
        out = kernel(*taken)
        gradients = torch.autograd.grad(out, taken, error)
    return [out.detach(), *gradients]


def _eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.softmax(q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5, dim=-1) @ v


def _xformers(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from xformers.ops import memory_efficient_attention

    turned = (each.transpose(1, 2) for each in (q, k, v))  # it takes heads after positions
    return memory_efficient_attention(*turned).transpose(1, 2)  # type: ignore[no-any-return]
