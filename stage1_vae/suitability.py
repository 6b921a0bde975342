"""How well autoencoders suit a data set: figures on its held-out pictures, and what to do with each autoencoder.

    python stage1_vae/suitability.py --config configs/openmoji.yaml --model RUN/autoencoder [--model ANOTHER …]

Prints a table with a row a model and a verdict on each: keep, tune the decoder, or retrain. Writes `report.json` (all
figures, of each picture too), `reconstructions.png` and `worst.png` to `--out`.
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
from ldm.data import index, sources
from ldm.data.dataset import iter_images
from ldm.data.index import Index
from ldm.data.records import HELD_OUT, BadSample
from ldm.data.stream import Stream
from ldm.distributed.launch import join
from ldm.evaluation.reconstruction import KERNEL, Bicubic, Figures, scales_of
from ldm.models import autoencoder, feature_networks
from ldm.models.autoencoder import Autoencoder
from ldm.utils.atomic_files import whole_file
from ldm.utils.errors import Parser, UserError, command
from stage1_vae.suitability_report import Name, Row, Subject, describe, plain, sheet, table, verdicts

if TYPE_CHECKING:
    from torchmetrics import Metric

ROWS = 8  # pictures of reconstructions.png
SETTLED = 2048  # pictures from which on rFID says something: as many as Inception has features


@command
def main(arguments: Sequence[str] | None = None) -> None:
    given = _arguments(arguments)
    settings = loader.load(given.config, given.overrides)
    device = join(settings.run).device
    sources.check(settings.data.source, settings.data.streaming, settings.stage2.conditions)
    models = {name: autoencoder.load(name, "--model").to(device) for name in dict.fromkeys(given.model)}
    for name, model in models.items():
        _fits(name, model.factor, settings)
    out = _folder(given.out, given.model[0])
    data, which, notes = choose(settings, given.split, given.count)
    side = _shortest(data, settings)
    subjects, more = _subjects(models, side, given.lpips_net, device)
    notes += more

    with tqdm(
        total=None if isinstance(data, Stream) else len(data), desc="reconstructing", unit=" img", leave=False
    ) as bar:
        names, some, worst = measure(batches(data, settings.data.size, given.count, device, bar), subjects, given.worst)
    if not names:
        raise UserError(f"data.source: no usable picture in {settings.data.name}; scripts/check_data.py says why")
    if len(names) < SETTLED and subjects[0].figures.fid is not None:
        notes.append(f"rFID of {len(names):,} pictures is mostly noise; it says something from about {SETTLED:,} on")
    baselines = {s.model.factor: s.figures.means() for s in subjects if isinstance(s.model, Bicubic)}
    facts = [describe(subject, baselines) for subject in subjects]
    title = f"{len(names):,} pictures ({which}) of {settings.data.name} at {settings.data.size} px"
    unit = "bias: mean of rebuilt less real, in 1/255"
    print("\n".join([title, "", table(facts), unit, "", *(f"note: {note}" for note in notes), *verdicts(facts), ""]))

    each = {subject.name: {k: v.tolist() for k, v in subject.figures.each.items()} for subject in subjects}
    report = {
        "config": str(given.config), "data": settings.data.name, "split": which, "pictures": len(names),
        "size": settings.data.size, "ms_ssim_scales": scales_of(side), "lpips_net": given.lpips_net,
        "notes": notes, "models": facts, "names": names, "each": each,
    }  # fmt: skip
    with whole_file(out / "report.json") as tmp_path:
        tmp_path.write_text(json.dumps(plain(report), indent=1, ensure_ascii=False) + "\n", "utf-8")
    for file, shown in (("reconstructions.png", some), ("worst.png", worst)):
        sheet(shown, [s for s in subjects if not isinstance(s.model, Bicubic)], names).save(out / file)
    print(f"wrote {out}/report.json, reconstructions.png and worst.png")


def _arguments(arguments: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="evaluate.py", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="says which pictures, and at which size")
    parser.add_argument("--model", required=True, action="append", metavar="PATH_OR_ID", help="may be given repeatedly")
    parser.add_argument("--out", type=Path, help="default: evaluation/ in the first model's run, or here")
    parser.add_argument("--count", type=int, default=SETTLED, help="pictures at most (default: %(default)s)")
    parser.add_argument("--worst", type=int, default=8, help="pictures on worst.png (default: %(default)s)")
    parser.add_argument(
        "--split", action="append", choices=("train", *HELD_OUT), help="may be given repeatedly; default: held out"
    )
    parser.add_argument(
        "--lpips-net", choices=tuple(feature_networks.BACKBONES), default="vgg", help="default: %(default)s"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.size=256")
    args = parser.parse_intermixed_args(arguments)
    for name, value in (("--count", args.count), ("--worst", args.worst)):
        if value < 1:
            raise UserError(f"{name}: {value}; give 1 or more")
    return args


# ------------------------------------------------------------------------------------------------------ which pictures


def choose(settings: Config, splits: Sequence[str] | None, count: int) -> tuple[Index | Stream, str, list[str]]:
    """The pictures to measure on, in words too, and what is to be said of them: held-out ones where there are any."""
    if settings.data.streaming:
        if splits:
            raise UserError("--split: a stream has no splits; leave it out")
        note = "a stream has no held-out pictures: these may have been trained on, and figures flatter"
        report = settings.run.dir / "data-report.jsonl"
        return Stream(settings.data, settings.cache_dir, report, settings.stage2.conditions), "the first", [note]
    found = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    if not len(found):
        raise UserError(f"data.source: no usable picture in {settings.data.name}; scripts/check_data.py says why")
    splits = splits or HELD_OUT
    chosen = found.select(*splits)
    notes = []
    if not len(chosen):
        there = sorted(set(found.column("split").tolist()))
        if set(splits) != set(HELD_OUT) or "train" not in there:
            raise UserError(f"--split: no picture of {' or '.join(splits)}; the data has {', '.join(there)}")
        chosen, splits = found.select("train"), ["train"]
        notes = ["the data has no held-out pictures: these are training pictures, and figures flatter"]
    of = f"of {len(chosen):,} in " if count < len(chosen) else ""
    return chosen.subset(count), of + ", ".join(splits), notes


def _fits(name: str, factor: int, settings: Config) -> None:
    """UserError where pictures of these sizes are not a whole number of an autoencoder's latents."""
    data = settings.data
    for key, value in (("data.size", data.size), ("data.buckets.step", data.buckets.step if data.buckets else factor)):
        if value % factor:
            step = math.lcm(factor, settings.stage1.factor)
            better = step * max(1, round(value / step))
            raise UserError(f"{key}: {value} is not a multiple of {factor}, the factor of {name}; {better} would be")


