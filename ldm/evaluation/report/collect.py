"""What a run's folder has of configuration, metrics, figures and images, as plain data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import fmean, median
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from ldm.evaluation.figures import Figure
from ldm.utils.errors import UserError

Points = list[tuple[float, float]]
STATISTICS = "latents.json"  # as `ldm.models.autoencoder` has it, which takes seconds to import
PARTS = {"unet": "U-Net", "vae": "autoencoder", "text_encoder": "text encoder", "text_encoder_2": "second text encoder"}


@dataclass(frozen=True)
class Speed:
    """How long a stage took, and how fast it was."""

    images_per_second: float
    """Median over the lines of metrics."""
    waiting: float
    """Mean share of the time without data, in [0, 1]."""
    mfu: float | None
    """Median model FLOP utilisation, in [0, 1]; None where not known."""
    seconds: float
    """Of the steps, with the evaluations between them; pauses between two starts don't count."""
    watts: float | None = None
    """Mean power of the GPUs; None where not known."""


@dataclass(frozen=True)
class Metrics:
    """The lines of a stage's `metrics.jsonl`."""

    lines: tuple[Mapping[str, float], ...] = ()
    """Finite numbers by name."""
    broken: int = 0
    """Lines that are no JSON; the last one of a killed run is cut off."""

    @classmethod
    def read(cls, path: Path) -> Metrics:
        lines, broken = [], 0
        for text in path.read_bytes().splitlines() if path.exists() else []:
            try:
                values = json.loads(text)
                numbers = {name: float(value) for name, value in values.items() if _is_finite(value)}
            except (ValueError, AttributeError):
                broken += 1
                continue
            broken += "step" not in numbers
            lines += [numbers] if "step" in numbers else []
        return cls(tuple(lines), broken)

    @cached_property
    def names(self) -> set[str]:
        return {name for line in self.lines for name in line}

    @property
    def step(self) -> int:
        """The last step that has a line."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    def points(self, name: str) -> Points:
        """A metric over steps; of two lines of one step the later counts."""
        return sorted({line["step"]: line[name] for line in self.lines if name in line}.items())

    def last(self, name: str) -> float | None:
        points = self.points(name)
        return points[-1][1] if points else None

    def speed(self, batch: int) -> Speed | None:
        """Of a stage with so many images a step; None where nothing was measured."""
        rates, seconds, previous = self.points("images_per_second"), 0.0, 0.0
        for step, rate in rates:
            seconds += (step - previous) * batch / rate if rate else 0.0
            previous = step
        if not rates:
            return None
        waiting, mfu, watts = ([value for _, value in self.points(name)] for name in ("waiting", "mfu", "watts"))
        return Speed(
            median(rate for _, rate in rates),
            fmean(waiting) if waiting else 0.0,
            median(mfu) if mfu else None,
            seconds,
            fmean(watts) if watts else None,
        )


@dataclass(frozen=True)
class Sample:
    """A generated image with its score: an entry of `evaluation/samples.json`."""

    prompt: str
    score: float
    group: str
    number: int | None
    """Its place among the evaluation's images; None in files of older versions."""
    path: Path | None
    """Its file; None where it was not kept."""


@dataclass(frozen=True)
class Run:
    """A run's folder, read."""

    folder: Path
    name: str
    provenance: Mapping[str, Any]
    """Command, commit and versions."""
    config: Mapping[str, Any]
    """As `config.yaml` has it, with all defaults."""
    data: Mapping[str, Any]
    """`data-report.json`."""
    autoencoder: Mapping[str, Any]
    """What stage one measured at its end."""
    preflight: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    parameters: Mapping[str, int]
    """By part of the model."""
    stage1: Metrics
    stage2: Metrics
    figures: Mapping[str, Mapping[str, Figure]]
    """By network and metric, of the finished model."""
    samples: tuple[Sample, ...]
    sheets: Mapping[int, Path]
    """Sample grids of stage two by step, in order."""
    notes: list[str] = field(default_factory=list)
    """What could not be read, a line each."""

    @property
    def stages(self) -> dict[str, Metrics]:
        return {"stage1": self.stage1, "stage2": self.stage2}

    def get(self, key: str, default: Any = None) -> Any:
        """A value of the configuration, by its dotted key."""
        value: Any = self.config
        for part in key.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return default if value is None else value

    def image(self, *names: str) -> Path | None:
        """The first of these files of the evaluation that is there."""
        return (
            None
            if not self.evaluation
            else next((path for path in (self.folder / name for name in names) if path.is_file()), None)
        )

    @property
    def sources(self) -> str:
        sources = self.get("data.source", [])
        return ", ".join(str(source.get("path")) for source in sources if isinstance(source, Mapping))


