"""The parts of a run's report, each empty where the run has no data for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from ldm.data.images import has_frames
from ldm.evaluation.distances import METRICS
from ldm.evaluation.figures import Figure
from ldm.evaluation.report import elements
from ldm.evaluation.report.charts import Series, line_chart, number, short
from ldm.evaluation.report.collect import Metrics, Run, Sample, Speed, as_figure
from ldm.evaluation.report.elements import Raw
from ldm.evaluation.report.image_data import data_uri, spread

SHEET_WIDTH, THUMB_WIDTH = 1100, 192  # pixels
SHEETS_BYTES, THUMBS_BYTES, IMAGE_BYTES = 1_300_000, 400_000, 260_000
"""Limits of the WebP files: of all samples over time, of all prompts' images, of each other image."""
MAX_FRAMES, EXTREMES = 16, 12  # steps that the slider has; prompts at each end

METRIC_NAMES = {  # the others' are words
    "fid": "FID",
    "sfid": "sFID",
    "kid": "KID",
    "is": "Inception score",
    "cmmd": "CMMD",
    "clip_score": "CLIP score",
}
LEVEL = "held_out_loss_at_"
SPEED_HEADER = ("", "time", "images a second", "waiting for data", "MFU", "energy of the GPUs", "peak memory")
OWN_SECTIONS = (
    "figures",
    "real against real",
    "comparison",
    "memorization",
)  # of evaluation.json; the rest is shown as it is
SETTINGS = ("trained steps", "steps", "guidance", "seed", "references", "sampling of figures")  # no scores
SAMPLING = ("steps", "guidance", "seed")


class Images:
    """A run's images as parts of a page; one that can't be read becomes one of its `notes` instead."""

    def __init__(self, notes: list[str]):
        self.notes = notes

    def uri(self, path: Path | None, width: int = SHEET_WIDTH, limit: int = IMAGE_BYTES) -> str:
        """A `data:` address; empty where there is no such image, or none that can be read."""
        if path is None:
            return ""
        try:
            return data_uri(path, width, limit)
        except (OSError, ValueError, SyntaxError):  # what Pillow raises at broken files
            self.notes.append(f"{path.parent.name}/{path.name}: can't be read as an image, and is left out")
            return ""

    def figure(self, path: Path | None, caption: str = "") -> str:
        uri = self.uri(path)
        return elements.image(uri, caption) if uri else ""


class Curve(NamedTuple):
    """A chart of a stage's metrics over steps."""

    title: str
    metrics: Mapping[str, str]
    """Names of its lines by metric."""
    noisy: bool = False
    linear: bool = False


STAGE2_CURVES = (
    Curve("Training loss", {"loss": "training"}, noisy=True),
    Curve("Loss on fixed images", {"held_out_loss": "held-out images", "trained_on_loss": "training images"}),
    Curve("Learning rate", {"lr": "learning rate"}, linear=True),
    Curve("Gradient norm", {"gradient_norm": "before clipping"}, noisy=True),
)
STAGE1_CURVES = (
    Curve("Training loss", {"loss": "all terms"}, noisy=True),
    Curve("PSNR of held-out images, dB", {"held_out_psnr": "held-out images"}),
    Curve("rFID of held-out images", {"held_out_rfid": "held-out images"}),
    Curve("LPIPS of held-out images", {"held_out_lpips": "held-out images"}),
    Curve("Adversarial terms", {"generator": "generator", "discriminator": "discriminator"}, noisy=True),
    Curve("Learning rate", {"lr": "autoencoder", "discriminator_lr": "discriminator"}, linear=True),
)


def curves(charts: Sequence[Curve], metrics: Metrics, single: bool = True) -> list[str]:
    """The charts that have data; those of a single point only with `single`."""
    shown = []
    for curve in charts:
        lines = [Series(label, metrics.points(name), noisy=curve.noisy) for name, label in curve.metrics.items()]
        if single or any(len(line.points) > 1 for line in lines):
            unlabelled = len([line for line in lines if line.points]) == 1
            named = [line._replace(label="") if unlabelled else line for line in lines]
            shown.append(line_chart(curve.title, named, linear=curve.linear))
    return [chart for chart in shown if chart]


