"""Several runs side by side: what differs, which is better as far as can be told, curves in one chart."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from ldm.config.loader import differences
from ldm.evaluation.bootstrap import compare
from ldm.evaluation.distances import METRICS
from ldm.evaluation.figures import Figure
from ldm.evaluation.report import elements, sections
from ldm.evaluation.report.charts import COLORS, Series, line_chart, number
from ldm.evaluation.report.collect import Run, as_figure
from ldm.evaluation.report.elements import Raw, Section
from ldm.evaluation.report.sections import Curve

IMAGES_BYTES = 2_800_000  # of all runs' images
CURVES = (
    Curve("Training loss", {"loss": ""}, noisy=True),
    Curve("Loss on held-out images", {"held_out_loss": ""}),
    Curve("Loss on training images", {"trained_on_loss": ""}),
    Curve("Learning rate", {"lr": ""}, linear=True),
)
NO_VALUE = "–"
IGNORED = ("run.dir", "data.cache_dir")  # keys that no result depends on


def comparison(runs: Sequence[Run]) -> str:
    """A document of HTML about two or more runs."""
    runs = _named(runs)
    images = [sections.Images(run.notes) for run in runs]
    charts = [_chart(runs, curve) for curve in CURVES]
    charts.insert(3, sections.level_profile((run.name, run.stage2) for run in runs))
    figures = _figures(runs) + _paired(runs)
    parts = [
        Section("figures", "Figures", figures),
        Section("scores", "Other scores" if figures else "Scores", _scores(runs)),
        Section("samples", "Samples", _samples(runs, images)),
        Section("evaluated", "Figures while training", sections.chart_grid(_figure_charts(runs))),
        Section("curves", "Training", sections.chart_grid(charts)),
        Section("settings", "What differs", _settings(runs)),
        Section("speed", "Time and memory", _speed(runs)),
    ]
    names = [run.name for run in runs]
    legend = "".join(
        f'<span><i class="c{i % COLORS}"></i>{elements.text(run.name)}: {elements.text(run.folder)}</span>'
        for i, run in enumerate(runs)
    )
    notes = [f"{run.name}: {note}" for run in runs for note in run.notes]
    lead = f"{len(runs)} runs side by side"
    foot = "Brackets and bands are 95 % intervals. A pointer on a chart shows its values."
    title = " · ".join(names) if len(names) < 5 else f"{len(names)} runs"
    return elements.document(title, lead, notes, f'<div class="legend runs">{legend}</div>', parts, foot)


def best_of(figures: Mapping[str, Figure], larger_is_better: bool, references: Iterable[object]) -> Raw:
    """Which run is best by a figure, and which can't be told apart from it: their 95 % intervals overlap it.

    Figures without intervals, or of different networks, training images or numbers of images, are not compared.
    `references` are the runs' own, as `RealImages.fingerprint` has them; None where not known.
    """
    if len({figure.network for figure in figures.values()}) > 1:
        return Raw('<span class="even">different networks: not comparable</span>')
    if None in (known := set(references)):
        return Raw('<span class="even">measured by an older version: not known to be comparable</span>')
    if len(known) > 1:
        return Raw('<span class="even">different networks or training images: not comparable</span>')
    if len({figure.images for figure in figures.values()}) > 1:
        return Raw('<span class="even">different numbers of images: not comparable</span>')
    if any(figure.low is None or figure.high is None for figure in figures.values()):
        return Raw('<span class="even">no error bars</span>')
    choose = max if larger_is_better else min
    best = choose(figures, key=lambda name: figures[name].value)
    like_best = [name for name in figures if name != best and _overlap(figures[name], figures[best])]
    if len(like_best) == len(figures) - 1:
        return Raw('<span class="even">can\'t be told apart</span>')
    others = f", can't be told apart from {', '.join(like_best)}" if like_best else ""
    return Raw(f'<span class="good">{elements.text(best)} is best{elements.text(others)}</span>')


def _overlap(a: Figure, b: Figure) -> bool:
    ends = (a.low, a.high, b.low, b.high)
    assert all(end is not None for end in ends)
    return a.low <= b.high and b.low <= a.high  # type: ignore[operator]


def _named(runs: Sequence[Run]) -> list[Run]:
    """Runs with distinct names: the folder's, or its path where two are called alike."""
    counts = Counter(run.name for run in runs)
    return [replace(run, name=str(run.folder)) if counts[run.name] > 1 else run for run in runs]


