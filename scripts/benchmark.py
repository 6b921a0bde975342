"""Measures speed, as ratios within one run.

    python scripts/benchmark.py data --config configs/openmoji.yaml data.size=256 stage2.batch=16
    python scripts/benchmark.py stage1 --config configs/openmoji.yaml
    python scripts/benchmark.py tiles --config configs/openmoji.yaml stage1.pretrained=runs/openmoji/autoencoder
    python scripts/benchmark.py train --config configs/openmoji.yaml --steps 24 --rows reference-bf16,ours
    python scripts/benchmark.py sample --model runs/openmoji/pipeline
    python scripts/benchmark.py attention --precision bf16

`data`: how many samples a second come from the cache, cold (dropped from the system's memory first) and warm, and how
many when pictures are decoded and encoded on the fly; and how fast stage two trains from the one and from the other.
`stage1`: pictures a second and peak memory of stage one's loop, plain, recomputing activations, with a discriminator.
`tiles`: a picture of 2,048 pixels decoded whole and in tiles: memory, time, difference.
`train`: stage two beside what the common example trainer does (`reference_loop.py`), on the same U-Net, pictures and
batch: images and model FLOPs a second, their share of the device's fastest matrix product, memory, waiting for data.
`sample`: a text-to-image pipeline beside diffusers' own of the same folder, solver, steps and guidance: seconds for one
picture, pictures a second in batches; both in float32 and in the precision that our scripts take.
`attention`: kernels of attention, forward and backward, on the shapes of Stable Diffusion's U-Net at 512 pixels, and
how far their results are from those of the first.

`--rows` chooses what is compared, where there is a choice: `ours`, `reference` (train), `diffusers` (sample), `plain`,
`recomputing`, `discriminator` (stage1), `eager`, `sdpa`, `xformers` (attention); then, if not that of `--precision`,
the precision (`ours-fp16`), and keys that the row has besides (`ours+stage2.compile=true`). Each row of `stage1`,
`tiles` and `train` is in a process of its own. Weights are random unless given: they don't change the speed. Nothing is
kept: no checkpoint is written, nothing exported.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median

import ldm.utils.openmp  # noqa: F401  # before torch

import reference_loop
import torch
from benchmark_attention import attention
from benchmark_rows import Lines, Report, Row, apart, data_sheet, each_apart, forget_peak, lines_of, rows
from benchmark_sampling import beside_diffusers

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import images, index
from ldm.data.cache import CacheOptions
from ldm.data.crops import crop_resize
from ldm.data.dataset import Stage2Dataset, stage2_dataset
from ldm.data.index import Index
from ldm.data.sampler import Positions, SampleSpec
from ldm.distributed.launch import accelerator, join, precision
from ldm.models import autoencoder, text_encoder, unet
from ldm.training.engine import DTYPES
from ldm.training.throughput import TRAINING, forward_flops, matmul_peak
from ldm.utils.errors import Parser, UserError, command
from stage1_vae.train import train as train_autoencoder
from stage2_diffusion.train import train

WORKERS = (0, 1, 2, 4)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmark.py", description=__doc__.split("\n\n")[0])
    subjects = ("data", "stage1", "tiles", "train", "sample", "attention")
    parser.add_argument("what", choices=subjects, help="what is measured")
    parser.add_argument("--config", type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("--model", help="of sample: a text-to-image pipeline's folder or Hub id")
    parser.add_argument("--rows", help="what is compared, for example reference-bf16,ours,ours+stage2.compile=true")
    parser.add_argument("--precision", choices=tuple(DTYPES), help="of rows that name none; default: the fastest here")
    parser.add_argument("--batch", type=int, default=16, help="of sample and attention: pictures computed together")
    parser.add_argument("--count", type=int, help="of sample: pictures asked for at once, beside one; default: a batch")
    parser.add_argument("--rounds", type=int, default=3, help="of sample and attention; the best one counts")
    parser.add_argument("--size", type=int, default=512, help="of attention: pixels along a side")
    parser.add_argument("--compile", choices=("no", "yes", "graphs"), default="no", help="of sample: our U-Net")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of reading")
    parser.add_argument("--steps", type=int, default=8, help="of each measurement of training")
    parser.add_argument("--json", type=Path, metavar="FILE", help="appends each row to it, as a line of JSON")
    parser.add_argument("--label", default="", help="stands in these lines as their step")
    parser.add_argument("--beside", default="", metavar="ROW", help="of an earlier call in the file: ratios are to it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.source=FOLDER")
    args = parser.parse_intermixed_args(arguments)
    for key, least in (("batch", 1), ("count", 1), ("rounds", 1), ("size", 32), ("steps", 4)):
        if (value := getattr(args, key)) is not None and value < least:
            why = ", of which the first two aren't measured" if key == "steps" else ""
            raise UserError(f"--{key}: {value}; give {least} or more{why}")
    if args.what == "attention":
        attention(args)
        return
    needed = "model" if args.what == "sample" else "config"
    if not getattr(args, needed):
        what = {"model": "a text-to-image pipeline's folder", "config": "a YAML file, configs/openmoji.yaml for one"}[
            needed
        ]
        raise UserError(f"--{needed}: none given; name {what}")
    if args.what == "sample":
        beside_diffusers(args)
        return
    with tempfile.TemporaryDirectory() as folder:
        # A line of metrics waits for the device, so there are few. Snapshots of averages are files too.
        own = [
            f"run.dir={folder}", "run.tracker=none", f"run.log_every={max(1, args.steps // 6)}", "sample.prompts=[]",
            f"stage1.steps={args.steps}", "stage1.ema_widths=[]",
            f"stage2.steps={args.steps}", "stage2.ema_widths=[]",
            *([f"run.precision={args.precision}"] if args.precision else []),
        ]  # fmt: skip
        overrides = [*args.overrides, *own]
        if args.what == "data":
            data(args, overrides)
        elif args.what == "stage1":
            stage1(args, overrides)
        elif args.what == "tiles":
            tiles(args, overrides)
        else:
            compare(args, overrides)


def data(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a line a measurement, each with its ratio to the first."""
    settings = loader.load(args.config, [*overrides, "data.latents=sample"])
    device, seconds = accelerator(settings.run).device, args.seconds
    vae = _vae(settings).to(device)
    encoder = text_encoder.of(settings.text).to(device)
    pictures = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train")
    print(f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {settings.data.size} px")

    stage, reading = settings.stage2, Report.of("samples", "/s", args)
    spec = SampleSpec.of(settings.data, stage.batch, settings.run.seed, stage.cond_dropout)

    def samples(cache: CacheOptions | None) -> Stage2Dataset:
        return stage2_dataset(pictures, spec, cache, vae, encoder, device, stage.image)

    reading.row("decoded and encoded on the fly", rate(samples(None), stage.batch, 0, seconds))
    cache = CacheOptions.of(settings.data, settings.cache_dir)
    kept = samples(cache)
    for workers, state in itertools.product(WORKERS, ("cold", "warm")):
        if state == "cold":
            forget(settings.cache_dir)
            kept = samples(cache)
            forget(settings.cache_dir)  # its checksums were read
        reading.row(f"from the cache, {state}, {workers} workers", rate(kept, stage.batch, workers, seconds))

    trained = Report.of("training", "img/s", args)
    live = loader.load(
        args.config, [*overrides, "data.latents=sample", "data.cache=none", f"run.dir={settings.run.dir / 'live'}"]
    )
    trained.row("encoding on the fly", training(live, pictures, vae, encoder))
    trained.row("from the cache", training(settings, pictures, vae, encoder))


def _vae(settings: Config) -> autoencoder.Autoencoder:
    torch.manual_seed(0)
    one = settings.stage1
    if one.pretrained:
        return autoencoder.load(one.pretrained)
    return autoencoder.Autoencoder(autoencoder.build(one, settings.data.size))


def rate(samples: Stage2Dataset, batch: int, workers: int, seconds: float) -> float:
    """Encoded samples a second, in batches of stage two, after the first batch."""

    def batches() -> Iterator[int]:
        positions = Positions(0, 1_000_000, batch, 1, 0, 1)
        for found in torch.utils.data.DataLoader(samples.dataset, batch_sampler=positions, num_workers=workers):  # type: ignore[arg-type]
            x0, _ = samples.encode(found)
            yield len(x0)

    reading = batches()
    next(reading)
    began, count = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        count += next(reading)
    return count / (time.perf_counter() - began)


def forget(folder: Path) -> None:
    """Asks the system to drop the cache's files from its memory, as after a restart."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def training(
    settings: Config, pictures: Index, vae: autoencoder.Autoencoder, encoder: text_encoder.TextEncoder
) -> float:
    """Pictures a second of stage two's own loop."""
    return settings.stage2.batch / _step_time(our_loop(settings, pictures, vae, encoder))


def our_loop(
    settings: Config, pictures: Index, vae: autoencoder.Autoencoder, encoder: text_encoder.TextEncoder
) -> Lines:
    return lines_of(train, settings, pictures, vae, encoder)


def _step_time(lines: Lines) -> float:
    """Seconds of a step, the median between two lines, from the second on."""
    return median((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(lines[1:]))


STAGE1 = {
    "plain": [],
    "recomputing": ["stage1.gradient_checkpointing=true"],
    "discriminator": ["stage1.gan.start=0", "stage1.gan.warmup=0"],
}


def stage1(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a line a variant of training, each with its ratio to the first."""
    chosen = precision(loader.load(args.config, overrides).run)
    table = Report.of("stage 1", "img/s", args)
    action = partial(_train_stage1, args.config, overrides)
    for row, rate, memory in each_apart(action, rows(args.rows or ",".join(STAGE1), tuple(STAGE1), chosen)):
        table.row(row.name, rate, f"{memory.allocated:9,.0f} MB", memory)


def _train_stage1(file: Path, overrides: list[str], row: Row) -> float:
    """Images a second."""
    own = [*STAGE1[row.who], *row.overrides, f"run.precision={row.precision}"]
    settings = loader.load(file, [*overrides, *own])
    return settings.stage1.batch / _step_time(
        lines_of(
            train_autoencoder, settings, index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
        )
    )


def tiles(args: argparse.Namespace, overrides: list[str], side: int = 2048) -> None:
    """Prints memory and seconds of decoding whole and in tiles, and how much they differ."""
    pictures, table = [], Report.of("decode", "pictures/s", args)
    for name, whole in (("whole", 10**9), ("in tiles", autoencoder.WHOLE)):
        (seconds, picture), memory = apart(_decode, args.config, overrides, side, whole)
        pictures.append(picture)
        table.row(f"{side} px, {name}", 1 / seconds, f"{seconds:8.1f} s {memory.allocated:9,.0f} MB", memory)
    difference = (pictures[1] - pictures[0]).abs() * 127.5  # of 255
    print(f"decode   difference: mean {difference.mean():.2g}, largest {difference.max():.2g} of 255")


def _decode(file: Path, overrides: list[str], side: int, whole: int) -> tuple[float, torch.Tensor]:
    settings = loader.load(file, overrides)
    device = accelerator(settings.run).device
    vae = _vae(settings)
    pictures = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    picture = images.to_tensor(crop_resize(pictures.load_image(0), (side, side))[0])[None]
    latents = vae.to(device).encode(picture)
    autoencoder.WHOLE = whole
    forget_peak()
    began = time.perf_counter()
    pixels = vae.decode(latents).cpu()
    return time.perf_counter() - began, pixels


LOOPS: dict[str, Callable[..., Lines]] = {"reference": reference_loop.train, "ours": our_loop}


def compare(args: argparse.Namespace, overrides: list[str]) -> None:
    """Prints a line each of the reference as it comes, of the reference in our precision, and of our own loop."""
    settings = loader.load(args.config, overrides)
    stage, chosen, device = settings.stage2, precision(settings.run), join(settings.run).device
    fixed = stage.variance == "fixed" and not settings.text.train
    if not fixed or stage.conditions != ("text",) or settings.stage1.family != "kl":
        raise UserError(
            "train: the reference knows text from a frozen encoder, latents of an AutoencoderKL and a fixed variance; "
            "set stage2.conditions=[text] text.train=false stage2.variance=fixed stage1.model=kl"
        )
    asked = rows(args.rows or "reference-no,reference,ours", tuple(LOOPS), chosen)
    if not settings.data.cache_dir:
        overrides = [*overrides, f"data.cache_dir={settings.run.dir}/cache"]
    flops = TRAINING * unet_flops(settings)
    print(
        f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {settings.data.size} px, "
        f"batch {stage.batch}, {flops / 1e9:,.2f} GFLOP to train the U-Net on an image",
        flush=True,
    )
    table = Report.of("training", "img/s", args)
    for row, found, memory in each_apart(partial(_measured, args.config, overrides), asked):
        rate, said, more = found.pop("rate"), "", {}
        for key, top in (("mfu", found["peak"]), ("mfu_of_data_sheet", data_sheet(row.precision))):
            if top:
                more[key] = rate * flops / top
                said += f", {more[key]:4.0%} of {'' if key == 'mfu' else 'the data sheet’s '}{top / 1e9:,.0f}"
        said = f"{rate * flops / 1e9:10,.1f} GFLOP/s{said} {memory.allocated:9,.0f} MB"
        if row.precision == "fp16":
            said += f", {found['skipped']:.0f} steps skipped, loss scale {found['loss_scale']:,.0f}"
        if "waiting" in found:
            said += f", {found['waiting']:.1%} waiting"
        table.row(row.name, rate, said, memory, flops=rate * flops, **{**found, **more})
    pair = [table.values.get(f"{who}, {chosen}") for who in ("reference", "ours")]
    if pair[0] and pair[1]:
        print(f"training in the same precision, ours is {pair[1] / pair[0]:.2f} × the reference")


def _measured(file: Path, overrides: list[str], row: Row) -> dict[str, float]:
    """Images a second, the device's peak in FLOP/s, the share of waiting, fp16's skipped steps and loss scale."""
    settings = loader.load(file, [*overrides, *row.overrides, f"run.precision={row.precision}"])
    peak = matmul_peak(accelerator(settings.run).device, DTYPES[row.precision])
    pictures = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train")
    lines = LOOPS[row.who](settings, pictures, _vae(settings), text_encoder.of(settings.text))
    waited = [line["waiting"] for line in lines[2:] if "waiting" in line]
    found = {"rate": settings.stage2.batch / _step_time(lines), "peak": peak}
    if waited:
        found["waiting"] = median(waited)
    return found | {key: lines[-1][key] for key in ("skipped", "loss_scale")}


def unet_flops(settings: Config) -> float:
    """Of one image's forward."""
    encoder = text_encoder.of(settings.text)
    shape = settings.stage1.latent_channels, settings.data.size // settings.stage1.factor
    with torch.device("meta"):
        x, t, states = torch.empty(1, *shape, shape[1]), torch.empty(1), torch.empty(1, encoder.length, encoder.width)
    return forward_flops(unet.build_empty(settings.stage2, *shape, encoder.width), x, t, states)


if __name__ == "__main__":
    sys.exit(main())
