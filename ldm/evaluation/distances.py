"""Metrics of generated images, from what a feature network sees in them and in real images.

Everything is computed in float64 on the CPU. Of each metric `METRICS` says what it needs and which way is better.

FID is biased: of N images it is too large by about c/N, where c depends on the model (Chong and Forsyth,
arXiv 1911.07023): two sets of the same D independent features of variance 1 have (D²/2 + 2.5·D)/N. The same holds for
sFID. CMMD is too large by at most 10/N + 10/M of N real and M generated images. k-NN metrics depend on the number of
images as well. Compare figures of equally many images only. KID is unbiased at any number.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F

from ldm.evaluation import bootstrap as resampling
from ldm.evaluation.bootstrap import Comparison
from ldm.evaluation.features import Features
from ldm.evaluation.figures import Figure
from ldm.utils.errors import UserError, unknown_choice

PRECISION_K = 3  # nearest neighbours, as arXiv 1904.06991 and torch-fidelity
DENSITY_K = 5  # as arXiv 2002.09797
CMMD_SIGMA, CMMD_SCALE = 10.0, 1000.0  # arXiv 2401.09603
FID_SPLITS = 10  # 21 distances: of halves of 10,000 images, 2048 features, each takes 9 s on a CPU core
ROWS = 1024  # of a matrix of kernels or distances at once


@dataclass(frozen=True)
class Pair:
    """Real and generated images' features in float64, with the sets of them that a metric is computed of."""

    real: Features
    generated: Features
    text: torch.Tensor | None
    """`(M, D)`: the features of each generated image's prompt, by the same network."""
    real_sets: torch.Tensor
    """`(R, N)` bool: R sets of real images."""
    generated_sets: torch.Tensor
    """`(R, M)` bool: as many sets of generated ones."""

    @cached_property
    def real_to_generated(self) -> torch.Tensor:
        """Distances `(N, M)`."""
        return pairwise_distances(self.real.pooled, self.generated.pooled)

    @cached_property
    def real_radii(self) -> list[torch.Tensor]:
        """Of each set `(n, K)`: distances of each real image to its nearest ones in the set, itself the first."""
        return _radii(pairwise_distances(self.real.pooled, self.real.pooled), self.real_sets)

    @cached_property
    def generated_radii(self) -> list[torch.Tensor]:
        """The same of generated images."""
        return _radii(pairwise_distances(self.generated.pooled, self.generated.pooled), self.generated_sets)

    def cross_distances(self) -> Iterable[torch.Tensor]:
        """Of each set: distances `(n, m)` of real to generated images."""
        for real, generated in zip(self.real_sets, self.generated_sets, strict=True):
            yield _submatrix(self.real_to_generated, real, generated)


@dataclass(frozen=True)
class Metric:
    """What there is to know of a metric."""

    values: Callable[[Pair], torch.Tensor]
    """Its value `(R,)` for each of the sets of a pair."""
    larger_is_better: bool
    min_images: int
    """Of real and of generated images."""
    help: str
    needs: Literal["spatial", "logits", "text"] | None = None
    """Besides pooled features."""
    lowest: float = -math.inf
    highest: float = math.inf
    max_splits: int | None = None
    """Into halves, for its interval, where a metric is slow to compute."""

    def splits(self, splits: int, images: int) -> int:
        """How many splits into halves, of `splits` at most, its interval is from."""
        if images // 2 < self.min_images:
            return 0
        return splits if self.max_splits is None else min(splits, self.max_splits)


def fid(pair: Pair) -> torch.Tensor:
    """‖μ − μ'‖² + tr(Σ + Σ' − 2·√(Σ·Σ')), arXiv 1706.08500, eq. 6."""
    return _frechet(pair, pair.real.pooled, pair.generated.pooled)


def sfid(pair: Pair) -> torch.Tensor:
    """FID of features that keep where things are, arXiv 2103.03841."""
    return _frechet(pair, _present(pair.real.spatial), _present(pair.generated.spatial))


def kid(pair: Pair) -> torch.Tensor:
    """The squared MMD of the kernel (x·y/D + 1)³, unbiased, arXiv 1801.01401, sec. 4; can be below 0.

    Of all images at once. torch-fidelity averages over random subsets of 1,000: the same estimate with more noise.
    """
    width = pair.real.pooled.shape[1]
    return _mmd(pair, pair.real.pooled, pair.generated.pooled, lambda x, y: (x @ y.T / width + 1) ** 3, biased=False)


