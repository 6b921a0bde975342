"""Does a model copy its training images, and does it leave some out?

A generated image is compared with its nearest training image. How near is suspicious depends on the image: simple ones
are near to everything. So the distance is divided by a scale that no training image can have moved: the distance to the
nearest held-out image (Meehan, Chaudhuri and Dasgupta, arXiv 2004.05675, compare the same two). Real held-out images,
which nobody copied, have such ratios too; the threshold is where 5 % of theirs are below. With fewer than a hundred,
where that is would be a matter of chance: training images stand for them, each compared with all others.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ldm.evaluation import bootstrap
from ldm.evaluation.features import Features
from ldm.evaluation.figures import Figure
from ldm.utils.errors import UserError

FALSE_ALARMS = 0.05  # share of real images below the threshold
ENOUGH_HELD_OUT = 100  # images; of 10, the share of an honest model exceeds 10 % in one of three cases
CLOSEST = 10  # pairs
ROWS = 1024  # images compared at once


@dataclass(frozen=True)
class ClosePair:
    """A generated image and the training image nearest to it, by their indices."""

    generated: int
    training: int
    distance: float
    ratio: float
    """Of the distance to the scale; below `Memorization.threshold` it counts as a copy."""


@dataclass(frozen=True)
class Memorization:
    """How many generated images are nearer to a training image than real images, unseen in training, are."""

    share: Figure
    """Of generated images below the threshold, in [0, 1]; about 0.05 of a model that copies nothing.

    Its interval is of the choice of generated images. The threshold's error is not in it: of 300 training images, the
    share of one honest model in 14 is above 0.10.
    """
    floor: float
    """The same share of the real images that the threshold is from, 0.05 at most."""
    threshold: float
    """Of ratios; 0 where 5 % of the real images are themselves copies of training images, and nothing can be told."""
    calibration: str
    """The real images that the threshold is from: `held-out images` or `training images`."""
    pairs: tuple[ClosePair, ...]
    """The ten of the smallest ratios, smallest first."""

    def __str__(self) -> str:
        if self.threshold == 0:
            return f"can't be told: 5 % of the {self.calibration} are copies of other training images"
        return f"{self.share.value:.1%} of {self.share.images} images are near-copies; of real images {self.floor:.1%}"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def memorization(
    training: Features,
    generated: Features,
    held_out: Features | None = None,
    network: str | None = None,
    prompts: Sequence[str] | None = None,
) -> Memorization:
    """Compares generated with training images; `held_out` are real images that were kept from training at random.

    The ratio of an image is its distance to the nearest training image, over that to the nearest held-out image (of a
    held-out image: the nearest other one). Without held-out images, or with fewer than 100, it is over the distance
    from that training image to the nearest other training image; the threshold is from training images, each compared
    with all others. Distances are Euclidean, of `Features.pooled`. `prompts` are those of the generated images.

    UserError if there are fewer than three training images, or none generated.
    """
    if len(training) < 3 or len(generated) < 1:
        raise UserError(
            f"memorization: {len(training)} training and {len(generated)} generated images; it needs 3 and 1"
        )
    train, drawn = training.pooled, generated.pooled
    distance, index = (column[:, 0] for column in nearest(drawn, train))
    if held_out is not None and len(held_out) >= ENOUGH_HELD_OUT:
        calibration = "held-out images"
        scale = nearest(drawn, held_out.pooled)[0][:, 0]
        real = _ratio(nearest(held_out.pooled, train)[0][:, 0], _others(held_out.pooled, 1)[0][:, 0])
    else:
        calibration = "training images"
        gaps, neighbors = _others(train, 2)
        scale = gaps[index, 0]
        real = _ratio(gaps[:, 0], _gap_without(gaps, neighbors))
    ratio = _ratio(distance, scale)
    threshold = float(real.sort().values[math.floor(FALSE_ALARMS * len(real))])  # that many are below it
    pairs = [
        ClosePair(i, int(index[i]), float(distance[i]), float(ratio[i])) for i in ratio.argsort()[:CLOSEST].tolist()
    ]
    share = bootstrap.mean((ratio < threshold).double(), network, prompts)
    return Memorization(share, float((real < threshold).double().mean()), threshold, calibration, tuple(pairs))


@dataclass(frozen=True)
class MissedModes:
    """How many training images a set of images never comes near."""

    share: float
    """Of training images that are the nearest one to no generated image, in [0, 1]; larger is worse."""
    expected: float
    """The same where each image is as likely to be near each training image: (1 − 1/N)^images."""
    images: int
    """Generated images, all of them."""
    real: float | None
    """The same of real images kept from training, which is what a perfect model has; None without such images."""
    share_of_as_many: float | None
    """That of the first generated images, as many as `real` is of: of fewer images, so larger; None without."""
    real_images: int
    """How many both are of: all held-out images, or as many as are generated."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def missed_modes(training: Features, generated: Features, held_out: Features | None = None) -> MissedModes:
    """The share of training images never drawn, for example by a GAN that has dropped modes.

    It falls with the number of images; compare models with equally many. UserError if there are no images.
    """
    if len(training) < 1 or len(generated) < 1:
        raise UserError(f"missed modes: {len(training)} training and {len(generated)} generated images; give some")
    drawn = nearest(generated.pooled, training.pooled)[1]

    def missed(hits: torch.Tensor) -> float:
        return 1 - len(hits.unique()) / len(training)

    as_many = min(len(generated), len(held_out)) if held_out is not None else 0
    real = share_of_as_many = None
    if held_out is not None and as_many:
        real = missed(nearest(held_out.pooled[:as_many], training.pooled)[1])
        share_of_as_many = missed(drawn[:as_many])
    expected = (1 - 1 / len(training)) ** len(drawn)
    return MissedModes(missed(drawn), expected, len(drawn), real, share_of_as_many, as_many)


