"""Are flat areas flat, and outlines sharp? Two figures of reconstructions that PSNR and SSIM hardly show."""

from __future__ import annotations

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
        steps, original = (x.diff(dim=axis).unfold(axis, PROFILE - 1, 1) for x in (rebuilt, real))  # (3, H', W', 7)
        rise, sizes = original.sum(-1), original.abs()
        steepest = sizes.amax(-1)
        monotone = sizes.sum(-1) <= MONOTONE * rise.abs()
        edge = (rise.abs() >= STEP) & monotone & (sizes[..., PROFILE // 2 - 1] == steepest)
        same_direction = torch.where(rise > 0, steps.amax(-1), -steps.amin(-1))[edge]
        ratios.append(steepest[edge] / torch.maximum(same_direction, steepest[edge] / PROFILE))
    return torch.cat(ratios).mean()


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of each item's values at the mask, `(N,)`; NaN where that is nowhere."""
    values, mask = values.flatten(1), mask.flatten(1)
    return torch.where(mask, values, 0).sum(1) / mask.sum(1)
