"""Measures speed, as ratios within one run.

    python scripts/benchmark.py data --config configs/openmoji.yaml data.size=256 stage2.batch=16

`data`: how many samples a second come from the cache, cold (dropped from the system's memory first) and warm, and how
many when pictures are decoded and encoded on the fly; and how fast stage two trains from the one and from the other.
Weights are random: they don't change the speed. Nothing is kept.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from ldm import autoencoder, config, text
from ldm.data import index
from ldm.data.index import Index
from ldm.data.order import Positions
from ldm.data.samples import Feed, feed
from ldm.errors import Parser, command
from ldm.processes import accelerator
from ldm.schema import Config
from stage2_diffusion.train import train

WORKERS = (0, 1, 2, 4)


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmark.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("what", choices=("data",), help="what is measured")
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("--seconds", type=float, default=5.0, help="of each measurement of reading")
    parser.add_argument("--steps", type=int, default=8, help="of each measurement of training")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example data.source=FOLDER")
    given = parser.parse_intermixed_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        own = [
            f"run.dir={folder}", "run.tracker=none", "run.log_every=1", f"stage2.steps={given.steps}",
            "sample.prompts=[]", "data.latents=sample",
        ]  # fmt: skip
        data(config.load(given.config, [*given.overrides, *own]), given.seconds)


def data(settings: Config, seconds: float) -> None:
    """Prints a line a measurement, each with its ratio to the first."""
    device = accelerator(settings.run).device
    torch.manual_seed(0)
    vae = autoencoder.Autoencoder(autoencoder.build(settings.stage1, settings.data.size)).to(device)
    encoder = text.load(settings.text.model, settings.text.max_tokens, settings.text.width).to(device)
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
    """Pictures a second of stage two's own loop, the median of its steps after the first two."""
    train(settings, pictures, vae, encoder)
    lines = (settings.run.dir / "stage2/metrics.jsonl").read_text().splitlines()
    times = [json.loads(line)["time"] for line in lines]
    steps = sorted(b - a for a, b in itertools.pairwise(times[1:]))
    return settings.stage2.batch / steps[len(steps) // 2]


if __name__ == "__main__":
    sys.exit(main())
