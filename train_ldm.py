"""Trains a latent diffusion model: an autoencoder, then a text-conditioned U-Net in its latents.

    accelerate launch train_ldm.py --config configs/openmoji.yaml [stage2.lr=1e-3 …]

One process or many, and plain `python train_ldm.py …`. The same command again continues where it stopped.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import ldm.utils.openmp  # noqa: F401  # before torch

import torch
from accelerate import PartialState

from ldm.config import loader
from ldm.config.schema import Config
from ldm.data import check, dataset, index, sources
from ldm.data.index import Index
from ldm.data.stream import Stream
from ldm.distributed.launch import join, on_main, training_processes
from ldm.models import autoencoder, text_encoder
from ldm.models.text_encoder import TextEncoder
from ldm.training import checks, memory_estimate, preflight
from ldm.training.fingerprint import check_finished
from ldm.training.model_card import write_card
from ldm.training.run_dir import prepare_run_dir
from ldm.utils.errors import Parser, UserError, command
from stage1_vae.train import train as train_autoencoder
from stage2_diffusion.train import train as train_unet


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="train_ldm.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("--stage", choices=("1", "2"), help="only this stage; default: both")
    parser.add_argument(
        "--dry-run", action="store_true", help="say what would be trained, and what it would take, and train nothing"
    )
    parser.add_argument("--fresh", action="store_true", help="leave a used run folder alone and start beside it")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example stage2.lr=1e-3")
    args = parser.parse_intermixed_args(arguments)

    settings = loader.load(args.config, args.overrides)
    with training_processes(settings.run) as state:
        if args.dry_run:
            dry_run(settings, args.stage)
        else:
            train(settings, state, args.stage, args.fresh)


def train(settings: Config, state: PartialState, stage: str | None, fresh: bool) -> None:
    """Trains what is still to be trained of one stage, `1` or `2`, or of both."""
    encoder = checks.check(settings, state.num_processes)  # what stage two needs, before stage one takes its hours
    settings = prepare_run_dir(settings, fresh)
    folder = settings.run.dir
    pipeline, stages = folder / "pipeline", left(settings, stage)
    if "stage1" in stages and stage == "2":
        raise UserError(f"--stage 2: no autoencoder in {folder}; run --stage 1 first, or set stage1.pretrained")
    pictures = seen(settings, encoder)
    if not pipeline.exists():
        on_main(lambda: checks.check_on_images(settings, next(dataset.iter_images(pictures, 2)), state.device))
    if stages and state.is_main_process:
        print(checks.describe(settings, state.num_processes), flush=True)
    for each in stages if settings.run.preflight else ():
        measure(settings, each, pictures, encoder)

    if "stage1" in stages:
        train_autoencoder(settings, pictures)
    if stage != "1":
        if "stage2" in stages:
            train_unet(settings, pictures, autoencoder.load(made(settings)), encoder)
        else:
            check_finished(folder / "stage2", {"data": pictures.select("train").fingerprint()})
        if state.is_main_process and not (folder / "README.md").exists():
            write_card(settings)
    if state.is_main_process:
        print(f"finished: {pipeline if stage != '1' else made(settings)}")


def left(settings: Config, stage: str | None) -> list[str]:
    """The stages that are still to be trained, of the one that was asked for or of both."""
    one = not settings.stage1.needs_none and not (settings.run.dir / "autoencoder").exists()
    two = stage != "1" and not (settings.run.dir / "pipeline").exists()
    return ["stage1"] * one + ["stage2"] * two


def made(settings: Config) -> str | Path:
    """The autoencoder whose latents stage two is trained in."""
    one = settings.stage1
    return one.pretrained or ("identity" if one.needs_none else settings.run.dir / "autoencoder")


def seen(settings: Config, encoder: TextEncoder | None) -> Index | Stream:
    """The pictures, which have been looked at."""
    data, folder, conditions = settings.data, settings.run.dir, settings.stage2.conditions
    pictures: Index | Stream
    if data.streaming:
        pictures = Stream(data, settings.cache_dir, folder / "data-report.jsonl", conditions)
    else:
        pictures = index.build(data, settings.cache_dir, conditions)
    batches = (settings.stage1.batch, settings.stage2.batch)
    check.before_training(pictures, folder, encoder, settings.text.model, batches)
    return pictures


def dry_run(settings: Config, only: str | None) -> None:
    """Says what would be trained, and measures it where data and text encoder are here; makes no run's folder."""
    state = join(settings.run)
    if state.is_main_process:
        print(checks.describe(settings, state.num_processes), flush=True)
        if settings.run.device != "cpu" and "stage2" in left(settings, only):
            print(memory_estimate.estimate_memory(settings, state.num_processes), flush=True)
    try:  # what may not be here yet
        sources.check(settings.data.source, settings.data.streaming, settings.stage2.conditions)
        if settings.stage2.text:
            text_encoder.of(settings.text)
    except UserError as error:
        if state.is_main_process:
            print(f"not measured: {error}")
        return
    encoder = checks.check(settings, state.num_processes)
    stages = left(settings, only)
    beside = on_main(lambda: Path(tempfile.mkdtemp(prefix="ldm-dry-run-")))
    try:
        if not settings.run.dir.exists():
            settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": beside})})
        pictures = seen(settings, encoder)
        for stage in stages:
            measure(settings, stage, pictures, encoder)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(beside, ignore_errors=True)


def measure(settings: Config, stage: str, pictures: Index | Stream, encoder: TextEncoder | None) -> None:
    """Says what a stage takes: two of its steps are tried, with a random autoencoder where none is trained yet."""

    def train(settings: Config, pictures: Index | Stream) -> None:
        if stage == "stage1":
            return train_autoencoder(settings, pictures)
        if given == "identity" or settings.stage1.pretrained or Path(given).exists():
            vae = autoencoder.load(given)
        else:
            vae = autoencoder.Autoencoder(autoencoder.build(settings.stage1, settings.data.size))
        trained = copy.deepcopy(encoder) if settings.text.train else encoder  # or it would have learned
        return train_unet(settings, pictures, vae, trained)

    given = made(settings)
    found = preflight.measure(settings, stage, pictures, train)
    if encoder:
        encoder.to(torch.device("cpu"))  # stage one, which may come first, needs the room
    if PartialState().is_main_process:
        print(found, flush=True)


if __name__ == "__main__":
    sys.exit(main())
