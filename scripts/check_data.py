"""Checks a configuration's pictures and captions before anything is trained on them.

    python scripts/check_data.py --config configs/openmoji.yaml data.source=YOUR_FOLDER

Prints sizes, buckets, captions that don't fit and duplicates; writes `data-report.json` (every bad one: file, reason,
fix) and `data-sheet.png` (what the model will see) to the run's folder. Exit status 1: training would stop.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import ldm.utils.openmp  # noqa: F401  # before torch

import torch

from ldm.config import loader
from ldm.data import check, images, index, sources
from ldm.data.records import BadSample
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.launch import join
from ldm.models import text_encoder
from ldm.utils.errors import Parser, command

BEGINNING = 1000  # samples of a stream


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="check_data.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.source=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    settings = loader.load(args.config, args.overrides)
    join(settings.run)
    sources.check(settings.data.source, settings.data.streaming, settings.stage2.conditions)
    folder = settings.run.dir
    folder.mkdir(parents=True, exist_ok=True)
    return check_stream(settings) if settings.data.streaming else check_index(settings)


def check_index(settings: loader.Config) -> int:
    stage, folder = settings.stage2, settings.run.dir
    found = index.build(settings.data, settings.cache_dir, stage.conditions)
    found.write_report(folder / "data-report.json")
    for _, bad in zip(range(20), found.bad_samples(), strict=False):
        print(f"bad        {bad}")
    if found.bad_count() > 20:
        print(f"bad        … and {found.bad_count() - 20:,} more in {folder / 'data-report.json'}")
    if len(found):
        encoder = text_encoder.of(settings.text) if stage.text else None
        print(check.describe(check.facts(found, encoder, settings.text.model)))
        spec = SampleSpec.of(settings.data, stage.batch, settings.run.seed, stage.cond_dropout)
        check.sheet(found.select("train"), spec).save(folder / "data-sheet.png")
        print(f"look at {folder / 'data-sheet.png'}")
    if problem := found.stop_reason(folder / "data-report.json"):
        print(f"training would stop: {problem}")
        return 1
    print("training can begin")
    return 0


def check_stream(settings: loader.Config) -> int:
    """The beginning of a stream stands for all of it."""
    data, report = settings.data, settings.run.dir / "data-report.jsonl"
    stream = Stream(data, settings.cache_dir, report, settings.stage2.conditions)
    print("\n".join(stream.sources.describe()), f"shards     {len(stream):,}", sep="\n")
    good = bad = 0
    shown = list[tuple[torch.Tensor, str]]()
    for found in stream.first_samples(BEGINNING):
        if isinstance(found, BadSample):
            print(f"bad        {found}")
            bad += 1
        else:
            good += 1
            if len(shown) < 32:
                shown.append(found)
    print(f"images     {good:,} good, {bad:,} bad among the first")
    if shown:
        pictures = images.to_pil(torch.stack([pixels for pixels, _ in shown]))
        images.grid(pictures, [caption for _, caption in shown], columns=8).save(settings.run.dir / "data-sheet.png")
        print(f"look at {settings.run.dir / 'data-sheet.png'}")
    if not good or bad > data.max_bad * (good + bad) or (bad and data.on_error == "stop"):
        print(f"training would stop: data.on_error is {data.on_error}, data.max_bad is {data.max_bad}")
        return 1
    print("training can begin")
    return 0


if __name__ == "__main__":
    sys.exit(main())
