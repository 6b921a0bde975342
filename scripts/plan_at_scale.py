"""What training at scale takes, before it is paid for: bytes, memory, bandwidth, hours, money.

    python scripts/plan_at_scale.py --config configs/sd-512.yaml --images 1e6,1e8 --gpus 8,64 stage2.batch=2048

Bytes and memory are counted from the configuration's shapes and dtypes. All else follows from rates, which the first
table lists with their sources; an option sets each of them.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

from scale_figures import KEY_BYTES, RATES, index_row_bytes, latent_bytes, live_rate, text_bytes, variants

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data.cache import PER_FILE
from ldm.distributed.launch import accumulated
from ldm.distributed.sharding import SHARDABLE
from ldm.training.memory_estimate import MemoryEstimate, estimate_memory
from ldm.training.preflight import format_time
from ldm.utils.errors import Parser, command

Row = dict[str, Any]


def data_row(config: Config, images: int, epochs: float, rates: Mapping[str, float]) -> Row:
    """What a number of images takes, whatever the number of GPUs; captions are all distinct."""
    text, count = text_bytes(config), variants(config)
    return {
        "images": images,
        "image_files_bytes": images * rates["image-kilobytes"] * 1e3,
        "index_bytes": images * index_row_bytes(int(rates["caption-bytes"])),
        "latents_bytes": images * (latent_bytes(config) * count + KEY_BYTES),
        "text_embeddings_bytes": images * (text + KEY_BYTES) if text else 0,
        "files_of_the_cache": math.ceil(images / max(1, PER_FILE // count)) + math.ceil(images / PER_FILE) * bool(text),
        "steps": math.ceil(images * epochs / config.stage2.batch),
    }


def memory_row(config: Config, gpus: int, rates: Mapping[str, float]) -> Row:
    """Memory of each GPU in a step, and checkpoints."""
    (steps, images), optimizer = accumulated("stage2", config.stage2, gpus), config.stage2.optimizer
    ddp, shards = estimate_memory(config, gpus), SHARDABLE if gpus > 1 else dict.fromkeys(SHARDABLE, ())
    weights, gradients, moments, averages = (
        _in_step(ddp, name) for name in ("(trained )?weights, float32", "gradients", "moments", r"(\d+ )?average")
    )
    # ZeRO-2 divides gradients and moments, and keeps a divided second copy of the weights
    zero2 = ddp.step - (gradients + moments) * (1 - 1 / gpus) + weights / gpus
    checkpoint = weights + moments + averages
    return {
        "gpus": gpus,
        "passes_a_step": steps,
        "images_a_pass": images,
        "ddp_bytes": ddp.step,
        "zero2_bytes": zero2 if optimizer in shards["deepspeed"] else None,
        "fsdp_bytes": estimate_memory(config, gpus, sharded=True).step if optimizer in shards["fsdp"] else None,
        "checkpoint_bytes": checkpoint,
        "writing_it_hours": checkpoint / (rates["write-gigabytes-per-second"] * 1e9) / 3600,
    }


def _in_step(estimate: MemoryEstimate, pattern: str) -> int:
    """Bytes of the rows whose names begin with a pattern."""
    return sum(row.step for row in estimate.rows if re.match(pattern, row.name))


def reading_row(config: Config, gpus: int, rates: Mapping[str, float]) -> Row:
    """Bytes a second that training reads, in all and on a machine, with a cache and without, and what decodes them."""
    cached = gpus * rates["images-per-second-per-gpu"] * (latent_bytes(config) + text_bytes(config))
    images, share = gpus * live_rate(rates) * rates["image-kilobytes"] * 1e3, min(1, rates["gpus-per-machine"] / gpus)
    return {
        "gpus": gpus,
        "cache_in_all_bytes_per_second": cached,
        "cache_a_machine_bytes_per_second": cached * share,
        "images_in_all_bytes_per_second": images,
        "images_a_machine_bytes_per_second": images * share,
        "decoding_cores_a_gpu": live_rate(rates) / rates["decoded-per-second-per-core"],
    }


def time_row(images: int, gpus: int, epochs: float, rates: Mapping[str, float]) -> Row:
    """Hours, and the price of them all."""
    per_gpu = images / gpus / 3600
    indexing = per_gpu / (rates["cores-per-gpu"] * rates["indexed-per-second-per-core"])
    encoding = per_gpu / rates["encoded-per-second-per-gpu"]
    cached, live = (per_gpu * epochs / rate for rate in (rates["images-per-second-per-gpu"], live_rate(rates)))
    row = {"images": images, "gpus": gpus, "indexing_hours": indexing, "encoding_the_cache_hours": encoding}
    row |= {"training_from_the_cache_hours": cached, "training_without_hours": live}
    price = gpus * rates["dollars-per-gpu-hour"]
    row |= {"price_with_the_cache_dollars": (indexing + encoding + cached) * price}
    return row | {"price_without_dollars": (indexing + live) * price}


def gigabytes(count: float) -> str:
    factor, unit = next((pair for pair in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB")) if count >= pair[0]), (1e6, "MB"))
    return f"{count / factor:.3g} {unit}"


UNITS: dict[str, Callable[[float], str]] = {
    "_bytes_per_second": lambda value: f"{gigabytes(value)}/s",
    "_bytes": gigabytes,
    "_hours": lambda value: format_time(3600 * value),
    "_dollars": "${:,.0f}".format,
    "": lambda value: f"{value:,}" if isinstance(value, int) else f"{value:,.3g}",
}


def table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table; a key ends in its unit."""
    units = {key: next(unit for unit in UNITS if key.endswith(unit)) for key in rows[0]}
    lines = [[key.removesuffix(unit).replace("_", " ") for key, unit in units.items()], ["---"] * len(units)]
    for row in rows:
        values = ((row[key], UNITS[unit]) for key, unit in units.items())
        lines.append(
            [value if isinstance(value, str) else "–" if value is None else show(value) for value, show in values]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def positive(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < (value := float(text)) < math.inf:
            return value
    raise argparse.ArgumentTypeError(f"{text!r}; give a positive number, such as 1e6")


def counts(text: str) -> list[int]:
    """Whole numbers, separated by commas."""
    values = [positive(part) for part in text.split(",")]
    if any(value != int(value) for value in values):
        raise argparse.ArgumentTypeError(f"{text!r}; give whole numbers, such as 8,64 or 1e6")
    return [int(value) for value in values]


@command
def main(arguments: Sequence[str] | None = None) -> int:
    parser = Parser(prog="plan_at_scale.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--images", type=counts, required=True, metavar="N,…", help="for example 1e6,1e8")
    parser.add_argument("--gpus", type=counts, required=True, metavar="N,…", help="for example 8,64")
    parser.add_argument("--config", type=Path, required=True, help="a YAML file, for example configs/sd-512.yaml")
    parser.add_argument("--size", type=int, help="of the images, in pixels; default: data.size")
    parser.add_argument("--epochs", type=positive, default=1.0, help="how often an image is trained on; default: 1")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    for name, (_, source) in RATES.items():
        parser.add_argument(f"--{name}", type=positive, metavar="X", help=source)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example stage2.batch=2048")
    args = parser.parse_intermixed_args(arguments)
    config = loader.load(args.config, [*args.overrides, *([] if args.size is None else [f"data.size={args.size}"])])
    rates, sources = dict[str, float](), list[Row]()
    for name, (default, source) in RATES.items():
        chosen = getattr(args, name.replace("-", "_"))
        rates[name] = chosen or (default(config) if callable(default) else default)
        sources.append({"rate": name, "value": rates[name], "source": "the command line" if chosen else source})
    result = {
        "rates": sources,
        "data": [data_row(config, images, args.epochs, rates) for images in args.images],
        "memory": [memory_row(config, gpus, rates) for gpus in args.gpus],
        "reading": [reading_row(config, gpus, rates) for gpus in args.gpus],
        "time": [time_row(images, gpus, args.epochs, rates) for images in args.images for gpus in args.gpus],
    }
    print(json.dumps(result, indent=1) if args.json else "\n".join(map(table, result.values())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
