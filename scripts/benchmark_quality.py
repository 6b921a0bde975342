"""Prompt following for each second of training, against the common example trainer: `scripts/benchmark.py quality`."""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import log
from pathlib import Path
from typing import Any

import numpy as np
import reference_loop
import torch
from benchmark_autoencoder import load_autoencoder
from benchmark_rows import Row, collect_metrics, parse_rows

from ldm.cli.evaluate_prompts import generate, prompt_groups, real_images
from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import index
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed.launch import precision
from ldm.evaluation import bootstrap
from ldm.evaluation.prompt_following import nearest_neighbors, pixel_features, prompt_following
from ldm.models import text_encoder
from ldm.models.text_encoder import TextEncoder
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.solvers import scheduler
from ldm.training.run_dir import make_dir, prepare_run_dir
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError
from stage2_diffusion.train import train

OURS, REFERENCE = (0.25, 0.5, 1.0), (0.25, 0.5, 1.0, 2.0, 4.0)  # of `--seconds`: when a training is judged
ROWS = "ours,reference+stage2.lr=1e-3"  # the example's own default, 1e-4, is for Stable Diffusion's size
GUIDANCE = (1.0, 2.0, 4.0)  # the reference, which drops no captions, counts with the best for its longest training
TRAINING_CAPTIONS, NOISES = 300, (0, 1000, 2000)  # judged; seeds of the noises of held-out prompts
TIMED = 24  # steps whose time the length of a training is planned from
FIGURES = {
    "training captions": ("training captions", "top1"),
    "unseen combinations": ("held-out combinations", "top1"),
    "people": ("training captions", "role+tone"),
}
"""Titles of what is shown: the group of prompts, the score."""


@dataclass(frozen=True)
class Point:
    """A model after so many seconds of training."""

    row: str
    seed: int
    share: float
    """Of `--seconds`, as planned."""
    seconds: float
    """As taken."""
    steps: int
    guidance: float
    scores: Mapping[str, tuple[float, int]]
    """By title, a share in [0, 1] and of how many images."""


def compare_quality(args: argparse.Namespace, overrides: list[str]) -> None:
    """Trains what `--out` doesn't have yet, row by row and seed by seed; writes a table and a plot of all that it has.

    Times are processor time of all threads on a CPU, so that other load hardly counts, else wall time. They are those
    of stage two, whose autoencoder, captions and U-Net both rows share; each of our points is a training of its own, as
    its learning rate ends at 0. An image is right where its nearest real image is its prompt's.
    """
    if not args.out:
        raise UserError("--out: none given; name a folder for the trainings, which the same command continues")
    make_dir("--out", args.out)
    _check_seconds(args.out / "seconds.json", args.seconds)
    settings = loader.load(args.config, overrides)
    if not settings.stage1.pretrained:
        raise UserError("stage1.pretrained: both rows train in one autoencoder's latents; name its folder")
    if not settings.data.cache_dir:
        overrides = [*overrides, f"data.cache_dir={args.out}/cache"]
    rows = parse_rows(args.rows or ROWS, ("ours", "reference"), precision(settings.run))
    judge = Judge(loader.load(args.config, overrides))
    for seed in args.seeds:
        for row in rows:
            chosen = [*overrides, *row.overrides, f"run.precision={row.precision}", f"run.seed={seed}"]
            own = loader.load(args.config, chosen)
            folder = args.out / f"{row.name.replace(', ', '-').replace('=', '-')}-seed{seed}"
            for point in (_ours if row.subject == "ours" else _reference)(own, row, args.seconds, folder, judge):
                print(_describe(point), flush=True)
    points = _read(args.out)
    text = table(points)
    (args.out / "quality.md").write_text(text + "\n", "utf-8")
    plot(points, args.out / "quality.png")
    print(f"\n{text}\n\n{args.out / 'quality.png'}")


def _check_seconds(file: Path, seconds: float) -> None:
    """Keeps `--seconds` with the trainings; UserError where they had others."""
    if file.exists() and (kept := json.loads(file.read_text("utf-8"))) != seconds:
        raise UserError(f"--seconds: {file.parent} has trainings of {kept:g}; give that, or another --out")
    file.write_text(json.dumps(seconds), "utf-8")


