"""Prompt following for each second of training, against the common example trainer: `scripts/benchmark.py quality`."""

from __future__ import annotations

import argparse
import itertools
import json
import random
import re
import shutil
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import exp, isnan, log
from pathlib import Path
from statistics import fmean

import reference_loop
import torch
from benchmark_autoencoder import load_autoencoder
from benchmark_rows import Row, parse_rows
from diffusers import UNet2DConditionModel
from diffusers.training_utils import EMAModel

from ldm.config import loader
from ldm.config.loader import differences, dump
from ldm.config.schema import Config
from ldm.data import index
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.diffusion.process import DiffusionProcess
from ldm.distributed.launch import join, precision
from ldm.evaluation import bootstrap
from ldm.evaluation.prompt_following import (
    generate,
    nearest_neighbors,
    pixel_features,
    prompt_groups,
    prompt_scores,
    real_images,
)
from ldm.models import text_encoder, unet
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
WARM_UP, TIMED = 4, 24  # steps of the runs that time a step
NO_FILE_NAME = r"[^\w.=+-]+"
FIGURES = {
    "training captions": ("training captions", "top1"),
    "unseen combinations": ("held-out combinations", "top1"),
    "people": ("training captions", "role+tone"),
}
"""Titles of what is shown: the group of prompts, the score."""
Scores = dict[str, dict[str, list[float]]]
"""By title and prompt, 1 or 0 for each image."""


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
    scores: Scores


def compare_quality(args: argparse.Namespace, overrides: list[str]) -> None:
    """Trains what `--out` doesn't have yet, row by row and seed by seed; writes a table and a plot of all that it has.

    Times are processor time of all threads on a CPU, so that other load hardly counts, else wall time. They are those
    of stage two with all that it encodes; the autoencoder and the U-Net's architecture are the same. Each of our points
    is a training of its own, as its learning rate ends at 0. An image is right where its nearest real image is its
    prompt's.
    """
    if not args.out:
        raise UserError("--out: missing; name a folder for the trainings, which the same command continues")
    settings = loader.load(args.config, [*overrides, "data.workers=0"])  # whose time would not count
    if not settings.stage1.pretrained:
        raise UserError("stage1.pretrained: missing; both rows train in one autoencoder's latents, name its folder")
    reference_loop.check(settings, "quality")
    rows = parse_rows(args.rows or ROWS, ("ours", "reference"), precision(settings.run))
    trainings = []
    for seed, row in itertools.product(args.seeds, rows):
        keys = [f"run.precision={row.precision}", f"run.seed={seed}", "data.workers=0"]
        own = loader.load(args.config, [*overrides, *row.overrides, *keys])
        name = "+".join([f"{row.subject}-{row.precision}", *row.overrides])
        trainings.append((row, own, args.out / f"{re.sub(NO_FILE_NAME, '-', name)}-seed{seed}"))
    make_dir("--out", args.out)
    judge = Judge(settings, args.out / "cache")
    for row, own, folder in trainings:
        _check_settings(folder, own, args.seconds)
        for point in (_ours if row.subject == "ours" else _reference)(own, row, args.seconds, folder, judge):
            print(_describe(point), flush=True)
    points = _read(args.out)
    text = table(points)
    (args.out / "quality.md").write_text(text + "\n", "utf-8")
    plot(points, args.out / "quality.png")
    print(f"\n{text}\n\n{args.out / 'quality.png'}")


def _check_settings(folder: Path, settings: Config, seconds: float) -> None:
    """Keeps what a folder's models are trained with; UserError where they had something else."""
    file = folder / "settings.json"
    tree = {**dump(settings), "seconds": seconds}
    tree["run"] = {**tree["run"], "dir": None}
    tree = json.loads(json.dumps(tree, default=str))
    if file.exists() and (changed := differences(json.loads(file.read_text("utf-8")), tree)):
        raise UserError(f"--out: {folder} was trained with others: {', '.join(changed)}; name another folder")
    folder.mkdir(parents=True, exist_ok=True)
    _write(file, tree)


