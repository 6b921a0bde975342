"""Error bars of figures, and whether two runs can be told apart.

A mean over images has an interval in closed form. A metric of a whole set, such as FID, has none, and the usual
bootstrap is wrong for it: drawing images with replacement puts copies into the set, which are nearest neighbours at
distance 0, and which make a set look smaller than it is. Sets are split into random halves without replacement instead:
half of the difference between the two halves' figures varies as the whole set's figure does (balanced half-samples,
McCarthy 1969; the delete-half jackknife, Shao and Wu 1989). What a metric is off for small sets, as FID is, is the same
in both halves and cancels. The interval is therefore around the measured value; it tells how far the figure would move
with other images, equally many, and does not correct it for a small set.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from ldm.evaluation.figures import Figure
from ldm.utils import rng
from ldm.utils.errors import UserError

CONFIDENCE = 0.95
SPLITS = 50  # into halves: the width of an interval is then within some 10 % of what endless splits give
SIGN_FLIPS = 9999


@dataclass(frozen=True)
class Comparison:
    """Of two runs' figures, on the same prompts and seeds."""

    difference: float
    """The first run's figure less the second's."""
    low: float
    """Lower end of the difference's 95 % interval."""
    high: float
    p: float
    """How often runs that are equally good differ by this much or more."""
    larger_is_better: bool = True

    def __str__(self) -> str:
        if self.p >= 1 - CONFIDENCE or self.difference == 0:
            return f"can't be told apart (p = {self.p:.2g})"
        better = (self.difference > 0) == self.larger_is_better
        return f"{'better' if better else 'worse'}, p {'< 0.001' if self.p < 0.001 else f'= {self.p:.1g}'}"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "verdict": str(self)}


def halves(seed: int, stream: str, n: int, splits: int) -> torch.Tensor:
    """Masks `(1 + 2·splits, n)` of n images: of all, then of the two halves of each split."""
    masks = torch.ones(1 + 2 * splits, n, dtype=torch.bool)
    for split in range(splits):
        order = rng.generator(seed, f"halves of {stream}", split).permutation(n)
        masks[1 + 2 * split] = torch.from_numpy(order < n // 2)
        masks[2 + 2 * split] = ~masks[1 + 2 * split]
    return masks


def standard_error(values: torch.Tensor) -> float:
    """That of the whole set's figure, from the `values` `(1 + 2·splits,)` of the sets of `halves`."""
    first, second = values[1:].reshape(-1, 2).T
    return float(((first - second) / 2).square().mean().sqrt())


def interval_of_set(values: torch.Tensor) -> tuple[float, float]:
    """The 95 % interval around a set's figure, by Student's t of as many degrees as splits; `values` as above.

    It is up to 1.4 times too wide for a distance between equal distributions, whose error shrinks faster with the
    number of images than halves show, and too narrow for a share whose limit, 0 or 1, is within the interval.
    """
    margin = _t((len(values) - 1) // 2) * standard_error(values)
    return float(values[0]) - margin, float(values[0]) + margin


def mean(scores: torch.Tensor, network: str | None = None, prompts: Sequence[Hashable] | None = None) -> Figure:
    """The mean of scores `(N,)` of images, with its 95 % interval: Wilson's where each is 0 or 1, else Student's t.

    Images of one prompt are not independent: where some of the N `prompts` are equal, the interval is of as many
    prompts, by their images' summed deviations (Liang and Zeger 1986); of equally many images each, that is Student's t
    of the means per prompt. A single prompt has none. UserError if a score is NaN.
    """
    values = _checked(scores)
    value, n = float(values.mean()), len(values)
    clusters = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts if prompts is not None else range(n)))}
    count = len(clusters)
    binary = bool(((values == 0) | (values == 1)).all())
    if count == 1:
        return Figure(value, None, None, n, network) if n > 1 or not binary else _wilson(value, 1, n, network)
    if binary and (count == n or value in (0, 1)):
        return _wilson(value, count, n, network)
    cluster = torch.tensor([clusters[prompt] for prompt in prompts]) if prompts is not None else torch.arange(n)
    deviations = torch.zeros(count, dtype=values.dtype).index_add(0, cluster, values - value)
    margin = _t(count - 1) * math.sqrt(count / (count - 1)) * float(deviations.norm()) / n
    low, high = value - margin, value + margin
    if binary:  # a share, whatever Student's t says
        low, high = max(0.0, low), min(1.0, high)
    return Figure(value, low, high, n, network)


def _wilson(share: float, trials: int, images: int, network: str | None) -> Figure:
    from scipy.stats import binomtest

    ends = binomtest(round(share * trials), trials).proportion_ci(CONFIDENCE, method="wilson")
    return Figure(share, float(ends.low), float(ends.high), images, network)


def compare(a: torch.Tensor, b: torch.Tensor, *, larger_is_better: bool = True, seed: int = 0) -> Comparison:
    """Two runs by the scores `(N,)` of their images, the i-th of both of the same prompt and seed.

    p is that of the signs of the differences: exact where few differ (of 0 and 1, McNemar's exact test), else of 9,999
    random flips. UserError if there are not equally many, or fewer than two.
    """
    a, b = _checked(a), _checked(b)
    if len(a) != len(b) or len(a) < 2:
        raise UserError(f"comparing runs: {len(a)} and {len(b)} images; give the same prompts and seeds, 2 or more")
    difference = a - b
    value = float(difference.mean())
    margin = _t(len(a) - 1) * float(difference.std()) / math.sqrt(len(a))
    return Comparison(value, value - margin, value + margin, _sign_flips(difference, seed), larger_is_better)


def compare_sets(a: torch.Tensor, b: torch.Tensor, *, larger_is_better: bool) -> Comparison:
    """Two runs by a metric of their whole sets; `values` of the same `halves` of both."""
    from scipy.stats import t

    difference = a - b
    low, high = interval_of_set(difference)
    error = standard_error(difference)
    value = float(difference[0])
    p = 2 * float(t.sf(abs(value) / error, (len(a) - 1) // 2)) if error else float(value == 0)
    return Comparison(value, low, high, p, larger_is_better)


def _sign_flips(difference: torch.Tensor, seed: int) -> float:
    from scipy.stats import permutation_test

    differing = difference[difference != 0].numpy()  # the others stay 0 whatever their sign
    if len(differing) < 2:  # either sign of a single one is as likely
        return 1.0
    result = permutation_test(
        (differing,),
        np.mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=SIGN_FLIPS,
        batch=max(1, 10**7 // len(differing)),
        rng=rng.generator(seed, "sign flips", 0),
    )
    return float(result.pvalue)


def _t(degrees: int) -> float:
    from scipy.stats import t  # takes a second to import

    return float(t.ppf((1 + CONFIDENCE) / 2, degrees))


def _checked(scores: torch.Tensor) -> torch.Tensor:
    values = scores.detach().cpu().double()
    if values.dim() != 1 or len(values) == 0 or not bool(values.isfinite().all()):
        raise UserError("scores of images: give a finite number for each of one or more images")
    return values
