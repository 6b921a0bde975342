"""Trains a GAN, a VAE and a latent diffusion model on the same images at equal compute, and compares their samples.

    python scripts/compare_families.py --out runs/families
    python scripts/compare_families.py --out runs/mine --source ~/pictures --size 64 --seconds 600

Each family trains on one half of the images for `--seconds` of processor time (the latent diffusion model's autoencoder
included), once per seed. Its samples are compared with the other half. Short trainings are timed first to find how many
steps fit into that time; `families.json` has their number, and `--steps` repeats exactly these. CPU only.

`OUT/families.md` and `families.json` have the figures, `families.png` samples; `OUT/ldm-seed0` is a run like any other.
The same command continues: what is trained stays.
"""

from __future__ import annotations

import json
import shutil
import sys
import tempfile
import time
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

import torch
from families_models import FAMILIES, Family, Images, Steps
from families_report import Reference, conclusions, equal_compute, markdown, sample_sheet
from safetensors.torch import load_file, save_file

from ldm.config import loader
from ldm.config.schema import DataConfig
from ldm.data import index
from ldm.data.dataset import iter_images
from ldm.data.images import to_pil
from ldm.data.index_report import stop_reason, write_report
from ldm.evaluation.features import FeatureNetwork
from ldm.models import feature_networks
from ldm.training.run_dir import make_dir
from ldm.utils.atomic_files import atomic_file, atomic_folder, tensors_sha256
from ldm.utils.errors import Parser, UserError, training_command
from ldm.utils.rng import generator

SIZES = (16, 32, 64, 128)
LEAST = 16  # images of each half
COMPARED = 1000  # of each half, at most
BOUNDED = 128  # held-out images of the likelihood bound, at most
DRAWN_AT_ONCE = 50
WARM_UP, TIMED = 4, 24  # steps of the runs that time a step
REHEARSAL = 5  # the estimate is checked by a training of a fifth of its steps
ANOTHER = "give another folder"
SAMPLES, FIGURES = "samples.safetensors", "figures.json"


@training_command
def main(arguments: Sequence[str] | None = None) -> None:
    args = parse(arguments)
    compare(args, lambda: feature_networks.load(args.network, "cpu", args.weights))


def compare(args: Namespace, load_network: Callable[[], FeatureNetwork]) -> None:
    """Trains, measures and reports what `args.out` does not have yet."""
    make_dir("--out", args.out)
    record = read_record(args)
    with redirect_stdout(sys.stderr):  # stdout is for the result
        training, held_out = prepare_images(args, record)
    network = load_network()  # before hours of training
    for name in args.families:
        if missing := [part for part in FAMILIES[name].parts if part not in record["steps"]]:
            fitting = steps_within(args.seconds, FAMILIES[name], training)
            record["steps"] |= {part: fitting[part] for part in missing}
            write_json(args.out / "families.json", record)

    reference: Reference | None = None

    def measured(file: Path, figures: Callable[[Reference], dict[str, float]]) -> dict[str, float]:
        """What `file` has of this network's figures; they are computed only once."""
        nonlocal reference
        known: dict[str, Any] = json.loads(file.read_text("utf-8")) if file.exists() else {}
        if network.fingerprint not in known.get("metrics", {}):
            reference = reference or Reference(network, *(to_bytes(x[:COMPARED]) for x in (training.pixels, held_out)))
            known["metrics"] = known.get("metrics", {}) | {network.fingerprint: figures(reference)}
            write_json(file, known)
        return {**known.get("training", {}), **known["metrics"][network.fingerprint]}

    real = measured(args.out / "real.json", Reference.of_real)
    runs: dict[str, list[dict[str, float]]] = {}
    for seed in range(args.seeds):
        for name in args.families:
            folder = args.out / f"{name}-seed{seed}"
            train_and_draw(FAMILIES[name], training, held_out, record["steps"], seed, folder)
            samples = load_file(folder / SAMPLES)["images"]
            runs.setdefault(name, []).append(measured(folder / FIGURES, lambda r, x=samples: r.figures(x)))  # type: ignore[misc]

    by_label = {FAMILIES[name].label: of_seeds for name, of_seeds in runs.items()}
    sentences = conclusions(by_label, real)
    compute = equal_compute(by_label)
    record |= {"network": network.label, "compared": min(COMPARED, len(held_out)), "real": real, "families": runs}
    record |= {"compute": compute, "verdicts": sentences}
    write_json(args.out / "families.json", record)
    note = f"{record['compared']} samples against as many held-out images, {network.label}; mean ± deviation of seeds"
    text = "\n".join(
        [markdown(by_label, real), "", f"{note}. {compute}.", "", *(f"- {sentence}." for sentence in sentences)]
    )
    (args.out / "families.md").write_text(text + "\n", "utf-8")
    rows = {"real, held out": held_out}
    for name in runs:
        rows[FAMILIES[name].label] = load_file(args.out / f"{name}-seed0" / SAMPLES)["images"].float() / 127.5 - 1
    with atomic_file(args.out / "families.png") as tmp_path:
        sample_sheet(rows).save(tmp_path, "PNG")
    print(json.dumps(record) if args.json else f"{text}\n\n{args.out / 'families.png'}")