class Judge:
    """Scores models by the prompts of the training and of held-out combinations."""

    def __init__(self, settings: Config):
        data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
        self.records: Index = data.select("train", *HELD_OUT)
        self.train: Index = data.select("train")
        real = real_images(self.records, range(len(self.records)), settings.data.size)
        self.real = pixel_features(real)
        groups = prompt_groups(self.records, TRAINING_CAPTIONS)
        self.groups = {name: targets for name, targets in groups.items() if targets}

    def __call__(self, model: LatentDiffusion, options: Sampling) -> dict[str, tuple[float, int]]:
        measured = {}
        for group, targets in self.groups.items():
            noises = NOISES if group != "training captions" else NOISES[:1]
            prompts = [self.records[i].captions[0] for i in targets]
            samples = torch.cat([generate(model, prompts, noise, options) for noise in noises])
            neighbors = nearest_neighbors(pixel_features(samples), self.real)
            repeated = targets * len(noises)
            people = sum("role" in self.records[i].attributes for i in repeated)
            for score, value in prompt_following(neighbors, repeated, self.records).items():
                measured[group, score] = (value, people if score.startswith("role") else len(repeated))
        return {title: measured[key] for title, key in FIGURES.items() if key in measured}


def _ours(settings: Config, row: Row, seconds: float, folder: Path, judge: Judge) -> Iterator[Point]:
    """A training for each of the times, planned from the time of a few steps."""
    vae, text = load_autoencoder(settings), text_encoder.of(settings.text)
    for share in OURS:
        if known := _known(folder, share):
            yield known
            continue
        few = _with_steps(settings, TIMED, folder / "timing")
        per_step = _seconds(lambda few=few: collect_metrics(train, few, judge.train, vae, copy.deepcopy(text))) / TIMED
        run = folder / f"{share:g}"
        shutil.rmtree(run, ignore_errors=True)  # an unfinished one, whose time is unknown
        planned = prepare_run_dir(_with_steps(settings, max(1, round(share * seconds / per_step)), run))
        taken = _seconds(lambda planned=planned: train(planned, judge.train, vae, copy.deepcopy(text)))
        model = LatentDiffusion.load(run / "pipeline").optimize_for_inference()
        scores, guidance = judge(model, Sampling()), settings.sample.guidance
        yield _keep(folder, Point(row.name, settings.run.seed, share, taken, planned.stage2.steps, guidance, scores))


def _reference(settings: Config, row: Row, seconds: float, folder: Path, judge: Judge) -> Iterator[Point]:
    """One training of constant rate, whose average is judged at each of the times, the longest first."""
    if all(known := [_known(folder, share) for share in REFERENCE]):
        yield from filter(None, known)
        return
    vae, text = load_autoencoder(settings), text_encoder.of(settings.text)
    if not isinstance(text, TextEncoder):
        raise UserError("text.model: the example trainer has a single text encoder; name a model with one")
    snapshots: list[tuple[float, int, Any]] = []
    start = _now()

    def after_step(step: int, network: Any, ema: Any) -> bool:
        if (spent := _now() - start) >= REFERENCE[len(snapshots)] * seconds:
            averaged = copy.deepcopy(network)
            ema.copy_to(averaged.parameters())
            snapshots.append((spent, step, averaged.cpu().eval()))
        return len(snapshots) == len(REFERENCE)

    torch.manual_seed(settings.run.seed)
    reference_loop.train(_with_steps(settings, 10**6, folder), judge.train, vae, text, after_step)
    guidance: float | None = None
    for share, (spent, step, network) in reversed(list(zip(REFERENCE, snapshots, strict=True))):
        solver = scheduler(DiffusionProcess("eps"), settings.sample.solver)
        model = LatentDiffusion(text, network, vae, solver, settings.sample.steps).optimize_for_inference()
        scales = (guidance,) if guidance else GUIDANCE
        scores = {scale: judge(model, Sampling(guidance_scale=scale)) for scale in scales}
        guidance = max(scores, key=lambda scale: [right for right, _ in scores[scale].values()])
        yield _keep(folder, Point(row.name, settings.run.seed, share, spent, step, guidance, scores[guidance]))


def _with_steps(settings: Config, steps: int, folder: Path) -> Config:
    never = 10**9
    quiet = {"steps": steps, "evaluate_every": never, "checkpoint_every": never}
    return settings.model_copy(
        update={
            "run": settings.run.model_copy(update={"dir": folder, "log_every": 20}),
            "stage2": settings.stage2.model_copy(update=quiet),
            "sample": settings.sample.model_copy(update={"prompts": ()}),  # no sheet
        }
    )


def _now() -> float:
    return time.perf_counter() if torch.cuda.is_available() else time.process_time()


def _seconds(action: Any) -> float:
    start = _now()
    action()
    return _now() - start


def _file(folder: Path, share: float) -> Path:
    return folder / f"point-{share:g}.json"


def _known(folder: Path, share: float) -> Point | None:
    file = _file(folder, share)
    return Point(**json.loads(file.read_text("utf-8"))) if file.exists() else None


def _keep(folder: Path, point: Point) -> Point:
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(_file(folder, point.share)) as tmp_path:
        tmp_path.write_text(json.dumps(asdict(point), indent=1) + "\n", "utf-8")
    return point