def noise_levels(metrics: Metrics) -> list[str]:
    """The held-out loss by noise level: over steps, where it was measured several times, and at the last evaluation."""
    lines = [Series(f"log-SNR {level:+g}", metrics.points(name)) for level, name in levels(metrics)]
    several = any(len(line.points) > 1 for line in lines)
    over_steps = line_chart("Held-out loss by noise level", lines, note="much noise: low log-SNR") if several else ""
    return [chart for chart in (over_steps, level_profile([("", metrics)])) if chart]


def level_profile(runs: Iterable[tuple[str, Metrics]]) -> str:
    """The held-out loss over noise levels, at each run's last evaluation."""
    lines = []
    for label, metrics in runs:
        values = [(level, metrics.last(name)) for level, name in levels(metrics)]
        lines.append(Series(label, [(level, value) for level, value in values if value is not None]))
    return line_chart("Held-out loss over noise levels, at the end", lines, "log-SNR")


def levels(metrics: Metrics) -> list[tuple[float, str]]:
    """The noise levels, as log-SNR, with their metrics' names."""
    named = [(name.removeprefix(LEVEL), name) for name in metrics.names if name.startswith(LEVEL)]
    return sorted((float(level), name) for level, name in named)


def evaluated(metrics: Metrics) -> list[tuple[str, str]]:
    """Networks and metrics that were measured on generated images while stage two trained."""
    parts = [name.split("/") for name in metrics.names if name.startswith("evaluate/")]
    return sorted((part[1], part[2]) for part in parts if len(part) == 3 and not part[2].endswith(("_low", "_high")))


def figure_series(label: str, metrics: Metrics, network: str, metric: str) -> Series:
    """A figure over steps with its intervals; without these where a step has none."""
    name = f"evaluate/{network}/{metric}"
    points, low, high = (metrics.points(name + end) for end in ("", "_low", "_high"))
    steps = [step for step, _ in points]
    complete = [step for step, _ in low] == steps and [step for step, _ in high] == steps
    bars = [(a, b) for (_, a), (_, b) in zip(low, high, strict=True)] if complete else []
    return Series(label, points, bars)


def figures_over_steps(metrics: Metrics) -> str:
    charts = [
        line_chart(f"{metric_name(metric)}, {network}", [figure_series("", metrics, network, metric)])
        for network, metric in evaluated(metrics)
    ]
    return chart_grid(charts)


def chart_grid(charts: Sequence[str]) -> str:
    shown = "".join(charts)
    return f'<div class="charts">{shown}</div>' if shown else ""


def metric_name(metric: str) -> str:
    """A metric's name for people, with an arrow towards better values."""
    if metric not in METRICS:
        return metric
    return f"{METRIC_NAMES.get(metric, metric)} {'↑' if METRICS[metric].larger_is_better else '↓'}"


def with_bar(figure: Figure) -> Raw:
    """A figure with its 95 % interval."""
    if figure.low is None or figure.high is None:
        return Raw(number(figure.value))
    return Raw(f"{number(figure.value)} <small>[{number(figure.low)}, {number(figure.high)}]</small>")


def final_figures(run: Run) -> str:
    """The finished model's figures, with their 95 % intervals, and the same of real images: the best there is."""
    rows, ceiling = [], run.evaluation.get("real against real")
    ceilings = ceiling if isinstance(ceiling, dict) else {}
    for network, metrics in run.figures.items():
        real = ceilings.get(network) or {}
        for metric, figure in metrics.items():
            best = with_bar(ceiling) if (ceiling := as_figure(real.get(metric))) else ""
            images = f"{figure.images:,}" if figure.images else ""
            rows.append((metric_name(metric), with_bar(figure), best, images, figure.network or network))
    if not rows:
        return ""
    header = ("metric", "value [95 % interval]", "real against real", "images", "network")
    sampling = run.evaluation.get("sampling of figures")
    settings = ", ".join(f"{name} {value}" for name, value in sampling.items()) if isinstance(sampling, dict) else ""
    note = f'<p class="note">Sampled with {elements.text(settings)}.</p>' if settings else ""
    return elements.table(header, rows) + note + explained(run.figures.values())