def _shortest(data: Index | Stream, settings: Config) -> int:
    """The shortest side of any picture, in pixels."""
    side = settings.data.size if isinstance(data, Stream) else min(min(size) for size in data.sizes)
    if side < KERNEL:
        raise UserError(f"data.size: sides of {side} px are less than SSIM's window of {KERNEL}; make it larger")
    return side


def batches(
    data: Index | Stream, size: int, count: int, device: torch.device, bar: tqdm[Any]
) -> Iterator[tuple[torch.Tensor, list[Name]]]:
    """Every picture once, centre cropped, in batches of one size, `(N, 3, H, W)` in [-1, 1], with their names."""
    batch = min(64, max(1, 2**19 // size**2))
    if isinstance(data, Stream):
        good = (found for found in data.first_samples(count) if not isinstance(found, BadSample))
        for part in iter(lambda: list(itertools.islice(good, batch)), []):
            yield torch.stack([pixels for pixels, _ in part]).to(device), [("", caption) for _, caption in part]
            bar.update(len(part))
        return
    names = list(zip(data.column("key").tolist(), (several[0] for several in data.captions()), strict=True))
    order = iter(np.concatenate(list(data.by_size().values())).tolist())  # which `iter_images` has too
    for x in iter_images(data, batch):
        yield x.to(device), [names[i] for i in itertools.islice(order, len(x))]
        bar.update(len(x))


# ----------------------------------------------------------------------------------------------------------- measuring


def _subjects(
    models: Mapping[str, Autoencoder], side: int, net: str, device: torch.device
) -> tuple[list[Subject], list[str]]:
    """A row for each model and for the baseline of each factor, with the metrics that can be had; why others can't."""
    scales, notes = scales_of(side), []
    if scales < 5:
        left = f"has {scales} of its 5 scales" if scales else "is left out"
        notes.append(f"MS-SSIM {left}: there are sides of {side} px, and it needs 176")
    lpips: Metric | None = None
    fids: list[Metric | None] = [None] * len(models)
    try:
        fids = [feature_networks.fid(device) for _ in models]
    except UserError as error:
        notes.append(str(error))
    try:
        lpips = feature_networks.lpips(net, side, device)
    except UserError as error:
        notes.append(str(error))
    subjects = [
        Subject(name, model, Figures(scales, lpips, fid))
        for (name, model), fid in zip(models.items(), fids, strict=True)
    ]
    factors = sorted({model.factor for model in models.values()})
    return subjects + [Subject(f"bicubic ÷ {f}", Bicubic(f), Figures(scales, lpips)) for f in factors], notes


def measure(
    parts: Iterable[tuple[torch.Tensor, list[Name]]], subjects: Sequence[Subject], worst: int
) -> tuple[list[Name], list[Row], list[Row]]:
    """Rebuilds all pictures with all subjects.

    Returns their names, rows of some, always the same, and of those that the first subject rebuilt worst, worst first.
    """
    names: list[Name] = []
    some: list[Row] = []
    lowest: list[Row] = []
    luck = np.random.default_rng(0)
    for x, part in parts:
        rebuilt, psnr = zip(*(subject.rebuild(x) for subject in subjects), strict=True)
        drawn = torch.from_numpy(luck.random(len(part)))
        for rows, rank, most in ((some, drawn, ROWS), (lowest, psnr[0].nan_to_num(-math.inf, math.inf), worst)):
            for i in rank.argsort()[:most].tolist():
                rows.append(Row(float(rank[i]), len(names) + i, torch.stack([x[i], *(y[i] for y in rebuilt)]).cpu()))
            rows.sort(key=lambda row: row.rank)
            del rows[most:]
        names += part
    return names, some, lowest


def _folder(out: Path | None, model: str) -> Path:
    """Where the report goes: where it should, or `evaluation` in the run that a model came from, or here."""
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