def _read(out: Path) -> dict[str, dict[float, list[Point]]]:
    """Of each row, by share, the seeds' points."""
    points: dict[str, dict[float, list[Point]]] = {}
    for file in sorted(out.glob("*/point-*.json")):
        point = Point(**json.loads(file.read_text("utf-8")))
        points.setdefault(point.row, {}).setdefault(point.share, []).append(point)
    return {row: dict(sorted(by_share.items())) for row, by_share in points.items()}


def _describe(point: Point) -> str:
    scores = ", ".join(f"{title} {share:.2f}" for title, (share, _) in point.scores.items())
    return f"{point.row}, seed {point.seed}: {point.steps:,} steps in {point.seconds:,.0f} s: {scores}"


# -------------------------------------------------------------------------------------------------------------- output


def interval(points: Sequence[Point], title: str) -> tuple[float, float, float]:
    """The share of all seeds' images, and its 95 % interval (Wilson's)."""
    right = [torch.arange(count) < round(share * count) for share, count in (point.scores[title] for point in points)]
    figure = bootstrap.mean(torch.cat(right).double())
    return figure.value, figure.low or 0.0, figure.high or 1.0


def time_to_reach(times: Sequence[float], values: Sequence[float], goal: float) -> float | None:
    """When a curve first reaches `goal`, interpolated in the logarithm of time; its first time where that is enough."""
    if values[0] >= goal:
        return times[0]
    for i in range(1, len(values)):
        if values[i] >= goal:
            part = (goal - values[i - 1]) / (values[i] - values[i - 1])
            return float(np.exp(log(times[i - 1]) + part * (log(times[i]) - log(times[i - 1]))))
    return None


def table(points: Mapping[str, Mapping[float, Sequence[Point]]]) -> str:
    """A row for each time of each trainer; below, how much longer the reference takes to our last figure."""
    lines = [f"| | seconds | steps | {' | '.join(FIGURES)} |", "|---" * (3 + len(FIGURES)) + "|"]
    for row, by_share in points.items():
        for of_seeds in by_share.values():
            seconds, steps = (np.mean([getattr(p, key) for p in of_seeds]) for key in ("seconds", "steps"))
            cells = [
                "{:.2f} [{:.2f}, {:.2f}]".format(*interval(of_seeds, title)) if title in of_seeds[0].scores else ""
                for title in FIGURES
            ]
            lines.append(f"| {row}, {len(of_seeds)} seed(s) | {seconds:,.0f} | {steps:,.0f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_ratios(points)])


def _ratios(points: Mapping[str, Mapping[float, Sequence[Point]]]) -> Iterator[str]:
    """Lines on when ours has the reference's last figure, and when the reference has ours."""
    rows = {subject: [row for row in points if row.startswith(subject)] for subject in ("ours", "reference")}
    for our_row, row, title in itertools.product(*rows.values(), FIGURES):
        (our_times, ours), (times, theirs) = (_curve(points[name], title) for name in (our_row, row))
        if not our_times or not times:
            continue
        reached, equalled = time_to_reach(our_times, ours, theirs[-1]), time_to_reach(times, theirs, ours[-1])
        at_least = "at least " if reached == our_times[0] else ""
        sooner = f"{at_least}{times[-1] / reached:.1f} times sooner" if reached else "never"
        longer = f"{equalled / our_times[-1]:.1f} times as long" if equalled else "has not reached it"
        yield (
            f"- {title}: {our_row} has the last figure of {row}, {theirs[-1]:.2f}, {sooner}; {row} has ours, "
            f"{ours[-1]:.2f}: {longer}, after {times[-1] / our_times[-1]:.1f} times the time"
        )


def _curve(by_share: Mapping[float, Sequence[Point]], title: str) -> tuple[list[float], list[float]]:
    of_seeds = [points for points in by_share.values() if title in points[0].scores]
    times = [float(np.mean([point.seconds for point in points])) for points in of_seeds]
    return times, [interval(points, title)[0] for points in of_seeds]


def plot(points: Mapping[str, Mapping[float, Sequence[Point]]], path: Path) -> None:
    """A panel for each figure, a line with error bars for each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), dpi=110, layout="tight")
    FigureCanvasAgg(figure)
    for axes, title in zip(figure.subplots(1, len(FIGURES), sharey=True), FIGURES, strict=True):
        for row, by_share in points.items():
            times, values = _curve(by_share, title)
            if not times:
                continue
            bounds = [interval(p, title) for p in by_share.values() if title in p[0].scores]
            margins = [[value - low for value, low, _ in bounds], [high - value for value, _, high in bounds]]
            axes.errorbar(times, values, margins, marker="o", capsize=3, label=row)
        axes.set(title=title, xscale="log", ylim=(-0.02, 1.02), xlabel="seconds of training")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share that is right")
    figure.axes[0].legend(fontsize=8)
    with atomic_file(path) as tmp_path:
        figure.savefig(tmp_path, format="png")