def against_another(run: Run) -> str:
    """The comparison with another model that an evaluation made, on the same prompts and noise."""
    comparison, rows = run.evaluation.get("comparison"), []
    if not isinstance(comparison, dict):
        return ""
    for network, metrics in comparison.items():
        for metric, values in metrics.items() if isinstance(metrics, dict) else ():
            ends = [values.get(name) for name in ("difference", "low", "high")]
            difference = as_figure(dict(zip(("value", "low", "high"), ends, strict=True)))
            if difference:
                name, result = f"{metric_name(metric)}, {network}", values.get("verdict", "")
                rows.append((name, with_bar(difference), result))
    header = ("metric", "difference [95 % interval]", "this model")
    title = f"<h3>Against {elements.text(comparison.get('with', 'another model'))}</h3>"
    return title + elements.table(header, rows) if rows else ""


def explained(figures: Iterable[Iterable[str]]) -> str:
    """What metrics mean, a line each."""
    names = dict.fromkeys(name for metrics in figures for name in metrics if name in METRICS)
    items = "".join(f"<li>{metric_name(name)}: {elements.text(METRICS[name].help)}</li>" for name in names)
    return f"<details><summary>What these mean</summary><ul>{items}</ul></details>" if items else ""


def scores(run: Run) -> str:
    """Everything else that `evaluation.json` has: by group of prompts or by network, then what stands alone."""
    groups: list[tuple[str, Mapping[str, Any]]] = []
    rows: dict[str, Mapping[str, Any]] = {}
    for name, values in run.evaluation.items():
        if name in (*OWN_SECTIONS, *SETTINGS):
            continue
        nested = values if name == "retrieval" and isinstance(values, dict) else {"": values}  # by network
        for network, row in nested.items():
            label = f"{name}, {network}" if network else name
            if as_figure(row) is not None:
                rows[label] = {"value": row}
            elif isinstance(row, dict) and all(map(as_figure, row.values())):
                rows[label] = row
            elif isinstance(row, dict):
                groups.append((label, row))
    parts = [_group(name, values) for name, values in groups] + [_score_table(rows)]
    settings = ", ".join(f"{name} {run.evaluation[name]}" for name in SAMPLING if name in run.evaluation)
    note = f'<p class="note">Sampled with {elements.text(settings)}.</p>' if settings else ""
    return note + "".join(parts) if any(parts) else ""


def _group(name: str, values: Mapping[str, Any]) -> str:
    """A table of measures, a row each; scores that stand beside measures are those of generated images."""
    own = {key: value for key, value in values.items() if as_figure(value)}
    measures = {key: row for key, row in values.items() if isinstance(row, dict) and key not in own}
    table = _score_table({"generated images": own, **measures} if own else measures)
    return f"<h3>{elements.text(name)}</h3>{table}" if table else ""


def _score_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row if as_figure(row[column])))
    cells = [
        (label, *(with_bar(figure) if (figure := as_figure(row.get(column))) else "" for column in columns))
        for label, row in rows.items()
    ]
    return elements.table(("", *columns), cells) if columns else ""


def samples_over_time(run: Run, images: Images) -> str:
    """The sample grids with a slider, some of them where there are many."""
    steps = list(run.sheets)
    paths = [run.sheets[step] for step in steps]
    chosen = spread(paths, MAX_FRAMES)
    limit = SHEETS_BYTES // max(5, len(chosen))
    uris = [(images.uri(paths[i], limit=limit), f"step {steps[i]:,}") for i in chosen]
    shown = [(uri, caption) for uri, caption in uris if uri]
    if not shown:
        return ""
    with Image.open(next(paths[i] for i, (uri, _) in zip(chosen, uris, strict=True) if uri)) as sheet:
        framed = has_frames(sheet)  # the prompts are the same at all steps
    return elements.frames(shown) + '<p class="note">Framed: prompts of held-out images.</p>' * framed


