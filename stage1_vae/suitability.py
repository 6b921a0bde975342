"""How well autoencoders suit a data set: figures on its held-out images, and what to do with each autoencoder.

    python stage1_vae/suitability.py --config configs/openmoji.yaml --model RUN/autoencoder [--model ANOTHER …]

Prints a table with a row per model, and a recommendation: keep, tune the decoder, or retrain. Writes `report.json`
(all figures, also per image), `reconstructions.png` and `worst.png` to `--out`.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ldm.utils.openmp  # noqa: F401  # before torch

import numpy as np
import torch
from tqdm import tqdm

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import index, source_kinds
from ldm.data.dataset import iter_images
from ldm.data.index import Index
from ldm.data.records import HELD_OUT, BadSample
from ldm.data.stream import Stream
from ldm.distributed.launch import join
from ldm.evaluation.reconstruction import KERNEL, Bicubic, ReconstructionMetrics, max_scales
from ldm.models import autoencoder, feature_networks
from ldm.models.autoencoder import Autoencoder
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import Parser, UserError, command
from ldm.utils.paths import path_or_id
from stage1_vae.suitability_report import ImageName, Row, Subject, describe, draw_sheet, recommendations, table, to_json

if TYPE_CHECKING:
    from torchmetrics import Metric

NUM_EXAMPLES = 8  # images on reconstructions.png
MIN_FID_IMAGES = 2048  # rFID of fewer is mostly noise: Inception has as many features


@command
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    settings = loader.load(args.config, args.overrides)
    device = join(settings.run).device
    source_kinds.check(settings.data.source, settings.data.streaming, settings.stage2.conditions)
    models = {name: autoencoder.load(name, "--model").to(device) for name in dict.fromkeys(args.model)}
    for name, model in models.items():
        _check_sizes(name, model.factor, settings)
    out = _make_out_dir(args.out, args.model[0])
    data, split, notes = choose_images(settings, args.split, args.count)
    side = _shortest_side(data, settings)
    subjects, lpips_net, missing = _subjects(models, side, args.lpips_net, device)
    notes += missing

    with tqdm(
        total=None if isinstance(data, Stream) else len(data), desc="reconstructing", unit=" img", leave=False
    ) as bar:
        parts = batches(data, settings.data.size, args.count, device, bar)
        names, examples, worst = measure(parts, subjects, args.worst)
    if not names:
        raise UserError(f"data.source: no usable image in {settings.data.name}; scripts/check_data.py says why")
    if len(names) < MIN_FID_IMAGES and subjects[0].metrics.fid is not None:
        notes.append(f"rFID of {len(names):,} images is mostly noise; about {MIN_FID_IMAGES:,} are needed")
    baselines = {s.model.factor: s.metrics.means() for s in subjects if isinstance(s.model, Bicubic)}
    facts = [describe(subject, baselines) for subject in subjects]
    title = f"{len(names):,} images ({split}) of {settings.data.name} at {settings.data.size} px"
    unit = "bias: mean of rebuilt less real, in 1/255" + (f"; LPIPS by {lpips_net}" if lpips_net else "")
    lines = [title, "", table(facts), unit, "", *(f"note: {note}" for note in notes), *recommendations(facts), ""]
    print("\n".join(lines))

    per_image = {subject.name: {k: v.tolist() for k, v in subject.metrics.per_image.items()} for subject in subjects}
    report = {
        "config": str(args.config),
        "data": settings.data.name,
        "split": split,
        "images": len(names),
        "size": settings.data.size,
        "ms_ssim_scales": max_scales(side),
        "lpips_net": lpips_net,
        "notes": notes,
        "models": facts,
        "names": names,
        "per_image": per_image,
    }
    with atomic_file(out / "report.json") as tmp_path:
        tmp_path.write_text(json.dumps(to_json(report), indent=1, ensure_ascii=False) + "\n", "utf-8")
    for file, rows in (("reconstructions.png", examples), ("worst.png", worst)):
        draw_sheet(rows, [s for s in subjects if not isinstance(s.model, Bicubic)], names).save(out / file)
    print(f"wrote {out}/report.json, reconstructions.png and worst.png")


def _parse(arguments: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="suitability.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="names the images and their size")
    parser.add_argument(
        "--model", required=True, type=path_or_id, action="append", metavar="PATH_OR_ID", help="may be given repeatedly"
    )
    parser.add_argument("--out", type=Path, help="default: evaluation/ in the first model's run, or here")
    parser.add_argument("--count", type=int, default=MIN_FID_IMAGES, help="images at most (default: %(default)s)")
    parser.add_argument("--worst", type=int, default=8, help="images on worst.png (default: %(default)s)")
    parser.add_argument(
        "--split", action="append", choices=("train", *HELD_OUT), help="may be given repeatedly; default: held out"
    )
    parser.add_argument(
        "--lpips-net",
        choices=("auto", *feature_networks.LPIPS_NETS),
        default="auto",
        help="auto: vgg, or st-vgg where vgg's weights can't be had (default: %(default)s)",
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.size=256")
    args = parser.parse_intermixed_args(arguments)
    for name, value in (("--count", args.count), ("--worst", args.worst)):
        if value < 1:
            raise UserError(f"{name}: {value}; give 1 or more")
    return args


# ------------------------------------------------------------------------------------------------------ choosing images


def choose_images(settings: Config, splits: Sequence[str] | None, count: int) -> tuple[Index | Stream, str, list[str]]:
    """The images to measure on, a description of them, and notes; held-out images if there are any."""
    if settings.data.streaming:
        if splits:
            raise UserError("--split: a stream has no splits; leave it out")
        note = "a stream has no held-out images: these may be training images, so the figures flatter"
        report = settings.run.dir / "data-report.jsonl"
        return Stream(settings.data, settings.cache_dir, report, settings.stage2.conditions), "the first", [note]
    data = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    if not len(data):
        raise UserError(f"data.source: no usable image in {settings.data.name}; scripts/check_data.py says why")
    splits = splits or HELD_OUT
    chosen = data.select(*splits)
    notes = []
    if not len(chosen):
        existing = sorted(set(data.column("split").tolist()))
        if set(splits) != set(HELD_OUT) or "train" not in existing:
            raise UserError(f"--split: no image in {' or '.join(splits)}; the data has {', '.join(existing)}")
        chosen, splits = data.select("train"), ["train"]
        notes = ["the data has no held-out images: these are training images, so the figures flatter"]
    total = f"of {len(chosen):,} in " if count < len(chosen) else ""
    return chosen.subset(count), total + ", ".join(splits), notes


def _check_sizes(name: str, factor: int, settings: Config) -> None:
    """UserError if the configured sizes are not multiples of the autoencoder's factor."""
    data = settings.data
    for key, value in (("data.size", data.size), ("data.buckets.step", data.buckets.step if data.buckets else factor)):
        if value % factor:
            step = math.lcm(factor, settings.stage1.factor)
            multiple = step * max(1, round(value / step))
            raise UserError(f"{key}: {value} is not a multiple of {factor}, the factor of {name}; {multiple} would be")


