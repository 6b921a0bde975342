"""Are flat areas flat, and outlines sharp? Two figures of reconstructions that PSNR and SSIM hardly show."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

WINDOW = 5  # pixels along a side of a flat area
MARGIN = 2  # pixels around it that are of the same colour: what a blur of edges reaches
FLAT = 1.5 / 255  # the largest difference within one
PROFILE = 8  # pixels across an edge
STEP = 0.5  # the least contrast of an edge
MONOTONE = 1.05  # the most that differences across an edge may add up to, of its contrast


def flat_deviation(rebuilt: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """Standard deviation of `rebuilt` within windows in and around which `real` has one colour, `(N,)`, in 1/255.

    Both `(N, 3, H, W)` in [0, 1]. A channel that is 0 or 1 does not count: clipped values are flat. 0 is as flat as the
    original; NaN where an image has no such window.
    """
    outer = WINDOW + 2 * MARGIN
    if min(real.shape[2:]) < outer:
        return real.new_full((len(real),), torch.nan)
    spread = F.max_pool2d(real, outer, 1) + F.max_pool2d(-real, outer, 1)  # largest less smallest, (N, 3, H', W')
    value = F.avg_pool2d(real, outer, 1)
    flat = (spread <= FLAT).all(1, keepdim=True) & (value > FLAT) & (value < 1 - FLAT)
    inner = rebuilt[..., MARGIN:-MARGIN, MARGIN:-MARGIN].cpu().double()  # float32 would lose the squares' difference
    variance = F.avg_pool2d(inner.square(), WINDOW, 1) - F.avg_pool2d(inner, WINDOW, 1).square()
    return (255 * _mean_where(variance.clamp_min(0), flat.cpu()).sqrt()).to(real)


def edge_width(rebuilt: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """How many times as wide edges are in `rebuilt` as in `real`, per image `(N,)`; 1 is as sharp, 8 the most.

    Both `(N, 3, H, W)` in [0, 1]. An edge is a row or column of 8 pixels of one channel of `real` that only rises or
    only falls, by half of the range at least, and most in its middle. Its width in an image is the contrast of `real`
    over the steepest step of the image in the same direction, in pixels: an edge that fades is wide. NaN where an image
    has no edge.
    """
    if min(real.shape[2:]) < PROFILE:
        return real.new_full((len(real),), torch.nan)
    return torch.stack([_edge_width(*pair) for pair in zip(rebuilt, real, strict=True)])


def _edge_width(rebuilt: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """That of one image, `(3, H, W)`."""
    ratios = []
    for axis in (1, 2):
        steps, original = rebuilt.diff(dim=axis), real.diff(dim=axis)  # windows of 7 differences are 8 pixels
        rise = _windows(original, axis, lambda x: x.sum(-1))
        total = _windows(original, axis, lambda x: x.abs().sum(-1))
        middle = original.abs().narrow(axis, PROFILE // 2 - 1, rise.shape[axis])
        steepest = _windows(original, axis, lambda x: x.abs().amax(-1))
        edge = (rise.abs() >= STEP) & (total <= MONOTONE * rise.abs()) & (middle >= steepest)
        same_direction = _windows(steps, axis, lambda x: x.amax(-1)), _windows(-steps, axis, lambda x: x.amax(-1))
        rebuilt_steepest = torch.where(rise > 0, *same_direction)[edge]
        ratios.append(steepest[edge] / torch.maximum(rebuilt_steepest, steepest[edge] / PROFILE))
    return torch.cat(ratios).mean()


def _windows(x: torch.Tensor, axis: int, reduce: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    return reduce(x.unfold(axis, PROFILE - 1, 1))


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of each item's values at the mask, `(N,)`; NaN where that is nowhere."""
    values, mask = values.flatten(1), mask.flatten(1)
    return torch.where(mask, values, 0).sum(1) / mask.sum(1)