class Judge:
    """Scores models by the prompts of the training and of held-out combinations."""

    def __init__(self, settings: Config, cache: Path):
        data = index.build(settings.data, settings.data.cache_dir or cache, settings.stage2.conditions)
        self.records: Index = data.select("train", *HELD_OUT)
        self.train: Index = data.select("train")
        self.real = pixel_features(real_images(self.records, range(len(self.records)), settings.data.size))
        groups = prompt_groups(self.records, TRAINING_CAPTIONS)
        captioned = {name: [i for i in targets if self.records[i].captions] for name, targets in groups.items()}
        self.groups = {name: targets for name, targets in captioned.items() if targets}

    def __call__(self, model: LatentDiffusion, options: Sampling) -> Scores:
        measured = {}
        for group, targets in self.groups.items():
            noises = NOISES if group != "training captions" else NOISES[:1]
            prompts = [self.records[i].captions[0] for i in targets]
            samples = torch.cat([generate(model, prompts, noise, options) for noise in noises])
            neighbors = nearest_neighbors(pixel_features(samples), self.real)
            for score, values in prompt_scores(neighbors, targets * len(noises), self.records).items():
                by_prompt: dict[str, list[float]] = {}
                for prompt, value in zip(prompts * len(noises), values.tolist(), strict=True):
                    if not isnan(value):
                        by_prompt.setdefault(prompt, []).append(value)
                measured[group, score] = by_prompt
        return {title: measured[key] for title, key in FIGURES.items() if key in measured}


# ----------------------------------------------------------------------------------------------------------- trainings


def _ours(settings: Config, row: Row, seconds: float, folder: Path, judge: Judge) -> Iterator[Point]:
    """A training for each of the times, planned from the times of short ones."""
    fixed = per_step = 0.0

    def trained(steps: int, run: Path) -> float:
        """The seconds of a training, which encodes all that it needs."""
        shutil.rmtree(run, ignore_errors=True)  # an unfinished one, whose time is unknown
        planned = prepare_run_dir(_with_steps(settings, steps, run))
        vae, text = load_autoencoder(planned), text_encoder.of(planned.text)
        return _seconds(settings, lambda: train(planned, judge.train, vae, text))

    for share in OURS:
        if not (point := _known(folder, share)):
            if not per_step:
                few, more = (trained(steps, folder / "timing") for steps in (WARM_UP, TIMED))
                per_step = max(1e-6, (more - few) / (TIMED - WARM_UP))
                fixed = max(0.0, few - WARM_UP * per_step)
            run, warm_up = folder / f"{share:g}", settings.stage2.lr_warmup_steps
            if (steps := int((share * seconds - fixed) / per_step)) <= warm_up:
                least = (fixed + (warm_up + 1) * per_step) / share
                raise UserError(f"--seconds: {seconds:g} are too few for the warm-up; give {least:.0f} or more")
            taken = trained(steps, run)
            scores = judge(_ready(LatentDiffusion.load(run / "pipeline"), settings), Sampling())
            point = Point(row.name, settings.run.seed, share, taken, steps, settings.sample.guidance, scores)
            _write(_file(folder, share), asdict(point))
        yield point


def _reference(settings: Config, row: Row, seconds: float, folder: Path, judge: Judge) -> Iterator[Point]:
    """One training of constant rate, whose average is judged at each of the times, the longest first."""
    averages = {share: folder / f"unet-{share:g}" for share in REFERENCE}
    if not all((average / "taken.json").exists() for average in averages.values()):
        _train_reference(settings, seconds, averages, judge)
    guidance: float | None = None
    for share, average in reversed(averages.items()):
        if not (point := _known(folder, share)):
            text, vae = text_encoder.of(settings.text), load_autoencoder(settings)
            network = UNet2DConditionModel.from_pretrained(average).eval()
            solver = scheduler(DiffusionProcess("eps", "scaled_linear"), settings.sample.solver)
            model = _ready(LatentDiffusion(text, network, vae, solver, settings.sample.steps), settings)
            scales = (guidance,) if guidance else GUIDANCE
            scores = {scale: judge(model, Sampling(guidance_scale=scale)) for scale in scales}
            best = max(scores, key=lambda scale: sum(fmean(_all(s)) for s in scores[scale].values()))
            taken = json.loads((average / "taken.json").read_text("utf-8"))
            point = Point(row.name, settings.run.seed, share, taken["seconds"], taken["steps"], best, scores[best])
            _write(_file(folder, share), asdict(point))
        guidance = point.guidance
        yield point


