"""Measures speed, as ratios within one run, and quality against time.

    python scripts/benchmark.py data --config configs/openmoji.yaml data.size=256 stage2.batch=16
    python scripts/benchmark.py latency --config configs/openmoji.yaml stage2.batch=8 --steps 1000
    python scripts/benchmark.py stage1 --config configs/openmoji.yaml
    python scripts/benchmark.py tiles --config configs/openmoji.yaml stage1.pretrained=runs/openmoji/autoencoder
    python scripts/benchmark.py train --config configs/openmoji.yaml --steps 24 --rows reference-bf16,ours
    python scripts/benchmark.py quality --config configs/openmoji.yaml --out runs/quality stage1.pretrained=AUTOENCODER
    python scripts/benchmark.py sample --model runs/openmoji/pipeline
    python scripts/benchmark.py attention --precision bf16
    python scripts/benchmark.py checkpoint --parameters 300M

`data`: samples per second from the cache, cold (dropped from the page cache first) and warm, and with images decoded
and encoded on the fly; and the speed of stage two's training with and without the cache.
`latency`: how long steps of `--step-seconds` wait for data from the cache, percentiles, where some reads take seconds:
with torch's own loader (`plain`) and `ours`. The delays are made up, and follow from the seed.
`stage1`: images per second and peak memory of stage one's loop: plain, with gradient checkpointing, with a
discriminator.
`tiles`: an image of 2,048 pixels decoded at once and in tiles: memory, time, difference.
`train`: stage two against the common example trainer (`reference_loop.py`), on the same U-Net, images and batch: images
and model FLOPs per second, their share of the device's fastest matrix product, memory, time spent waiting for data.
`quality`: how well images follow their prompts after so many `--seconds` of stage two, ours and the example trainer's;
the only one that trains models and keeps them. Also the ratio of the times in which each reaches the other's figure.
`sample`: a text-to-image pipeline against diffusers' own of the same folder, solver, steps and guidance: seconds for
one image, images per second in batches; both in float32 and in the precision that our scripts choose.
`attention`: attention kernels, forward and backward, on the shapes of Stable Diffusion's U-Net at 512 pixels, and the
difference of their results from the first kernel's.
`checkpoint`: how long a training waits for a checkpoint of so many parameters, against writing it at once and reading
it again for its hash. Where there is no memory for a copy, ours is written at once too, tensor by tensor.

`--rows` chooses what is compared: `ours`, `reference` (train, quality), `diffusers` (sample), `plain` (latency,
stage1), `recomputing`, `discriminator` (stage1), `eager`, `sdpa`, `xformers` (attention); then, if it is not that of
`--precision`, the precision (`ours-fp16`), and the row's own configuration keys (`ours+stage2.compile=true`). Each row
of `stage1`, `tiles` and `train` runs in a process of its own. Weights are random unless a model is named: they don't
change the speed. No checkpoint is kept, nothing exported, but by `quality`.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ldm.utils.openmp  # noqa: F401  # before torch

from benchmark_attention import compare_attention_kernels
from benchmark_autoencoder import compare_stage1, compare_tiling
from benchmark_checkpoint import compare_checkpoints, number_of_parameters
from benchmark_data import compare_data_loading
from benchmark_latency import compare_latency
from benchmark_quality import compare_quality
from benchmark_sampling import compare_sampling
from benchmark_training import compare_training

from ldm.utils.errors import Parser, UserError, command
from ldm.utils.paths import path_or_id
from ldm.utils.precision import DTYPES

CONFIGURED = {
    "data": compare_data_loading,
    "latency": compare_latency,
    "stage1": compare_stage1,
    "tiles": compare_tiling,
    "train": compare_training,
}
"""Benchmarks that read a configuration."""


@command
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    if args.what == "attention":
        return compare_attention_kernels(args)
    if args.what == "checkpoint":
        return compare_checkpoints(args)
    if args.what == "sample":
        if not args.model:
            raise UserError("--model: none given; name a text-to-image pipeline's folder")
        return compare_sampling(args)
    if not args.config:
        raise UserError("--config: none given; name a YAML file, for example configs/openmoji.yaml")
    if args.what == "quality":
        return compare_quality(args, args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        overrides = [
            *args.overrides,
            f"run.dir={folder}",
            "run.tracker=none",
            "sample.prompts=[]",
            f"run.log_every={max(1, args.steps // 6)}",  # few lines of metrics: each waits for the device
            f"stage1.steps={args.steps}",
            "stage1.ema_widths=[]",  # no snapshots of averages, which are files
            f"stage2.steps={args.steps}",
            "stage2.ema_widths=[]",
            *([f"run.precision={args.precision}"] if args.precision else []),
        ]
        return CONFIGURED[args.what](args, overrides)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="benchmark.py", description=__doc__.split("\n\n")[0])
    choices = (*CONFIGURED, "quality", "sample", "attention", "checkpoint")
    parser.add_argument("what", choices=choices, help="what is measured")
    parser.add_argument("--config", type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("--model", type=path_or_id, help="sample: a text-to-image pipeline's folder or Hub id")
    parser.add_argument("--rows", help="what is compared, for example reference-bf16,ours,ours+stage2.compile=true")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="of rows that name none; default: the fastest here")
    parser.add_argument("--batch", type=int, default=16, help="sample, attention: images per batch")
    parser.add_argument("--count", type=int, help="sample: images per call, besides a single one; default: a batch")
    parser.add_argument("--rounds", type=int, default=3, help="sample, attention: repetitions; the fastest counts")
    parser.add_argument("--size", type=int, default=512, help="attention: pixels along a side")
    parser.add_argument("--compile", choices=("no", "yes", "graphs"), default="no", help="sample: our U-Net")
    parser.add_argument(
        "--seconds", type=float, help="data: of each measurement of reading (5); quality: of stage two (600)"
    )
    parser.add_argument("--seeds", type=_seeds, default=(0, 1, 2), help="quality: of the trainings, such as 0,1,2")
    out = "quality: the trainings' folder; the same command continues. checkpoint: the folder to write to"
    parser.add_argument("--out", type=Path, help=out)
    parser.add_argument("--parameters", type=number_of_parameters, default="300M", help="checkpoint: of the network")
    parser.add_argument("--steps", type=int, default=8, help="of each measurement of training or waiting")
    parser.add_argument("--step-seconds", type=float, default=0.02, help="latency: how long a step takes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends each row to it, as a line of JSON")
    parser.add_argument("--label", default="", help="the step in these lines")
    baseline = "ratios are to this row of an earlier call, from the file"
    parser.add_argument("--baseline", "--beside", default="", metavar="ROW", help=baseline)  # --beside: former name
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.source=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    if args.seconds is None:
        args.seconds = 600.0 if args.what == "quality" else 5.0
    if args.seconds <= 0:
        raise UserError(f"--seconds: {args.seconds:g}; give more than 0")
    for key, least in (("batch", 1), ("count", 1), ("rounds", 1), ("parameters", 1), ("size", 32), ("steps", 4)):
        if (value := getattr(args, key)) is not None and value < least:
            reason = ", of which the first two aren't measured" if key == "steps" else ""
            raise UserError(f"--{key}: {value}; give {least} or more{reason}")
    return args


def _seeds(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}; give numbers, such as 0,1,2") from None


if __name__ == "__main__":
    sys.exit(main())
