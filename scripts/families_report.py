"""What is measured of a family's samples; tables, verdicts and the picture of a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isnan
from statistics import fmean, stdev
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont

from ldm.data.images import to_pil
from ldm.evaluation import distances
from ldm.evaluation.features import FeatureNetwork, Features
from ldm.utils.rng import generator

BATCH = 32  # images in a feature network
MODES, LEAST_PER_MODE = 50, 4  # clusters of training images; fewer where they would have fewer images
LLOYD_STEPS = 50
SHOWN, SCALE, LABEL = 12, 2, 116  # images of a row of the picture; how much larger; pixels of its labels
Values = dict[str, float]


class Metric(NamedTuple):
    title: str
    better: str
    """`lower`, `higher`, or `real`: nearer to the value of real images."""
    digits: int


METRICS = {
    "fid": Metric("Fréchet distance", "lower", 1),
    "kid": Metric("KID × 1000", "lower", 1),
    "precision": Metric("precision", "higher", 2),
    "recall": Metric("recall", "higher", 2),
    "density": Metric("density", "higher", 2),
    "coverage": Metric("coverage", "higher", 2),
    "diversity": Metric("diversity", "real", 2),
    "modes_missed": Metric("modes never drawn", "lower", 2),
    "bits": Metric("bits/dim, at most", "lower", 2),
    "draw_seconds": Metric("seconds an image", "lower", 5),
}
OF_SETS = ("fid", "kid", "precision", "recall", "density", "coverage")  # `distances.measure` has these
WITHOUT_WINNER = ("parameters", "train_seconds")


# ------------------------------------------------------------------------------------------------------------- figures


class Reference:
    """Features of the images that samples are compared with: held-out ones, and modes of the training images."""

    def __init__(self, network: FeatureNetwork, training: torch.Tensor, held_out: torch.Tensor):
        self.network, self.held_out = network, features(network, held_out)
        self.training = features(network, training)
        modes = max(1, min(MODES, len(training) // LEAST_PER_MODE))
        self.modes = cluster(self.training.pooled.double(), modes)

    def figures(self, samples: torch.Tensor) -> Values:
        """Of as many samples `(N, 3, S, S)` uint8 as there are held-out images."""
        return self._figures(features(self.network, samples), modes_of=None)

    def of_real(self) -> Values:
        """The ceiling: training images as if drawn; the modes are those that held-out images miss."""
        return self._figures(self.training[: len(self.held_out)], modes_of=self.held_out)

    def _figures(self, drawn: Features, modes_of: Features | None) -> Values:
        measured = distances.measure(OF_SETS, self.held_out, drawn, bootstrap=0, network=self.network.label)
        values = {name: figure.value for name, figure in measured.items()}
        values["kid"] *= 1000
        return values | {
            "diversity": diversity(drawn.pooled.double()),
            "modes_missed": modes_missed(self.modes, (modes_of or drawn).pooled.double()),
        }


def features(network: FeatureNetwork, images: torch.Tensor) -> Features:
    """Of images `(N, 3, S, S)` uint8, in batches."""
    return Features.cat(network(part) for part in images.split(BATCH))


def diversity(x: torch.Tensor) -> float:
    """Mean Euclidean distance of two different images' features `(N, D)`."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


def cluster(x: torch.Tensor, count: int) -> torch.Tensor:
    """Centres `(count, D)` of k-means (Lloyd's algorithm) of `(N, D)`, from random points of it."""
    centres = x[generator(0, "modes", 0).choice(len(x), count, replace=False)]
    for _ in range(LLOYD_STEPS):
        members = torch.eye(count, dtype=x.dtype)[torch.cdist(x, centres).argmin(1)]  # (N, count)
        sizes = members.sum(0)[:, None]
        centres = torch.where(sizes > 0, members.T @ x / sizes.clamp(min=1), centres)
    return centres


def modes_missed(centres: torch.Tensor, drawn: torch.Tensor) -> float:
    """Share of `centres` `(K, D)` that are the nearest one of no drawn image `(N, D)`.

    The bins of Richardson and Weiss, arXiv 1805.12462, section 2, by features instead of pixels.
    """
    return 1 - len(torch.cdist(drawn, centres).argmin(1).unique()) / len(centres)