def stage1(run: Run, images: Images) -> str:
    """Reconstruction figures by split, curves, warnings about the latents, and reconstructed images."""
    splits = {"reconstruction": "held-out images", "combination": "held-out combinations", "held_out": "both"}
    by_split = {title: run.autoencoder[key] for key, title in splits.items() if run.autoencoder.get(key)}
    names = {"psnr": "PSNR, dB", "ssim": "SSIM", "ms_ssim": "MS-SSIM", "lpips": "LPIPS", "rfid": "rFID"}
    columns = [name for name in names if any(name in values for values in by_split.values())]
    rows = [
        (title, *(number(values[name]) if name in values else "" for name in columns))
        for title, values in by_split.items()
    ]
    parts = (
        [elements.table(("reconstruction of", *(names[name] for name in columns)), rows)] if rows and columns else []
    )
    parts.append(chart_grid(curves(STAGE1_CURVES, run.stage1, single=not rows)))
    latents = run.autoencoder.get("latents", {})
    if warnings := latents.get("warnings"):
        items = "".join(f"<li>{elements.text(warning)}</li>" for warning in warnings)
        parts.append(f"<details><summary>{len(warnings)} remarks on the latents</summary><ul>{items}</ul></details>")
    sheets = sorted((run.folder / "stage1" / "samples").glob("step-*.png"))
    if shown := images.figure(
        sheets[-1] if sheets else None, "Images, their reconstructions, the difference amplified"
    ):
        parts.append(f"<h3>Reconstructions</h3>{shown}")
    return "".join(part for part in parts if part)