def nearest(a: torch.Tensor, b: torch.Tensor, k: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of `(N, D)` the k nearest of `(M, D)`: distances in float64 and indices, `(N, k)`, nearest first.

    UserError if the features differ in width or are not finite.
    """
    if a.shape[1] != b.shape[1]:
        raise UserError(f"nearest images: features of {a.shape[1]} and {b.shape[1]} numbers; use one network for all")
    if not bool(a.isfinite().all() and b.isfinite().all()):
        raise UserError("nearest images: features have NaN or Inf; the images or the network are broken")
    b = b.detach().cpu().double()
    parts = [_nearest(part, b, k) for part in a.detach().cpu().double().split(ROWS)]
    distances, indices = zip(*parts, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _nearest(a: torch.Tensor, b: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Candidates by the fast product; their distances from differences, which is 0 for a copy."""
    near = torch.cdist(a, b).topk(min(k, len(b)), largest=False).indices
    distances = torch.stack([(a - b[column]).norm(dim=1) for column in near.T], dim=1)
    return distances, near


def _others(x: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """For each image the k nearest others of its set: distances and indices, `(N, k)`."""
    distances, indices = nearest(x, x, k + 1)
    itself = indices == torch.arange(len(x))[:, None]
    itself[~itself.any(1), -1] = True  # of more than k + 1 equal images any may be left out
    return distances[~itself].reshape(len(x), -1), indices[~itself].reshape(len(x), -1)


def _gap_without(gaps: torch.Tensor, neighbors: torch.Tensor) -> torch.Tensor:
    """With each image left out: from the image nearest to it, the distance to the nearest other one left."""
    nearest_one = neighbors[:, 0]
    is_mutual = neighbors[nearest_one, 0] == torch.arange(len(gaps))
    return torch.where(is_mutual, gaps[nearest_one, 1], gaps[nearest_one, 0])


def _ratio(distance: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A copy has 0, even where the scale is 0 too; other ratios stay finite."""
    return distance / scale.clamp(min=1e-12)