# ------------------------------------------------------------------------------------------------------------ verdicts


def summary(runs: Sequence[Values]) -> dict[str, tuple[float, float]]:
    """Of each figure its mean and standard deviation over seeds; the latter is NaN for a single one."""
    return {
        name: (fmean(run[name] for run in runs), stdev(run[name] for run in runs) if len(runs) > 1 else float("nan"))
        for name in runs[0]
    }


def verdict(name: str, families: Mapping[str, tuple[float, float]], real: float | None) -> str:
    """Who wins a metric: the best, if it leads each other by more than both standard deviations together.

    `families` has mean and standard deviation by label; those that have no such figure take no part.
    """
    title, better = METRICS[name].title, METRICS[name].better
    if any(isnan(spread) for _, spread in families.values()):
        return f"{title}: one seed, no verdict"

    def loss(label: str) -> float:
        value = families[label][0]
        return abs(value - (real or 0.0)) if better == "real" else -value if better == "higher" else value

    ranked = sorted(families, key=loss)
    first, *others = ranked
    if not others:
        return f"{title}: only the {first} has one"
    level = [o for o in others if loss(o) - loss(first) <= families[first][1] + families[o][1]]
    if not level:
        return f"{title}: the {first} wins"
    behind = [label for label in others if label not in level]
    return f"{title}: {_listed([first, *level])} tie" + (f", ahead of {_listed(behind)}" if behind else "")


def _listed(labels: Sequence[str]) -> str:
    *most, last = [f"the {label}" for label in labels]
    return f"{', '.join(most)} and {last}" if most else last


# -------------------------------------------------------------------------------------------------------------- output


def markdown(families: Mapping[str, Sequence[Values]], real: Values) -> str:
    """A row per figure, a column per family: mean ± standard deviation over seeds; the last one is of real images."""
    summaries = {label: summary(runs) for label, runs in families.items()}
    lines = [f"| | {' | '.join(families)} | real images |", "|---" * (len(families) + 2) + "|"]
    rows = [("parameters", "parameters, million", 2), ("train_seconds", "seconds of training", 0)]
    for name, title, digits in rows + [(name, metric.title, metric.digits) for name, metric in METRICS.items()]:
        cells = [_cell(s.get(name), digits) for s in summaries.values()]
        of_real = f"{real[name]:.{digits}f}" if name in real else ""
        lines.append(f"| {title}{_arrow(name)} | {' | '.join(cells)} | {of_real} |")
    return "\n".join(lines)


def verdicts(families: Mapping[str, Sequence[Values]], real: Values) -> list[str]:
    """A sentence per metric."""
    summaries = {label: summary(runs) for label, runs in families.items()}
    measured = {name: {label: s[name] for label, s in summaries.items() if name in s} for name in METRICS}
    return [verdict(name, figures, real.get(name)) for name, figures in measured.items() if figures]


def _cell(value: tuple[float, float] | None, digits: int) -> str:
    if value is None:
        return "none"
    mean, spread = value
    return f"{mean:.{digits}f}" + ("" if isnan(spread) or not spread else f" ± {spread:.{digits}f}")


def _arrow(name: str) -> str:
    return {"lower": " ↓", "higher": " ↑", "real": ""}[METRICS[name].better] if name in METRICS else ""


def picture(rows: Mapping[str, torch.Tensor]) -> Image.Image:
    """Two lines of images per label, from `(N, 3, S, S)` in [-1, 1]; the label is at their left."""
    side = SCALE * next(iter(rows.values())).shape[-1]
    pad, lines = 4, 2
    columns = SHOWN
    height = lines * (side + pad) + 2 * pad
    sheet = Image.new("RGB", (LABEL + columns * (side + pad) + pad, height * len(rows)), "#d0d0d0")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    for row, (label, images) in enumerate(rows.items()):
        draw.text((8, row * height + height // 2), label, "black", font, "lm")
        for i, image in enumerate(to_pil(images[: lines * columns])):
            x, y = LABEL + (i % columns) * (side + pad), row * height + pad + (i // columns) * (side + pad)
            sheet.paste(image.resize((side, side), Image.Resampling.NEAREST), (x, y))
    return sheet