def parse(arguments: Sequence[str] | None) -> Namespace:
    parser = Parser(prog="compare_families.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="a folder, which is made; the same one continues")
    parser.add_argument("--source", default="openmoji-demo", help="images, as data.source; default: openmoji-demo")
    parser.add_argument("--size", type=int, default=32, help="pixels along a side: 16, 32, 64 or 128")
    parser.add_argument("--seconds", type=float, default=180.0, help="of processor time, for each training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each family")
    parser.add_argument("--families", nargs="+", choices=tuple(FAMILIES), default=list(FAMILIES))
    parser.add_argument("--steps", nargs="+", type=part_steps, default=[], metavar="PART=N", help="instead of timing")
    parser.add_argument("--network", default="efficientnet-lite0", help="what compares images")
    parser.add_argument("--weights", type=Path, help="its weights, if not the published ones")
    parser.add_argument("--json", action="store_true", help="print families.json instead of the table")
    args = parser.parse_args(arguments)
    if args.size not in SIZES:
        raise UserError(f"--size: {args.size}; give {', '.join(map(str, SIZES[:-1]))} or {SIZES[-1]}")
    for key, least in (("seconds", 1), ("seeds", 1)):
        if getattr(args, key) < least:
            raise UserError(f"--{key}: {getattr(args, key):g}; give {least} or more")
    args.steps, args.families = dict(args.steps), list(dict.fromkeys(args.families))
    return args


def part_steps(text: str) -> tuple[str, int]:
    """`gan=900` as a pair."""
    parts = [part for family in FAMILIES.values() for part in family.parts]
    part, _, number = text.partition("=")
    if part not in parts or not number.isdecimal() or not int(number):
        raise ArgumentTypeError(f"{text!r}; give PART=N with a part of {', '.join(parts)} and at least 1 step")
    return part, int(number)


def read_record(args: Namespace) -> dict[str, Any]:
    """What `families.json` has, with this call's settings and steps; UserError if it belongs to others."""
    file = args.out / "families.json"
    settings = {"source": args.source, "size": args.size, "seconds": args.seconds}
    old = json.loads(file.read_text("utf-8")) if file.exists() else {"settings": settings, "steps": {}}
    for key, value in settings.items():
        if old["settings"][key] != value:
            raise UserError(f"--out: {args.out} was made with {key} {old['settings'][key]}, not {value}; {ANOTHER}")
    for part, number in args.steps.items():
        if old["steps"].get(part, number) != number:
            raise UserError(f"--steps: {args.out} has {part}={old['steps'][part]}, not {number}; give another --out")
    return old | {"steps": old["steps"] | args.steps}


def prepare_images(args: Namespace, record: dict[str, Any]) -> tuple[Images, torch.Tensor]:
    """Two random halves of the source: images to train on, also as files, and held-out ones `(N, 3, S, S)`.

    `families.json` is written before the files, so that no other call can take them for its own. UserError if the
    source no longer has the images that it records.
    """
    data = loader.section(DataConfig, [f"source={json.dumps(args.source)}", f"size={args.size}"], "--source")
    entries = index.build(data, args.out / "cache", ())
    report = args.out / "data-report.json"
    write_report(entries, report)
    if problem := stop_reason(entries, report):
        raise UserError(problem)
    if len(entries) < 2 * LEAST:
        reason = f"one half is trained on, the other compared with; give {2 * LEAST} or more"
        raise UserError(f"--source: {args.source} has {len(entries)} images; {reason}")
    pixels = torch.cat(list(iter_images(entries)))
    pixels = pixels[generator(0, "halves", 0).permutation(len(pixels))]
    training, held_out = pixels.tensor_split(2)
    print(f"{len(training)} images to train on, {len(held_out)} held out, {args.size} px", file=sys.stderr, flush=True)
    digest = tensors_sha256({"images": training})
    if record["settings"].setdefault("images", digest) != digest:
        raise UserError(f"--out: {args.out} was made with other images of {args.source}; {ANOTHER}")
    write_json(args.out / "families.json", record)
    folder = args.out / "images"
    if not folder.exists():
        with atomic_folder(folder) as tmp_path:
            for i, image in enumerate(to_pil(training)):
                image.save(tmp_path / f"{i:06d}.png")
    return Images(training, folder), held_out


def steps_within(seconds: float, family: Family, images: Images) -> dict[str, int]:
    """The steps of each part that take `seconds` of processor time together, with all that a training does besides."""
    print(f"{family.label}: timing the first steps", file=sys.stderr, flush=True)

    def cost(steps: Steps) -> float:
        with tempfile.TemporaryDirectory() as folder:
            return cpu_seconds(lambda: family.train(images, steps, 0, Path(folder) / "run"))

    few = dict.fromkeys(family.parts, WARM_UP)
    cost(few)  # the first one imports and allocates
    fixed = cost(few)
    per_step = {part: max(1e-6, cost(few | {part: TIMED}) - fixed) / (TIMED - WARM_UP) for part in family.parts}
    more = {part: max(0.0, share * (seconds - fixed) / per_step[part]) for part, share in family.parts.items()}

    # A few steps tell little of thousands: caches, logs and the second epoch are not in them.
    rehearsed = {part: max(TIMED, int(n / REHEARSAL)) for part, n in more.items()}
    expected = sum(per_step[part] * n for part, n in rehearsed.items())
    scale = expected / max(1e-6, cost({part: WARM_UP + n for part, n in rehearsed.items()}) - fixed)
    return {part: WARM_UP + int(scale * n) for part, n in more.items()}


def train_and_draw(
    family: Family, training: Images, held_out: torch.Tensor, steps: Mapping[str, int], seed: int, folder: Path
) -> None:
    """Fills a run's folder with samples and figures, unless it has them."""
    own_steps = {part: steps[part] for part in family.parts}
    if (folder / FIGURES).exists():
        if (known := json.loads((folder / FIGURES).read_text("utf-8"))["steps"]) != own_steps:
            raise UserError(f"{folder}: was trained for {known} steps, not {own_steps}; give another --out")
        return
    print(f"{family.label}, seed {seed}: {own_steps}", file=sys.stderr, flush=True)
    shutil.rmtree(folder, ignore_errors=True)  # what was not finished is trained again: its time would be unknown
    folder.mkdir(parents=True)
    trained = None

    def train() -> None:
        nonlocal trained
        trained = family.train(training, own_steps, seed, folder)

    figures = {"train_seconds": cpu_seconds(train)}
    assert trained
    number = min(COMPARED, len(held_out))
    parts: list[torch.Tensor] = []

    def draw() -> None:
        for start in range(0, number, DRAWN_AT_ONCE):
            images = trained.draw(range(start, min(start + DRAWN_AT_ONCE, number)))
            if not bool(images.isfinite().all()):
                remedy = "give another --out and fewer --seconds, or leave it out of --families"
                raise UserError(f"{family.label}, seed {seed}: its training diverged, it draws NaN or Inf; {remedy}")
            parts.append(to_bytes(images))

    figures |= {"parameters": trained.parameters / 1e6, "draw_seconds": cpu_seconds(draw) / number}
    if trained.bits:
        figures["bits"] = trained.bits(*held_out[:BOUNDED].tensor_split(2))
    with atomic_file(folder / SAMPLES) as tmp_path:
        save_file({"images": torch.cat(parts)}, tmp_path)
    write_json(folder / FIGURES, {"steps": own_steps, "training": figures})  # last: with it the run is finished


def cpu_seconds(action: Callable[[], Any]) -> float:
    """Processor time of this process, all threads together: what else the machine does hardly counts."""
    start = time.process_time()
    with redirect_stdout(sys.stderr):  # a training prints what it does
        action()
    return time.process_time() - start


def to_bytes(images: torch.Tensor) -> torch.Tensor:
    """`(N, 3, S, S)` in [-1, 1] → uint8."""
    return (images.clamp(-1, 1) * 127.5 + 127.5).round().byte()


def write_json(file: Path, values: Mapping[str, Any]) -> None:
    with atomic_file(file) as tmp_path:
        tmp_path.write_text(json.dumps(values, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    sys.exit(main())
