"""Checks a configuration's images and captions before training.

    ldm-check-data --config configs/openmoji.yaml data.source=YOUR_FOLDER

Prints sizes, buckets, captions that are too long, and duplicates. Writes to the run's folder: `data-report.json`, every
bad sample with file, reason and fix, and `data-sheet.png`, samples as the model will see them. Exit status 1 means that
training would stop.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from ldm.config import loader
from ldm.data import check, images, index, source_kinds
from ldm.data.index_report import stop_reason, write_report
from ldm.data.records import BadSample
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.launch import join, on_main
from ldm.models import text_encoder
from ldm.training.run_dir import make_dir
from ldm.utils.errors import Parser, command

STREAM_SAMPLES = 1000  # a stream is checked by its first samples
SHEET_SAMPLES = 32


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.source=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    settings = loader.load(args.config, args.overrides)
    join(settings.run)
    source_kinds.check(settings.data.source, settings.data.streaming, settings.stage2.conditions)
    on_main(partial(make_dir, "run.dir", settings.run.dir))
    return check_stream(settings) if settings.data.streaming else check_index(settings)


def check_index(settings: loader.Config) -> int:
    """Checks every sample."""
    stage, folder = settings.stage2, settings.run.dir
    data = index.build(settings.data, settings.cache_dir, stage.conditions)
    write_report(data, folder / "data-report.json")
    for _, bad in zip(range(20), data.bad_samples(), strict=False):
        print(f"bad        {bad}")
    if data.bad_count() > 20:
        print(f"bad        … and {data.bad_count() - 20:,} more in {folder / 'data-report.json'}; of all of them:")
        for fix, count in Counter(bad.fix for bad in data.bad_samples()).most_common(10):
            print(f"bad        {count:,}: {fix}")
    if len(data):
        encoder = text_encoder.of(settings.text) if stage.text else None
        print(check.describe(check.facts(data, encoder, settings.text.model)))
    if len(training := data.select("train")):
        spec = SampleSpec.of(settings.data, stage.batch, settings.run.seed, stage.cond_dropout)
        check.sheet(training, spec).save(folder / "data-sheet.png")
        print(f"look at {folder / 'data-sheet.png'}")
    print(check.balance(data))
    if problem := stop_reason(data, folder / "data-report.json") or data.sources.unconfirmed_caption():
        print(f"training would stop: {problem}")
        return 1
    print("training can begin")
    return 0


def check_stream(settings: loader.Config) -> int:
    """Checks the first samples of a stream."""
    data, report = settings.data, settings.run.dir / "data-report.jsonl"
    stream = Stream(data, settings.cache_dir, report, settings.stage2.conditions)
    print("\n".join(stream.sources.describe()), f"shards     {len(stream):,}", sep="\n")
    good = bad = 0
    samples = list[tuple[torch.Tensor, str]]()
    for sample in stream.first_samples(STREAM_SAMPLES):
        if isinstance(sample, BadSample):
            print(f"bad        {sample}")
            bad += 1
        else:
            good += 1
            if len(samples) < SHEET_SAMPLES:
                samples.append(sample)
    print(f"images     {good:,} good, {bad:,} bad among the first")
    left_out = stream.sources.left_out()
    print(*left_out.lines(), check.balance_line(good, bad, left_out.counts.total()), sep="\n")
    if samples:
        sheet = images.to_pil(torch.stack([pixels for pixels, _ in samples]))
        path = settings.run.dir / "data-sheet.png"
        images.grid(sheet, [caption for _, caption in samples], columns=8).save(path)
        print(f"look at {path}")
    if not good or bad > data.max_bad * (good + bad) or (bad and data.on_error == "stop"):
        print(f"training would stop: data.on_error is {data.on_error}, data.max_bad is {data.max_bad}")
        return 1
    print("training can begin")
    return 0
