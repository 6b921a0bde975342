"""Measures speed, as ratios within one run.

    python scripts/benchmark.py data --config configs/openmoji.yaml data.size=256 stage2.batch=16
    python scripts/benchmark.py stage1 --config configs/openmoji.yaml
    python scripts/benchmark.py tiles --config configs/openmoji.yaml stage1.pretrained=runs/openmoji/autoencoder
    python scripts/benchmark.py train --config configs/openmoji.yaml --steps 24
    python scripts/benchmark.py sample --model runs/openmoji/pipeline

`data`: how many samples a second come from the cache, cold (dropped from the system's memory first) and warm, and how
many when pictures are decoded and encoded on the fly; and how fast stage two trains from the one and from the other.
`stage1`: pictures a second and peak memory of stage one's loop, plain, recomputing activations, with a discriminator.
`tiles`: a picture of 2,048 pixels decoded whole and in tiles: memory, time, difference.
`train`: stage two beside what the common example trainer does (`reference_loop.py`), on the same U-Net, pictures and
batch: images and model FLOPs a second, their share of the device's fastest matrix product, memory, waiting for data.
`sample`: a text-to-image pipeline beside diffusers' own of the same folder, solver, steps and guidance: seconds for one
picture, pictures a second in batches; both in float32 and in the precision that our scripts take.
Each of `stage1`, `tiles` and `train` in a process of its own. Weights are random unless given: they don't change the
speed. Nothing is kept.
"""

from __future__ import annotations

import itertools
import json
import math
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import reference_loop
import torch
from diffusers import DiffusionPipeline

from ldm import autoencoder, config, text, unet
from ldm.data import images, index
from ldm.data.index import Index
from ldm.data.order import Positions
from ldm.data.samples import Feed, feed
from ldm.errors import Parser, UserError, command
from ldm.pipeline import PRECISIONS, LatentDiffusion
from ldm.processes import accelerator
from ldm.schema import Config
from ldm.speed import DTYPES, TRAINING, forward_flops, matmul_peak
from stage1_vae.train import train as train_autoencoder
from stage2_diffusion.train import train

WORKERS = (0, 1, 2, 4)
Lines = list[dict[str, float]]  # of metrics


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmark.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("data", "stage1", "tiles", "train", "sample"), help="what is measured")
    parser.add_argument("--config", type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("--model", help="of sample: a text-to-image pipeline's folder or Hub id")
    parser.add_argument("--batch", type=int, default=16, help="of sample: pictures drawn together")
    parser.add_argument("--compile", choices=("no", "yes", "graphs"), default="no", help="of sample: our U-Net")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of reading")
    parser.add_argument("--steps", type=int, default=8, help="of each measurement of training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.source=FOLDER")
    given = parser.parse_intermixed_args(arguments)
    if given.what == "sample":
        if not given.model:
            raise UserError("--model: none given; name a text-to-image pipeline's folder")
        beside_diffusers(given.model, given.batch, given.compile)
        return
    if not given.config:
        raise UserError("--config: none given; configs/openmoji.yaml for one")
    if given.steps < 4:
        raise UserError(f"--steps: {given.steps}; give 4 or more, of which the first two aren't measured")
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"run.dir={folder}", "run.tracker=none", "run.log_every=1", f"stage2.steps={given.steps}",
            f"stage1.steps={given.steps}", "sample.prompts=[]",
        ]  # fmt: skip
        overrides = [*given.overrides, *own]
        if given.what == "data":
            data(config.load(given.config, [*overrides, "data.latents=sample"]), given.seconds)
        elif given.what == "stage1":
            stage1(given.config, overrides)
        elif given.what == "tiles":
            tiles(given.config, overrides)
        else:  # a line of metrics waits for the device, so not at each step
            lines = [f"run.log_every={max(1, given.steps // 6)}", "stage2.evaluate_pictures=1"]
            compare(given.config, [f"data.cache_dir={folder}/cache", *overrides, *lines])