def cmmd(pair: Pair) -> torch.Tensor:
    """1000 times the squared MMD of a Gaussian kernel of σ = 10 on features of unit length, arXiv 2401.09603.

    The biased estimate, diagonal included, as the authors' code has it; theirs are features of CLIP ViT-L/14, 336 px.
    """

    def kernel(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.exp((x @ y.T - 1) / CMMD_SIGMA**2)  # ‖x − y‖² = 2 − 2·x·y

    real, generated = (F.normalize(features.pooled, dim=1) for features in (pair.real, pair.generated))
    return CMMD_SCALE * _mmd(pair, real, generated, kernel, biased=True)


def inception_score(pair: Pair) -> torch.Tensor:
    """exp(E KL(p(y|x) ‖ p(y))), arXiv 1606.03498, of generated images alone; from 1 to the number of classes.

    Over all images at once (arXiv 1801.01973); papers often have the mean of ten parts, which is lower.
    """
    log_p = _present(pair.generated.logits).log_softmax(1)
    weights = pair.generated_sets.double() / pair.generated_sets.sum(1, keepdim=True)  # (R, M)
    marginal = weights @ log_p.exp()  # (R, K)
    return (weights @ torch.special.entr(log_p.exp()).sum(1)).neg().add(torch.special.entr(marginal).sum(1)).exp()


def precision(pair: Pair) -> torch.Tensor:
    """Share of generated images within the third-nearest real neighbour's distance of a real one, arXiv 1904.06991."""
    sets = zip(pair.cross_distances(), pair.real_radii, strict=True)
    return _shares((distances <= radii[:, PRECISION_K, None]).any(0) for distances, radii in sets)


def recall(pair: Pair) -> torch.Tensor:
    """Share of real images within the third-nearest generated neighbour's distance of a generated one."""
    sets = zip(pair.cross_distances(), pair.generated_radii, strict=True)
    return _shares((distances <= radii[:, PRECISION_K]).any(1) for distances, radii in sets)


def density(pair: Pair) -> torch.Tensor:
    """How many real images' balls, of radius to the fifth neighbour, hold a generated image, over 5; 2002.09797, eq. 4.

    1 for equal distributions; it can be above 1.
    """
    sets = zip(pair.cross_distances(), pair.real_radii, strict=True)
    return _shares((distances < radii[:, DENSITY_K, None]).sum(0).double() / DENSITY_K for distances, radii in sets)


def coverage(pair: Pair) -> torch.Tensor:
    """Share of real images whose ball, of radius to the fifth neighbour, holds a generated one; 2002.09797, eq. 5."""
    sets = zip(pair.cross_distances(), pair.real_radii, strict=True)
    return _shares((distances < radii[:, DENSITY_K, None]).any(1) for distances, radii in sets)


def clip_score(pair: Pair) -> torch.Tensor:
    """100 times the mean cosine of images and their prompts, not below 0, arXiv 2104.08718, as torchmetrics has it."""
    weights = pair.generated_sets.double() / pair.generated_sets.sum(1, keepdim=True)
    return (weights @ clip_scores(pair.generated.pooled, _present(pair.text))).clamp(min=0)


def clip_scores(images: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """100 times the cosine of each image, `(N, D)`, and its own text, `(N, D)`: `(N,)`."""
    return 100 * F.cosine_similarity(images.double(), text.double(), dim=1)


METRICS: dict[str, Metric] = {
    "fid": Metric(
        fid,
        False,
        2,
        "how far generated images are from real ones, in quality and in variety",
        lowest=0,
        max_splits=FID_SPLITS,
    ),
    "sfid": Metric(
        sfid, False, 2, "FID that sees where things are in an image", "spatial", lowest=0, max_splits=FID_SPLITS
    ),
    "kid": Metric(kid, False, 2, "as FID, but not larger for fewer images"),
    "is": Metric(
        inception_score, True, 2, "how clear and how varied the classes of generated images are", "logits", lowest=1
    ),
    "precision": Metric(
        precision, True, PRECISION_K + 1, "share of generated images that look real", lowest=0, highest=1
    ),
    "recall": Metric(
        recall, True, PRECISION_K + 1, "share of real images that the model could make", lowest=0, highest=1
    ),
    "density": Metric(density, True, DENSITY_K + 1, "as precision, but outliers count little", lowest=0),
    "coverage": Metric(coverage, True, DENSITY_K + 1, "as recall, but outliers count little", lowest=0, highest=1),
    "cmmd": Metric(cmmd, False, 2, "as KID, with CLIP's features; agrees better with people than FID", lowest=0),
    "clip_score": Metric(clip_score, True, 1, "how well images fit their prompts", "text", lowest=0, highest=100),
}


def measure(
    names: Sequence[str],
    real: Features,
    generated: Features,
    *,
    text: torch.Tensor | None = None,
    bootstrap: int = resampling.SPLITS,
    seed: int = 0,
    network: str | None = None,
) -> dict[str, Figure]:
    """The metrics of some `names`, keys of `METRICS`.

    `text` `(M, D)` are the features of the generated images' prompts. `bootstrap` is the number of splits into halves
    for 95 % intervals, see `ldm/evaluation/bootstrap.py`, 10 at most for FID; 0 gives none, and so do sets whose halves
    are too small. Intervals allow for the choice of real and of generated images. `network` is `FeatureNetwork.label`.

    UserError for an unknown name, features that are missing, differ in width or are not finite, or too few images.
    """
    values = _values(names, real, generated, text, bootstrap, seed)
    figures = {}
    for name, metric in ((name, METRICS[name]) for name in names):
        low = high = None
        if len(values[name]) > 1:
            low, high = (
                min(max(end, metric.lowest), metric.highest) for end in resampling.interval_of_set(values[name])
            )
        figures[name] = Figure(float(values[name][0]), low, high, len(generated), network)
    return figures


def compare(
    names: Sequence[str],
    real: Features,
    a: Features,
    b: Features,
    *,
    text: torch.Tensor | None = None,
    bootstrap: int = resampling.SPLITS,
    seed: int = 0,
) -> dict[str, Comparison]:
    """Two runs' metrics, of images of the same prompts and seeds, split into the same halves; as `measure`.

    UserError also where there are not equally many images, or too few to split.
    """
    if len(a) != len(b):
        raise UserError(f"comparing runs: {len(a)} and {len(b)} images; give the same prompts and seeds")
    for name in _known(names):
        if bootstrap < 1 or min(len(a), len(real)) // 2 < METRICS[name].min_images:
            raise UserError(f"comparing runs: {name} needs {2 * METRICS[name].min_images} images, and bootstrap ≥ 1")
    first, second = (_values(names, real, run, text, bootstrap, seed) for run in (a, b))
    return {
        name: resampling.compare_sets(first[name], second[name], larger_is_better=METRICS[name].larger_is_better)
        for name in names
    }


def pairwise_distances(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Euclidean distances `(N, M)` of `(N, D)` and `(M, D)`, computed in float64, kept in float32 for their size."""
    b = b.double()
    parts = [torch.cdist(part, b, compute_mode="use_mm_for_euclid_dist").float() for part in a.double().split(ROWS)]
    return torch.cat(parts)


def _values(
    names: Sequence[str], real: Features, generated: Features, text: torch.Tensor | None, splits: int, seed: int
) -> dict[str, torch.Tensor]:
    """By name the metric's value of all images, and of the halves of each split if they are large enough."""
    for name in _known(names):
        _check(name, METRICS[name], real, generated, text)
    real, generated = _double(real), _double(generated)
    text = None if text is None else text.detach().cpu().double()
    sets = (
        resampling.halves(seed, name, len(features), splits)
        for name, features in (("real images", real), ("generated images", generated))
    )
    real_sets, generated_sets = sets
    pairs: dict[int, Pair] = {}  # metrics of as many sets share the distances between images
    values = {}
    for name in names:
        metric = METRICS[name]
        count = 1 + 2 * metric.splits(splits, min(len(real), len(generated)))
        pair = pairs.setdefault(count, Pair(real, generated, text, real_sets[:count], generated_sets[:count]))
        values[name] = metric.values(pair)
    return values


def _frechet(pair: Pair, real: torch.Tensor, generated: torch.Tensor) -> torch.Tensor:
    values = []
    for chosen, drawn in zip(pair.real_sets, pair.generated_sets, strict=True):
        (mean_1, factor_1), (mean_2, factor_2) = (_moments(x) for x in (real[chosen], generated[drawn]))
        # With Σ = AᵀA, √ of the eigenvalues of Σ·Σ' are the singular values of A·A'ᵀ
        root = torch.linalg.svdvals(factor_1 @ factor_2.T).sum()
        values.append((mean_1 - mean_2).square().sum() + factor_1.square().sum() + factor_2.square().sum() - 2 * root)
    return torch.stack(values).clamp(min=0)


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of `(n, D)` the mean `(D,)`, and a factor A `(min(n, D), D)` of the covariance AᵀA."""
    mean = x.mean(0)
    factor = (x - mean) / math.sqrt(len(x) - 1)
    return mean, factor if len(x) <= x.shape[1] else torch.linalg.qr(factor, mode="r").R


def _mmd(
    pair: Pair,
    real: torch.Tensor,
    generated: torch.Tensor,
    kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    biased: bool,
) -> torch.Tensor:
    """E k(x, x') + E k(y, y') − 2·E k(x, y) of each of the sets; `biased` takes in each image with itself."""
    in_real, in_generated = pair.real_sets.double(), pair.generated_sets.double()
    mean = _kernel_sum(kernel, real, generated, in_real, in_generated) / (in_real.sum(1) * in_generated.sum(1))
    value = -2 * mean
    for x, members in ((real, in_real), (generated, in_generated)):
        n = members.sum(1)
        total = _kernel_sum(kernel, x, x, members, members)
        if biased:
            value += total / n**2
        else:
            itself = torch.cat([kernel(part, part).diagonal() for part in x.split(ROWS)])
            value += (total - members @ itself) / (n * (n - 1))
    return value


def _kernel_sum(
    kernel: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    x: torch.Tensor,
    y: torch.Tensor,
    in_x: torch.Tensor,
    in_y: torch.Tensor,
) -> torch.Tensor:
    """Σ k(x, y) over the pairs of each of R sets, `(R,)`; a block of rows of the kernel's matrix at once serves all."""
    total = x.new_zeros(len(in_x))
    for rows, members in zip(x.split(ROWS), in_x.split(ROWS, dim=1), strict=True):
        total += ((members @ kernel(rows, y)) * in_y).sum(1)
    return total


def _radii(distances: torch.Tensor, sets: torch.Tensor) -> list[torch.Tensor]:
    count = max(PRECISION_K, DENSITY_K) + 1
    radii = []
    for members in sets:
        part = _submatrix(distances, members, members).fill_diagonal_(0)
        radii.append(part.topk(min(count, len(part)), largest=False).values)
    return radii


def _submatrix(matrix: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return matrix[rows][:, columns]


def _shares(scores: Iterable[torch.Tensor]) -> torch.Tensor:
    """The mean of each set's scores."""
    return torch.stack([score.double().mean() for score in scores])


def _double(features: Features) -> Features:
    spatial, logits = (
        None if value is None else value.detach().cpu().double() for value in (features.spatial, features.logits)
    )
    return Features(features.pooled.detach().cpu().double(), spatial, logits)


def _present(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None, "checked by _check"
    return tensor


def _known(names: Sequence[str]) -> Sequence[str]:
    for name in names:
        if name not in METRICS:
            raise unknown_choice("metric", name, list(METRICS))
    return names


def _check(name: str, metric: Metric, real: Features, generated: Features, text: torch.Tensor | None) -> None:
    """UserError if the metric can't be computed."""
    tensors = {"real images": real.pooled, "generated images": generated.pooled}
    if metric.needs == "spatial":
        if real.spatial is None or generated.spatial is None:
            raise UserError(f"{name}: the network has no spatial features; give inception")
        tensors = {"real images": real.spatial, "generated images": generated.spatial}
    elif metric.needs == "logits":
        if generated.logits is None:
            raise UserError(f"{name}: the network does not classify; give inception")
        tensors = {"generated images": generated.logits}
    elif metric.needs == "text":
        if text is None or text.shape != generated.pooled.shape:
            raise UserError(f"{name}: needs CLIP's features of each image's prompt; give clip and captioned images")
        tensors = {"generated images": generated.pooled, "prompts": text}
    for whose, features in tensors.items():
        if len(features) < metric.min_images:
            raise UserError(f"{name}: {len(features)} {whose}; it needs {metric.min_images} or more")
        if not bool(features.isfinite().all()):
            raise UserError(f"{name}: features of the {whose} have NaN or Inf; the images or the network are broken")
    widths = {features.shape[1] for features in tensors.values()}
    if len(widths) > 1:
        raise UserError(
            f"{name}: features of {' and '.join(map(str, sorted(widths)))} numbers; use one network for all"
        )