def _train_reference(settings: Config, seconds: float, averages: Mapping[float, Path], judge: Judge) -> None:
    """Writes the averaged U-Net at each of the times, and the time that it took."""
    vae, text = load_autoencoder(settings), text_encoder.of(settings.text)
    if not isinstance(text, TextEncoder):
        raise UserError("text.model: the example trainer has a single text encoder; name a model with one")
    network = unet.build(settings.stage2, vae.channels, settings.data.size // vae.factor, text.width)
    left, writing = deque(averages.items()), 0.0
    start = _now(settings)

    def after_step(step: int, ema: EMAModel) -> bool:
        nonlocal writing
        spent = _now(settings) - start - writing
        if spent >= left[0][0] * seconds:
            _, folder = left.popleft()
            ema.copy_to(network.parameters())
            network.save_pretrained(folder)
            _write(folder / "taken.json", {"seconds": spent, "steps": step})
            writing = _now(settings) - start - spent
        return not left

    torch.manual_seed(settings.run.seed)
    random.seed(settings.run.seed)
    reference_loop.train(_with_steps(settings, 10**6, averages[1.0].parent), judge.train, vae, text, after_step)


def _ready(model: LatentDiffusion, settings: Config) -> LatentDiffusion:
    return model.to(join(settings.run).device).optimize_for_inference()


def _with_steps(settings: Config, steps: int, folder: Path) -> Config:
    never = 10**9
    quiet = {"steps": steps, "evaluate_every": never, "checkpoint_every": never}
    return settings.model_copy(
        update={
            "run": settings.run.model_copy(update={"dir": folder, "log_every": 20}),
            "data": settings.data.model_copy(update={"cache_dir": None}),  # a training encodes for itself
            "stage2": settings.stage2.model_copy(update=quiet),
            "sample": settings.sample.model_copy(update={"prompts": ()}),  # no sheet
        }
    )


def _now(settings: Config) -> float:
    return time.process_time() if join(settings.run).device.type == "cpu" else time.perf_counter()


def _seconds(settings: Config, action: Callable[[], object]) -> float:
    start = _now(settings)
    action()
    return _now(settings) - start


def _file(folder: Path, share: float) -> Path:
    return folder / f"point-{share:g}.json"


def _known(folder: Path, share: float) -> Point | None:
    file = _file(folder, share)
    return Point(**json.loads(file.read_text("utf-8"))) if file.exists() else None


def _write(file: Path, value: object) -> None:
    with atomic_file(file) as tmp_path:
        tmp_path.write_text(json.dumps(value, indent=1) + "\n", "utf-8")


def _read(out: Path) -> dict[str, dict[float, list[Point]]]:
    """Of each row, by share, the seeds' points."""
    points: dict[str, dict[float, list[Point]]] = {}
    for file in sorted(out.glob("*/point-*.json")):
        point = Point(**json.loads(file.read_text("utf-8")))
        points.setdefault(point.row, {}).setdefault(point.share, []).append(point)
    return {row: dict(sorted(by_share.items())) for row, by_share in points.items()}


def _all(by_prompt: Mapping[str, list[float]]) -> list[float]:
    return list(itertools.chain.from_iterable(by_prompt.values()))


def _describe(point: Point) -> str:
    scores = ", ".join(f"{title} {fmean(_all(by_prompt)):.2f}" for title, by_prompt in point.scores.items())
    return f"{point.row}, seed {point.seed}: {point.steps:,} steps in {point.seconds:,.0f} s: {scores}"


# -------------------------------------------------------------------------------------------------------------- output


def interval(points: Sequence[Point], title: str) -> tuple[float, float, float]:
    """The share of all seeds' images, and its 95 % interval: of other prompts, not of other trainings."""
    scores = [(prompt, x) for point in points for prompt, of_prompt in point.scores[title].items() for x in of_prompt]
    prompts, values = zip(*scores, strict=True)
    figure = bootstrap.mean(torch.tensor(values, dtype=torch.float64), prompts=prompts)
    low, high = (figure.value if end is None else end for end in (figure.low, figure.high))
    return figure.value, low, high


def time_to_reach(times: Sequence[float], values: Sequence[float], goal: float) -> float | None:
    """When a curve first reaches `goal`, interpolated in the logarithm of time; its first time where that is enough."""
    if values[0] >= goal:
        return times[0]
    for i in range(1, len(values)):
        if values[i] >= goal:
            part = (goal - values[i - 1]) / (values[i] - values[i - 1])
            return exp(log(times[i - 1]) + part * (log(times[i]) - log(times[i - 1])))
    return None


def table(points: Mapping[str, Mapping[float, Sequence[Point]]]) -> str:
    """A row for each time of each trainer; below, how much longer the reference takes to our last figure."""
    lines = [f"| | seconds | steps | {' | '.join(FIGURES)} |", "|---" * (3 + len(FIGURES)) + "|"]
    for row, by_share in points.items():
        for of_seeds in by_share.values():
            seeds = "1 seed" if len(of_seeds) == 1 else f"{len(of_seeds)} seeds"
            seconds, steps = (fmean(getattr(p, key) for p in of_seeds) for key in ("seconds", "steps"))
            cells = [
                "{:.2f} [{:.2f}, {:.2f}]".format(*interval(of_seeds, title)) if title in of_seeds[0].scores else ""
                for title in FIGURES
            ]
            lines.append(f"| {row}, {seeds} | {seconds:,.0f} | {steps:,.0f} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *_ratios(points)])


def _ratios(points: Mapping[str, Mapping[float, Sequence[Point]]]) -> Iterator[str]:
    """Lines on when each reaches the other's last figure, compared with when it does so itself."""
    rows = {subject: [row for row in points if row.startswith(subject)] for subject in ("ours", "reference")}
    for our_row, row, title in itertools.product(*rows.values(), FIGURES):
        (our_times, ours), (times, theirs) = (_curve(points[name], title) for name in (our_row, row))
        if not our_times or not times:
            continue
        reached = time_to_reach(our_times, ours, theirs[-1])
        themselves = time_to_reach(times, theirs, theirs[-1])
        assert themselves  # at the last of the times at the latest
        if reached:
            at_least = "at least " if reached == our_times[0] else ""
            sooner = f"{our_row} has that {at_least}{themselves / reached:.1f} times sooner"
        else:
            sooner = f"{our_row} does not reach that"
        if equalled := time_to_reach(times, theirs, ours[-1]):
            at_most = "at most " if equalled == times[0] else ""
            longer = f"it takes {at_most}{equalled / our_times[-1]:.1f} times as long to our {ours[-1]:.2f}"
        else:
            longer = f"it has not reached our {ours[-1]:.2f} after {times[-1] / our_times[-1]:.1f} times the time"
        yield f"- {title}: {row} ends at {theirs[-1]:.2f}; {sooner}; {longer}"


def _curve(by_share: Mapping[float, Sequence[Point]], title: str) -> tuple[list[float], list[float]]:
    of_seeds = [points for points in by_share.values() if title in points[0].scores]
    times = [fmean(point.seconds for point in points) for points in of_seeds]
    return times, [interval(points, title)[0] for points in of_seeds]


def plot(points: Mapping[str, Mapping[float, Sequence[Point]]], path: Path) -> None:
    """A panel for each figure, a line with error bars for each row."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

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
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("share that is right")
    figure.axes[0].legend(fontsize=8)
    with atomic_file(path) as tmp_path:
        figure.savefig(tmp_path, format="png")