def data(settings: Config, seconds: float) -> None:
    """Prints a line a measurement, each with its ratio to the first."""
    device = accelerator(settings.run).device
    vae = _vae(settings).to(device)
    encoder = text.of(settings.text).to(device)
    pictures = index.build(settings).select("train")
    print(f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {settings.data.size} px")

    live = without_cache(settings)
    on_the_fly = rate(feed(pictures, live, vae, encoder, device), live, 0, seconds)
    print(f"samples  {'decoded and encoded on the fly':34} {on_the_fly:10,.1f} /s    1.0 ×", flush=True)
    kept = feed(pictures, settings, vae, encoder, device)
    for workers, state in itertools.product(WORKERS, ("cold", "warm")):
        if state == "cold":
            forget(settings.cache_dir)
            kept = feed(pictures, settings, vae, encoder, device)
            forget(settings.cache_dir)  # its checksums were read
        found = rate(kept, settings, workers, seconds)
        name = f"from the cache, {state}, {workers} workers"
        print(f"samples  {name:34} {found:10,.1f} /s {found / on_the_fly:6.1f} ×", flush=True)

    slow = training(live, pictures, vae, encoder)
    print(f"training {'encoding on the fly':34} {slow:10,.2f} /s    1.0 ×", flush=True)
    fast = training(settings, pictures, vae, encoder)
    print(f"training {'from the cache':34} {fast:10,.2f} /s {fast / slow:6.1f} ×", flush=True)


def _vae(settings: Config) -> autoencoder.Autoencoder:
    torch.manual_seed(0)
    one = settings.stage1
    if one.pretrained:
        return autoencoder.load(one.pretrained)
    return autoencoder.Autoencoder(autoencoder.build(one, settings.data.size))


def without_cache(settings: Config) -> Config:
    return settings.model_copy(
        update={
            "data": settings.data.model_copy(update={"cache": "none"}),
            "run": settings.run.model_copy(update={"dir": settings.run.dir / "live"}),
        }
    )


def rate(samples: Feed, settings: Config, workers: int, seconds: float) -> float:
    """Encoded samples a second, in batches of stage two, after the first batch."""
    batch = settings.stage2.batch

    def batches() -> Iterator[int]:
        positions = Positions(0, 1_000_000, batch, 1, 0, 1)
        for found in torch.utils.data.DataLoader(samples.dataset, batch_sampler=positions, num_workers=workers):  # type: ignore[arg-type]
            x0, _ = samples.encoded(found)
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


def training(settings: Config, pictures: Index, vae: autoencoder.Autoencoder, encoder: text.TextEncoder) -> float:
    """Pictures a second of stage two's own loop."""
    return settings.stage2.batch / _step_time(our_loop(settings, pictures, vae, encoder))


def our_loop(settings: Config, pictures: Index, vae: autoencoder.Autoencoder, encoder: text.TextEncoder) -> Lines:
    train(settings, pictures, vae, encoder)
    return _lines(settings.run.dir / "stage2")


def _lines(folder: Path) -> Lines:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def _step_time(lines: Lines) -> float:
    """Seconds of a step, the median between two lines, from the second on."""
    return median((b["time"] - a["time"]) / (b["step"] - a["step"]) for a, b in itertools.pairwise(lines[1:]))


def apart(action: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """What `action` gives in a process of its own, and its peak memory in MB: the GPU's where there is one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(action, arguments)
        memory = pool.apply(_peak)
    return found, memory


def _peak() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def stage1(file: Path, overrides: list[str]) -> None:
    """Prints a line a variant of training, each with its ratio to the first."""
    variants = {
        "as configured": [],
        "recomputed activations": ["stage1.gradient_checkpointing=true"],
        "with a discriminator": ["stage1.gan.start=0", "stage1.gan.warmup=0"],
    }
    first: float | None = None
    for name, more in variants.items():
        seconds, memory = apart(_train_stage1, file, [*overrides, f"run.dir={_folder(overrides)}/{name}", *more])
        first = first or seconds[1]
        print(
            f"stage 1  {name:24} {seconds[0] / seconds[1]:8.2f} img/s {first / seconds[1]:6.2f} × {memory:9,.0f} MB",
            flush=True,
        )


def _folder(overrides: list[str]) -> str:
    """The run's folder among overrides."""
    return next(each.partition("=")[2] for each in overrides if each.startswith("run.dir="))


def _train_stage1(file: Path, overrides: list[str]) -> tuple[int, float]:
    settings = config.load(file, overrides)
    train_autoencoder(settings, index.build(settings))
    return settings.stage1.batch, _step_time(_lines(settings.run.dir / "stage1"))


def tiles(file: Path, overrides: list[str], side: int = 2048) -> None:
    """Prints memory and seconds of decoding whole and in tiles, and how much they differ."""
    pictures = []
    for name, whole in (("whole", 10**9), ("in tiles", autoencoder.WHOLE)):
        (seconds, picture), memory = apart(_decode, file, overrides, side, whole)
        pictures.append(picture)
        print(f"decode   {side} px, {name:10} {seconds:8.1f} s {memory:9,.0f} MB", flush=True)
    difference = (pictures[1] - pictures[0]).abs() * 127.5  # of 255
    print(f"decode   difference: mean {difference.mean():.2g}, largest {difference.max():.2g} of 255")


def _decode(file: Path, overrides: list[str], side: int, whole: int) -> tuple[float, torch.Tensor]:
    settings = config.load(file, overrides)
    device = accelerator(settings.run).device
    vae = _vae(settings)
    picture = images.to_tensor(images.cut(index.build(settings).picture(0), (side, side))[0])[None]
    latents = vae.to(device).encode(picture)
    autoencoder.WHOLE = whole
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    pixels = vae.decode(latents).cpu()
    return time.perf_counter() - began, pixels


def compare(file: Path, overrides: list[str]) -> None:
    """Prints a line each of the reference as it comes, of the reference in our precision, and of our own loop."""
    settings = config.load(file, overrides)
    stage, here = settings.stage2, accelerator(settings.run)
    fixed = stage.variance == "fixed" and not settings.text.train
    if not fixed or stage.conditions != ("text",) or settings.stage1.family != "kl":
        raise UserError(
            "train: the reference knows text from a frozen encoder, latents of an AutoencoderKL and a fixed variance; "
            "set stage2.conditions=[text] text.train=false stage2.variance=fixed stage1.model=kl"
        )
    flops, precision = TRAINING * unet_flops(settings), here.mixed_precision
    print(
        f"machine  {os.cpu_count()} cores, {here.device}, {torch.get_num_threads()} threads; {settings.data.size} px, "
        f"batch {stage.batch}, {flops / 1e9:,.2f} GFLOP to train the U-Net on an image",
        flush=True,
    )
    rows = {f"reference, {each}": (reference_loop.train, [f"run.precision={each}"]) for each in ("no", precision)}
    rates: list[float] = []
    for name, (loop, more) in {**rows, f"ours, {precision}": (our_loop, [])}.items():
        (rate, peak, waiting), memory = apart(_measured, loop, file, [*overrides, *more])
        rates.append(rate)
        print(
            f"training {name:16} {rate:9,.1f} img/s {rate / rates[0]:6.2f} × {rate * flops / 1e9:10,.1f} GFLOP/s, "
            f"{rate * flops / peak:4.0%} of {peak / 1e9:,.0f} {memory:9,.0f} MB {waiting}",
            flush=True,
        )
    print(f"training in the same precision, ours is {rates[-1] / rates[-2]:.2f} × the reference")


def _measured(loop: Callable[..., Lines], file: Path, overrides: list[str]) -> tuple[float, float, str]:
    """Images a second, the device's peak in FLOP/s, the share of waiting."""
    settings = config.load(file, overrides)
    here = accelerator(settings.run)
    peak = matmul_peak(here.device, DTYPES[here.mixed_precision])
    pictures = index.build(settings).select("train")
    lines = loop(settings, pictures, _vae(settings), text.of(settings.text))
    waited = [line["waiting"] for line in lines[2:] if "waiting" in line]
    return settings.stage2.batch / _step_time(lines), peak, f"{median(waited):4.1%} waiting" if waited else ""


def beside_diffusers(name: str, batch: int, compiled: str, rounds: int = 3) -> None:
    """Prints a line each of diffusers' pipeline and of ours, in float32 and in our scripts' precision.

    The best of some rounds in which all take turns, so that what else the machine does is in none alone.
    """
    ours = LatentDiffusion.load(name)
    device, steps, guidance = ours.device, ours.steps, ours.guidance
    if not ours.text or ours.task != "generate":
        raise UserError(f"--model: {name} makes no pictures from text alone; give one that does")
    precision = next(key for key, dtype in PRECISIONS.items() if dtype == ours.faster("auto").unet.dtype)
    drawers: dict[str, Callable[[list[str]], Any]] = {}
    both = dict.fromkeys(("no", precision))
    for each in both:
        theirs = DiffusionPipeline.from_pretrained(name, dtype=PRECISIONS[each], use_safetensors=True).to(device)
        theirs.set_progress_bar_config(disable=True)
        given = {"num_inference_steps": steps, "guidance_scale": guidance}
        drawers[f"diffusers, {each}"] = lambda prompts, pipe=theirs, given=given: pipe(prompts, **given).images
        model = LatentDiffusion.load(name).faster(each, compiled)
        drawers[f"ours, {each}"] = lambda prompts, model=model: model(prompts, batch=len(prompts))
    print(
        f"machine  {os.cpu_count()} cores, {device}, {torch.get_num_threads()} threads; {ours.side} px, {steps} steps "
        f"of {type(ours.scheduler).__name__}, guidance {guidance}",
        flush=True,
    )
    best: dict[tuple[str, int], float] = {}
    for turn in range(rounds + 1):  # the first, in which caches and kernels are made, is beaten by the others
        for (title, drawn), number in itertools.product(drawers.items(), (1, batch)):
            best[title, number] = min(_seconds(drawn, number, turn), best.get((title, number), math.inf))
    for number, what in ((1, "one picture"), (batch, f"batches of {batch}")):
        first = best["diffusers, no", number]
        for title in drawers:
            took = best[title, number]
            row = f"{what:13} {title:16} {took:8.3f} s {number / took:8.2f} img/s {first / took:6.2f} ×"
            print(f"sampling {row}", flush=True)
        pairs = [(each, best[f"diffusers, {each}", number] / best[f"ours, {each}", number]) for each in both]
        print(f"sampling {what:13} in the same precision: " + ", ".join(f"{each} {r:.2f} ×" for each, r in pairs))


def _seconds(drawn: Callable[[list[str]], Any], number: int, turn: int) -> float:
    prompts = [f"picture {i} of turn {turn}" for i in range(number)]  # no turn finds embeddings of the one before
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    drawn(prompts)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def unet_flops(settings: Config) -> float:
    """Of one image's forward."""
    encoder = text.of(settings.text)
    shape = settings.stage1.latent_channels, settings.data.size // settings.stage1.factor
    with torch.device("meta"):
        x, t, states = torch.empty(1, *shape, shape[1]), torch.empty(1), torch.empty(1, encoder.length, encoder.width)
    return forward_flops(unet.build_empty(settings.stage2, *shape, encoder.width), x, t, states)


if __name__ == "__main__":
    sys.exit(main())