def _chart(runs: Sequence[Run], curve: Curve) -> str:
    """The runs' lines; empty where a single point is all that a run has, which the scores show too."""
    (name,) = curve.metrics
    lines = [Series(run.name, run.stage2.points(name), color=i, noisy=curve.noisy) for i, run in enumerate(runs)]
    return line_chart(curve.title, lines, linear=curve.linear) if any(len(line.points) > 1 for line in lines) else ""


def _figure_charts(runs: Sequence[Run]) -> list[str]:
    kinds = sorted({kind for run in runs for kind in sections.evaluated(run.stage2)})
    charts = []
    for network, metric in kinds:
        lines = [sections.figure_series(run.name, run.stage2, network, metric) for run in runs]
        lines = [line._replace(color=i) for i, line in enumerate(lines)]
        charts.append(line_chart(f"{sections.metric_name(metric)}, {network}", lines))
    return charts


def _figures(runs: Sequence[Run]) -> str:
    """The finished models' figures, a row each."""
    kinds = dict.fromkeys(
        (network, metric) for run in runs for network in run.figures for metric in run.figures[network]
    )
    rows = []
    for network, metric in kinds:
        of_runs = {run.name: run.figures.get(network, {}).get(metric) for run in runs}
        known = {name: figure for name, figure in of_runs.items() if figure is not None}
        cells = [sections.with_bar(figure) if figure else NO_VALUE for figure in of_runs.values()]
        comparable = len(known) > 1 and metric in METRICS
        references = [_references(run).get(network) for run in runs if run.name in known]
        result = best_of(known, METRICS[metric].larger_is_better, references) if comparable else ""
        rows.append((f"{sections.metric_name(metric)}, {network}", *cells, result))
    return elements.table(("", *(run.name for run in runs), ""), rows) if rows else ""


def _paired(runs: Sequence[Run]) -> str:
    """Scores compared image by image with the first run's, of the same prompts and judges in both."""
    first, *others = runs
    rows = []
    for other in others:
        if _references(first) != _references(other):
            continue
        a, b = (
            {(sample.number, sample.prompt): sample.score for sample in run.samples if sample.number is not None}
            for run in (first, other)
        )
        if len(a) < 2 or a.keys() != b.keys() or len(a) < len(first.samples) or len(b) < len(other.samples):
            continue
        result = compare(*(torch.tensor([scores[key] for key in a]) for scores in (b, a)))
        interval = f"{number(result.difference)} [{number(result.low)}, {number(result.high)}]"
        rows.append((f"{other.name} less {first.name}", f"{len(a)}", interval, str(result)))
    if not rows:
        return ""
    header = ("scores", "images", "difference [95 % interval]", "")
    return "<h3>The same prompts, image by image</h3>" + elements.table(header, rows)


def _references(run: Run) -> dict[str, str]:
    """By network: what the run's figures are measured with."""
    return references if isinstance(references := run.evaluation.get("references"), dict) else {}


def values(run: Run) -> dict[str, Any]:
    """What the report's tables have of a run, for JSON."""
    speeds = ((name, metrics.speed(int(run.get(f"{name}.batch", 0)))) for name, metrics in run.stages.items())
    return {
        "run": str(run.folder),
        "steps": run.stage2.step,
        "figures": {
            network: {name: figure.to_json() for name, figure in metrics.items()}
            for network, metrics in run.figures.items()
        },
        "scores": {name: figure.to_json() for name, figure in _flat(run).items()},
        "speed": {name: asdict(speed) for name, speed in speeds if speed},
    }


def difference(figures: Sequence[Figure | None]) -> str:
    """Whether the intervals of some figures lie apart; empty where fewer than two have one."""
    bars = [figure for figure in figures if figure and figure.low is not None and figure.high is not None]
    if len(bars) < 2:
        return ""
    pairs = itertools.combinations(bars, 2)
    return "they differ" if any(not _overlap(a, b) for a, b in pairs) else "can't be told apart"


