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

    Both `(N, 3, H, W)` in [0, 1]. White and black do not count: clipped values are flat. 0 is as flat as the original;
    NaN where an image has no such window.
    """
    outer = WINDOW + 2 * MARGIN
    if min(real.shape[2:]) < outer:
        return torch.full((len(real),), torch.nan)
    spread = F.max_pool2d(real, outer, 1) + F.max_pool2d(-real, outer, 1)  # largest less smallest, (N, 3, H', W')
    colour = F.avg_pool2d(real, outer, 1)
    clipped = (colour <= FLAT).all(1) | (colour >= 1 - FLAT).all(1)
    flat = (spread <= FLAT).all(1) & ~clipped  # (N, H', W')
    inner = rebuilt[..., MARGIN:-MARGIN, MARGIN:-MARGIN].double()
    mean, mean_square = (F.avg_pool2d(x, WINDOW, 1) for x in (inner, inner.square()))
    variance = (mean_square - mean.square()).clamp_min(0).mean(1)
    return 255 * _mean_where(variance, flat).sqrt()


def edge_width(rebuilt: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """How many times as wide edges are in `rebuilt` as in `real`, per image `(N,)`; 1 is as sharp.

    Both `(N, 3, H, W)` in [0, 1]. An edge is a row or column of 8 pixels of one channel of `real` that only rises or
    only falls, by half of the range at least, and most in its middle. Its width is its contrast over its steepest step,
    in pixels. NaN where an image has no edge.
    """
    if min(real.shape[2:]) < PROFILE:
        return torch.full((len(real),), torch.nan)
    widths, weights = [], []
    for axis in (2, 3):
        original, profile = (x.unfold(axis, PROFILE, 1).flatten(1, 3) for x in (real, rebuilt))  # (N, P, 8)
        difference = original.diff(dim=2).abs()
        contrast = original.amax(2) - original.amin(2)
        monotone = difference.sum(2) <= MONOTONE * contrast
        weights.append((contrast >= STEP) & monotone & (difference.argmax(2) == PROFILE // 2 - 1))
        widths.append(_width(profile) / _width(original))
    return _mean_where(torch.cat(widths, 1), torch.cat(weights, 1))


def _width(profile: torch.Tensor) -> torch.Tensor:
    """Pixels that the contrast of profiles `(N, P, 8)` takes at their steepest step, `(N, P)`; at most 8."""
    contrast, steepest = profile.amax(2) - profile.amin(2), profile.diff(dim=2).abs().amax(2)
    return (contrast / steepest.clamp_min(1e-6)).clamp(1, PROFILE)


def _mean_where(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of each item's values at the mask, `(N,)`; NaN where that is nowhere."""
    values, mask = values.flatten(1), mask.flatten(1)
    return torch.where(mask, values, 0).sum(1) / mask.sum(1)