def extremes(run: Run, images: Images) -> str:
    """The prompts with the lowest and the highest scores, with their images."""
    ordered = sorted(run.samples, key=lambda sample: sample.score)
    count = min(EXTREMES, -(-len(ordered) // 2))
    parts = []
    for title, chosen in (("Lowest scores", ordered[:count]), ("Highest scores", ordered[count:][: -count - 1 : -1])):
        thumbs = "".join(_thumb(sample, images) for sample in chosen)
        parts.append(f'<h3>{title}</h3><div class="thumbs">{thumbs}</div>' if thumbs else "")
    return "".join(parts)


def _thumb(sample: Sample, images: Images) -> str:
    uri = images.uri(sample.path, THUMB_WIDTH, THUMBS_BYTES // (2 * EXTREMES))
    group = f" <small>{elements.text(sample.group)}</small>" if sample.group else ""
    caption = Raw(f"{number(sample.score)} · {elements.text(sample.prompt)}{group}")
    if not uri:
        return f"<figure><figcaption>{caption}</figcaption></figure>"
    return elements.thumbnail(uri, caption, sample.prompt)


def memorization(run: Run, images: Images) -> str:
    """How many generated images are near-copies, how many training images are missed, and the closest pairs."""
    memorization = run.evaluation.get("memorization")
    values: Mapping[str, Any] = memorization if isinstance(memorization, dict) else {}
    modes = values.get("missed modes")
    missed: Mapping[str, Any] = modes if isinstance(modes, dict) else {}

    def of_images(key: str, kind: str) -> str:
        count = missed.get(key)
        return f"{count:,} {kind} images" if isinstance(count, int) else f"the {kind} images"

    rows = [
        (name, with_bar(figure))
        for name, value in (
            ("near-copies of training images, share of generated images", values.get("share")),
            ("the same of real images, which copy nothing", values.get("floor")),
            (
                f"training images that are nearest to none of {of_images('images', 'generated')}, share",
                missed.get("share"),
            ),
            ("the same by chance, of even draws", missed.get("expected")),
            (f"nearest to none of {of_images('real_images', 'generated')}", missed.get("share_of_as_many")),
            (f"nearest to none of {of_images('real_images', 'real')}, not trained on", missed.get("real")),
        )
        if (figure := as_figure(value)) is not None
    ]
    calibration = values.get("calibration")
    note = f'<p class="note">Calibrated with {elements.text(calibration)}.</p>' if calibration else ""
    shown = images.figure(
        run.image("evaluation/memorization.png"), "Closest pairs: generated, and the training image below"
    )
    return (elements.table(("", "value [95 % interval]"), rows) + note if rows else "") + shown


def training_speed(run: Run) -> str:
    """Time, throughput and memory of the stages."""
    rows = []
    for name, metrics in run.stages.items():
        speed = metrics.speed(int(run.get(f"{name}.batch", 0)))
        if speed:
            rows.append((name.replace("stage", "stage\N{NO-BREAK SPACE}"), *speed_cells(speed), memory(run, name)))
    if not rows:
        return ""
    note = "Time counts steps and the evaluations between them, not the pauses of a stopped run."
    return elements.table(SPEED_HEADER, rows) + f'<p class="note">{note}</p>'


def speed_cells(speed: Speed) -> tuple[str, ...]:
    """Below the first of `SPEED_HEADER`, without the memory."""
    mfu = f"{speed.mfu:.0%}" if speed.mfu is not None else ""
    energy = f"{speed.watts * speed.seconds / 3.6e6:.3g} kWh" if speed.watts is not None else ""
    return duration(speed.seconds), short(speed.images_per_second), f"{speed.waiting:.0%}", mfu, energy


def memory(run: Run, stage: str) -> str:
    """The peak that the preflight measured, and of which device."""
    needs = run.preflight.get(stage, {}).get("needs", {})
    size, device = needs.get("memory"), needs.get("device")
    return f"{size / 2**30:.1f} GiB, {device}" if size else ""


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3 h 05 min`, `2 d 4 h`."""
    minutes = round(seconds / 60)
    if seconds < 60:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes // 1440} d {minutes % 1440 // 60} h"


def summary(run: Run) -> str:
    """What was trained on what."""
    get: Callable[..., Any] = run.get
    conditions = ", ".join(get("stage2.conditions", [])) or "none"
    text = get("text.model") if "text" in get("stage2.conditions", []) else ""
    kind, rank = get("finetune.kind", "full"), get("finetune.rank")
    trained = {"full": "", "inversion": f"the embedding of {get('finetune.token')}"}.get(kind, f"{kind} of rank {rank}")
    steps = f"{get('stage1.steps', 0):,} steps of {get('stage1.batch')}"
    family = get("stage1.pretrained") or f"{get('stage1.model')}, {get('stage1.latent_channels')} channels, {steps}"
    start = get("stage2.init_from") or f"{get('stage2.model')}, channels {get('stage2.channels')}"
    schedule = "" if get("stage2.prediction_type") == "flow" else f", {get('stage2.beta_schedule')} schedule"
    shares = [f"{name} {short(count)}" for name, count in run.parameters.items()]
    optimizer = f"{get('stage2.optimizer')}, learning rate {get('stage2.lr')}, {get('stage2.lr_scheduler')}"
    versions = [f"{name} {run.provenance[name]}" for name in ("python", "torch", "diffusers") if name in run.provenance]
    return elements.facts(
        {
            "data": f"{run.sources}, {get('data.size')} px",
            "images": _images(run),
            "captions": f"{run.data['captions']:,}" if isinstance(run.data.get("captions"), int) else "",
            "conditions": conditions,
            "text encoder": text,
            "autoencoder": family,
            "U-Net": f"{start}; {get('stage2.steps', 0):,} steps of {get('stage2.batch')}",
            "trained": trained,
            "parameters": ", ".join(shares),
            "process": f"{get('stage2.prediction_type')}{schedule}",
            "optimizer": optimizer,
            "sampling": f"{get('sample.solver')}, {get('sample.steps')} steps, guidance {get('sample.guidance')}",
            "seed, precision": f"{get('run.seed')}, {get('run.precision')}",
            "versions": ", ".join(versions),
            "git commit": elements.code(str(run.provenance["git_commit"])[:12])
            if run.provenance.get("git_commit")
            else "",
        }
    )


def _images(run: Run) -> str:
    """How many images there are, are held out, and were bad."""
    splits, data = run.data.get("splits"), run.data
    parts = [f"{data['images']:,}"] if isinstance(data.get("images"), int) else []
    if isinstance(splits, dict):
        held_out = sum(count for name, count in splits.items() if name in ("reconstruction", "combination"))
        parts.append(f"{held_out:,} held out" if held_out else "none held out")
    elif isinstance(run.autoencoder.get("images"), int):
        parts.append(f"{run.autoencoder['images']:,} trained on")
    if data.get("bad"):
        parts.append(f"{data['bad']:,} bad and left out")
    return ", ".join(parts)