def _scores(runs: Sequence[Run]) -> str:
    """Prompt following and other scores of evaluation.json, the autoencoder's, and the last losses."""
    columns = [_flat(run) for run in runs]
    rows = []
    for name in dict.fromkeys(name for column in columns for name in column):
        figures = [column.get(name) for column in columns]
        cells = [sections.with_bar(figure) if figure else NO_VALUE for figure in figures]
        rows.append((name, *cells, difference(figures)))
    return elements.table(("", *(run.name for run in runs), ""), rows) if rows else ""


def _flat(run: Run) -> dict[str, Figure]:
    values = {
        "held-out loss": run.stage2.last("held_out_loss"),
        "loss on training images": run.stage2.last("trained_on_loss"),
    }
    flat = {name: Figure(value) for name, value in values.items() if value is not None}
    held_out = run.autoencoder.get("held_out", {})
    flat |= {
        f"autoencoder {name}": figure for name in ("psnr", "ssim", "rfid") if (figure := as_figure(held_out.get(name)))
    }

    def add(prefix: str, tree: Mapping[str, object]) -> None:
        for name, value in tree.items():
            if "shuffled" in name or (
                not prefix and name in (*sections.SETTINGS, *sections.OWN_SECTIONS)
            ):  # chance; not scores
                continue
            if (figure := as_figure(value)) is not None:
                flat[prefix + name] = figure
            elif isinstance(value, dict):
                add(f"{prefix}{name} · ", value)

    add("", run.evaluation)
    memorization = run.evaluation.get("memorization")
    if isinstance(memorization, dict) and (share := as_figure(memorization.get("share"))):
        flat["near-copies of training images"] = share
    return flat


def _samples(runs: Sequence[Run], images: Sequence[sections.Images]) -> str:
    """Each run's last sample grid."""
    parts, limit = [], IMAGES_BYTES // len(runs)
    for run, own in zip(runs, images, strict=True):
        path: Path | None = list(run.sheets.values())[-1] if run.sheets else None
        if uri := own.uri(path, limit=min(limit, sections.IMAGE_BYTES)):
            parts.append(f"<h3>{elements.text(run.name)}</h3>" + elements.image(uri, f"step {list(run.sheets)[-1]:,}"))
    return "".join(parts)


def _settings(runs: Sequence[Run]) -> str:
    """The keys of the configuration, and versions, that are not the same in all runs."""
    trees = [
        {**run.config, "version": {name: value for name, value in run.provenance.items() if name != "command"}}
        for run in runs
    ]
    keys = dict.fromkeys(change.partition(": ")[0] for tree in trees[1:] for change in differences(trees[0], tree))
    rows = []
    for key in keys:
        if key not in IGNORED:
            values = [_value(tree, key) for tree in trees]
            shown = _sources(values) if key == "data.source" else map(_text, values)
            rows.append((key, *map(elements.code, shown)))
    header = ("", *(run.name for run in runs))
    return elements.table(header, rows, wrap=True) if rows else "<p>The configurations are equal.</p>"


def _sources(values: Sequence[Any]) -> list[str]:
    """The paths of each run's `data.source`, with the options that are not the same in all sources."""
    values = [[source for source in sources if isinstance(source, Mapping)] for sources in values]
    everywhere = list(itertools.chain(*values))
    names = dict.fromkeys(name for source in everywhere for name in source if name != "path")
    differing = [name for name in names if any(s.get(name) != everywhere[0].get(name) for s in everywhere)]

    def shown(source: Mapping[str, Any]) -> str:
        options = [f"{name}: {_text(source.get(name))}" for name in differing]
        return ", ".join([str(source.get("path")), *options])

    return ["; ".join(map(shown, sources)) for sources in values]


def _text(value: object) -> str:
    """A value as an override has it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _value(tree: object, key: str) -> object:
    for part in key.split("."):
        tree = tree.get(part, "") if isinstance(tree, Mapping) else ""
    return tree


def _speed(runs: Sequence[Run]) -> str:
    rows = []
    for name in runs[0].stages:
        for run in runs:
            if speed := run.stages[name].speed(int(run.get(f"{name}.batch", 0))):
                title = f"{run.name}, {name.replace('stage', 'stage ')}"
                rows.append((title, *sections.speed_cells(speed), sections.memory(run, name)))
    return elements.table(sections.SPEED_HEADER, rows) if rows else ""