def _shortest_side(data: Index | Stream, settings: Config) -> int:
    """The shortest side of any image, in pixels."""
    side = settings.data.size if isinstance(data, Stream) else min(min(size) for size in data.sizes.used())
    if side < KERNEL:
        raise UserError(f"data.size: sides of {side} px are less than SSIM's window of {KERNEL}; make it larger")
    return side


def batches(
    data: Index | Stream, size: int, count: int, device: torch.device, bar: tqdm[Any]
) -> Iterator[tuple[torch.Tensor, list[ImageName]]]:
    """Every image once, centre cropped, in batches of one size, `(N, 3, H, W)` in [-1, 1], with their names."""
    batch = min(64, max(1, 2**19 // size**2))
    if isinstance(data, Stream):
        good = (sample for sample in data.first_samples(count) if not isinstance(sample, BadSample))
        for part in iter(lambda: list(itertools.islice(good, batch)), []):
            yield torch.stack([pixels for pixels, _ in part]).to(device), [("", caption) for _, caption in part]
            bar.update(len(part))
        return
    names = list(zip(data.column("key").tolist(), (captions[0] for captions in data.captions()), strict=True))
    order = iter(np.concatenate(list(data.by_size().values())).tolist())  # the order of `iter_images`
    for x in iter_images(data, batch):
        yield x.to(device), [names[i] for i in itertools.islice(order, len(x))]
        bar.update(len(x))


# ----------------------------------------------------------------------------------------------------------- measuring


def _subjects(
    models: Mapping[str, Autoencoder], side: int, net: str, device: torch.device
) -> tuple[list[Subject], str | None, list[str]]:
    """A subject per model and per factor's bicubic baseline, with every available metric.

    Also the network of LPIPS, None where it is not measured, and notes on missing metrics.
    """
    scales, notes = max_scales(side), []
    if scales < 5:
        effect = f"has {scales} of its 5 scales" if scales else "is left out"
        notes.append(f"MS-SSIM {effect}: there are sides of {side} px, and it needs 176")
    fids: list[Metric | None] = [None] * len(models)
    try:
        fids = [feature_networks.fid(device) for _ in models]
    except UserError as error:
        notes.append(str(error))
    lpips, lpips_net = _lpips(net, side, device, notes)
    subjects = [
        Subject(name, model, ReconstructionMetrics(scales, lpips, fid))
        for (name, model), fid in zip(models.items(), fids, strict=True)
    ]
    factors = sorted({model.factor for model in models.values()})
    baselines = [Subject(f"bicubic ÷ {f}", Bicubic(f), ReconstructionMetrics(scales, lpips)) for f in factors]
    return subjects + baselines, lpips_net, notes


def _lpips(net: str, side: int, device: torch.device, notes: list[str]) -> tuple[Metric | None, str | None]:
    """LPIPS and the network that it is by, or None twice; adds to the notes which network could not be had."""
    for candidate in ("vgg", "st-vgg") if net == "auto" else (net,):
        try:
            return feature_networks.lpips(candidate, side, device), candidate
        except UserError as error:
            notes.append(str(error))
    return None, None


def measure(
    parts: Iterable[tuple[torch.Tensor, list[ImageName]]], subjects: Sequence[Subject], num_worst: int
) -> tuple[list[ImageName], list[Row], list[Row]]:
    """Rebuilds all images with all subjects.

    Returns the images' names, rows of random examples (always the same), and rows of those that the first subject
    rebuilt worst, the worst first.
    """
    names: list[ImageName] = []
    examples: list[Row] = []
    worst: list[Row] = []
    rng = np.random.default_rng(0)
    for x, part in parts:
        rebuilt, psnr = zip(*(subject.rebuild(x) for subject in subjects), strict=True)
        random = torch.from_numpy(rng.random(len(part)))
        lowest = psnr[0].nan_to_num(-math.inf, math.inf)
        for rows, rank, count in ((examples, random, NUM_EXAMPLES), (worst, lowest, num_worst)):
            for i in rank.argsort()[:count].tolist():
                rows.append(Row(float(rank[i]), len(names) + i, torch.stack([x[i], *(y[i] for y in rebuilt)]).cpu()))
            rows.sort(key=lambda row: row.rank)
            del rows[count:]
        names += part
    return names, examples, worst


def _make_out_dir(out: Path | None, model: str) -> Path:
    """Creates the report's folder: `--out`, else `evaluation/` in the run that the model came from, else in the cwd."""
    if not out:
        runs = (folder for folder in Path(model).parents if (folder / "config.yaml").is_file())
        out = (next(runs, Path()) if Path(model).exists() else Path()) / "evaluation"
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: can't write to {out}: {error}") from None
    return out


if __name__ == "__main__":
    sys.exit(main(None))
