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
from ldm.evaluation.memorization import missed_modes

BATCH = 32  # images in a feature network
SHOWN, SCALE, LABEL = 12, 2, 160  # images of a row of the picture; how much larger; pixels of its labels
EQUAL = 1.10  # times of training that lie nearer together count as equal
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
    "modes_missed": Metric("training images never drawn", "lower", 2),
    "bits": Metric("bits/dim, at most", "lower", 2),
    "draw_seconds": Metric("seconds to draw an image", "lower", 4),
}
OF_SETS = ("fid", "kid", "precision", "recall", "density", "coverage")  # `distances.measure` has these
WITHOUT_WINNER = {"parameters": ("parameters, million", 2), "train_seconds": ("processor seconds of training", 0)}


# ------------------------------------------------------------------------------------------------------------- figures


class Reference:
    """Features `(N, …)` of the training images and of as many held-out ones, with which samples are compared."""

    def __init__(self, network: FeatureNetwork, training: torch.Tensor, held_out: torch.Tensor):
        self.network = network
        self.training, self.held_out = features(network, training), features(network, held_out)

    def figures(self, samples: torch.Tensor) -> Values:
        """Of samples `(N, 3, S, S)` uint8."""
        drawn = features(self.network, samples)
        return self._of_sets(drawn) | {"modes_missed": missed_modes(self.training, drawn).share}

    def of_real(self) -> Values:
        """The ceiling: training images as if drawn; the modes are those that the held-out images miss."""
        return self._of_sets(self.training) | {"modes_missed": missed_modes(self.training, self.held_out).share}

    def _of_sets(self, drawn: Features) -> Values:
        measured = distances.measure(OF_SETS, self.held_out, drawn, bootstrap=0, network=self.network.label)
        values = {name: figure.value for name, figure in measured.items()}
        return values | {"kid": 1000 * values["kid"], "diversity": diversity(drawn.pooled.double())}


def features(network: FeatureNetwork, images: torch.Tensor) -> Features:
    """Of images `(N, 3, S, S)` uint8, in batches."""
    return Features.cat(network(part) for part in images.split(BATCH))


def diversity(x: torch.Tensor) -> float:
    """Mean Euclidean distance of two different images' features `(N, D)`."""
    return float(torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)))


# ------------------------------------------------------------------------------------------------------------ verdicts


def summary(runs: Sequence[Values]) -> dict[str, tuple[float, float]]:
    """Of each figure its mean and standard deviation over seeds; the latter is NaN for a single one."""
    return {
        name: (fmean(run[name] for run in runs), stdev(run[name] for run in runs) if len(runs) > 1 else float("nan"))
        for name in runs[0]
    }


def conclusion(name: str, families: Mapping[str, Sequence[float]], real: float | None) -> str:
    """Who wins a metric: the family of the best mean, if its lead over each other is significant.

    `families` has the values of the seeds by label; those that have no such figure take no part.
    """
    title, better = METRICS[name].title, METRICS[name].better
    if any(len(values) < 2 for values in families.values()):
        return f"{title}: one seed, no verdict"
    sign = -1 if better == "higher" else 1
    losses = {
        label: [abs(value - (real or 0.0)) if better == "real" else sign * value for value in values]
        for label, values in families.items()
    }
    first, *others = sorted(losses, key=lambda label: fmean(losses[label]))
    if not others:
        return f"{title}: only the {first} has one"
    behind = [label for label in others if differ(losses[first], losses[label])]
    if behind == others:
        return f"{title}: the {first} wins"
    level = [label for label in others if label not in behind]
    ahead = f"; the {first} is ahead of {_listed(behind)}" if behind else ""
    return f"{title}: {_listed([first, *level])} tie{ahead}"


def differ(a: Sequence[float], b: Sequence[float]) -> bool:
    """Whether the means of two families' seeds differ, by Welch's t-test: p < 0.05."""
    from scipy.stats import ttest_ind_from_stats

    if stdev(a) == stdev(b) == 0:
        return fmean(a) != fmean(b)
    return float(ttest_ind_from_stats(fmean(a), stdev(a), len(a), fmean(b), stdev(b), len(b), False).pvalue) < 0.05


def equal_compute(families: Mapping[str, Sequence[Values]]) -> str:
    """How far the mean times of training lie apart."""
    seconds = [fmean(run["train_seconds"] for run in runs) for runs in families.values()]
    ratio = max(seconds) / min(seconds)
    text = f"The longest training took {ratio:.2f} times the shortest"
    return text if ratio <= EQUAL else f"{text}: this is not equal compute"


def _listed(labels: Sequence[str]) -> str:
    *most, last = [f"the {label}" for label in labels]
    return f"{', '.join(most)} and {last}" if most else last


# -------------------------------------------------------------------------------------------------------------- output


def markdown(families: Mapping[str, Sequence[Values]], real: Values) -> str:
    """A row per figure, a column per family: mean ± standard deviation over seeds; the last one is of real images."""
    summaries = {label: summary(runs) for label, runs in families.items()}
    lines = [f"| | {' | '.join(families)} | real images |", "|---" * (len(families) + 2) + "|"]
    rows = WITHOUT_WINNER | {name: (metric.title, metric.digits) for name, metric in METRICS.items()}
    for name, (title, digits) in rows.items():
        cells = [_cell(s.get(name), digits) for s in summaries.values()]
        of_real = f"{real[name]:.{digits}f}" if name in real else ""
        lines.append(f"| {title}{_arrow(name)} | {' | '.join(cells)} | {of_real} |")
    return "\n".join(lines)


def conclusions(families: Mapping[str, Sequence[Values]], real: Values) -> list[str]:
    """A sentence per metric."""
    measured = {
        name: {label: [run[name] for run in runs] for label, runs in families.items() if name in runs[0]}
        for name in METRICS
    }
    return [conclusion(name, figures, real.get(name)) for name, figures in measured.items() if figures]


def _cell(value: tuple[float, float] | None, digits: int) -> str:
    if value is None:
        return "none"
    mean, spread = value
    return f"{mean:.{digits}f}" + ("" if isnan(spread) or not spread else f" ± {spread:.{digits}f}")


def _arrow(name: str) -> str:
    return {"lower": " ↓", "higher": " ↑", "real": ""}[METRICS[name].better] if name in METRICS else ""


def sample_sheet(rows: Mapping[str, torch.Tensor]) -> Image.Image:
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