def collect(folder: Path) -> Run:
    """Reads a run's folder, finished or not; UserError where it is none, or nothing has been trained in it."""
    tree, notes = _configuration(folder), list[str]()
    stages = {name: Metrics.read(folder / name / "metrics.jsonl") for name in ("stage1", "stage2")}
    if not any(metrics.lines for metrics in stages.values()):
        raise UserError(f"{folder}: nothing to report, neither stage has metrics yet; train for some steps first")
    if not stages["stage2"].lines:
        notes.append("stage two has not begun")
    for name, metrics in stages.items():
        if metrics.broken:
            what = "line is" if metrics.broken == 1 else "lines are"
            notes.append(f"{name}/metrics.jsonl: {metrics.broken} {what} incomplete and left out")
    evaluation = _json(folder / "evaluation.json", notes)
    steps = tree["configuration"].get("stage2", {}).get("steps")
    if (measured := evaluation.get("trained steps", steps)) != steps:
        notes.append(f"evaluation.json: of the model at step {measured}, before training went on; evaluate it again")
        evaluation = {}
    return Run(
        folder,
        folder.resolve().name,
        tree.get("about") or {},
        tree["configuration"],
        _json(folder / "data-report.json", notes),
        _json(folder / "autoencoder" / STATISTICS, notes),
        _json(folder / "preflight.json", notes),
        evaluation,
        _parameters(folder, notes),
        stages["stage1"],
        stages["stage2"],
        _figures(evaluation.get("figures"), notes),
        _samples(folder / "evaluation", notes) if evaluation else (),
        _sheets(folder / "stage2" / "samples"),
        notes,
    )


def _configuration(folder: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{folder}: no run (it has no config.yaml); give a folder that train_ldm.py made") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{folder / 'config.yaml'}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict) or not isinstance(tree.get("configuration"), dict):
        raise UserError(f"{folder}: not a run of train_ldm.py, but made from one; give the run itself")
    return tree


def _json(path: Path, notes: list[str]) -> dict[str, Any]:
    """An object of a JSON file; empty where there is none, or, with a note, where it can't be read."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text("utf-8"))
    except ValueError:
        value = None
    if isinstance(value, dict):
        return value
    notes.append(f"{path.name}: no JSON object, and left out")
    return {}


def _figures(tree: Any, notes: list[str]) -> dict[str, dict[str, Figure]]:
    figures: dict[str, dict[str, Figure]] = {}
    for network, metrics in tree.items() if isinstance(tree, dict) else ():
        for name, values in metrics.items() if isinstance(metrics, dict) else ():
            if (figure := as_figure(values)) is None:
                notes.append(f"evaluation.json: figures.{network}.{name} is no figure, and left out")
            else:
                figures.setdefault(network, {})[name] = figure
    return figures


def as_figure(values: Any) -> Figure | None:
    """A number, or what `Figure.to_json` wrote; None for other things."""
    if _is_finite(values):
        return Figure(float(values))
    if not isinstance(values, dict) or not _is_finite(values.get("value")):
        return None
    low, high = (float(values[end]) if _is_finite(values.get(end)) else None for end in ("low", "high"))
    images, network = values.get("images"), values.get("network")
    count = int(float(images)) if images is not None and _is_finite(images) else 0
    return Figure(float(values["value"]), low, high, count, None if network is None else str(network))


def _samples(folder: Path, notes: list[str]) -> tuple[Sample, ...]:
    path = folder / "samples.json"
    if not path.exists():
        return ()
    try:
        entries = json.loads(path.read_text("utf-8"))
        read = [
            Sample(
                str(entry["prompt"]),
                float(entry["score"]),
                str(entry.get("group") or ""),
                entry.get("number"),
                _file(folder, entry),
            )
            for entry in entries
            if _is_finite(entry["score"])
        ]
    except (ValueError, TypeError, KeyError, AttributeError):
        notes.append("evaluation/samples.json: no list of prompts and scores, and left out")
        return ()
    if len(read) < len(entries):
        notes.append(f"evaluation/samples.json: {len(entries) - len(read)} entries without a score are left out")
    return tuple(read)


def _file(folder: Path, entry: Mapping[str, Any]) -> Path | None:
    name = entry.get("file")
    return folder / Path(name).name if name else None  # only of this folder


def _sheets(folder: Path) -> dict[int, Path]:
    numbers = {path: path.stem.removeprefix("step-") for path in folder.glob("step-*.png")}
    return dict(sorted((int(number), path) for path, number in numbers.items() if number.isdigit()))


def _parameters(folder: Path, notes: list[str]) -> dict[str, int]:
    """Parameters by part of the finished model, from the headers of its files; no weight is read."""
    files = {name: list((folder / "pipeline" / part).glob("*.safetensors")) for part, name in PARTS.items()}
    if not files["autoencoder"]:
        files["autoencoder"] = list((folder / "autoencoder").glob("*.safetensors"))
    files["adapter"] = list((folder / "lora").glob("pytorch_lora_weights.safetensors"))
    counts = {}
    for name, paths in files.items():
        try:
            count = sum(_count(path) for path in paths)
        except (SafetensorError, OSError):
            notes.append(f"{paths[0].parent}: its weights can't be read, and are not counted")
            continue
        if count:
            counts[name] = count
    return counts


def _count(path: Path) -> int:
    with safe_open(path, "np") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
