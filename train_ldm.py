"""Trains a latent diffusion model: an autoencoder, then a text-conditioned U-Net in its latents.

    accelerate launch train_ldm.py --config configs/openmoji.yaml [stage2.steps=2000 …]

Plain `python train_ldm.py …` works too, and `ldm-train …` from any folder. The same command again resumes the run.
"""

from __future__ import annotations

import copy
import shutil
import sys
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import ldm.utils.openmp  # noqa: F401  # before torch

# What imports torch or diffusers, which takes seconds, is imported in functions: help and mistakes need none of it.
from ldm.config import loader
from ldm.config.schema import Config
from ldm.utils.errors import Parser, UserError, disable_progress_bars, training_command

if TYPE_CHECKING:
    from accelerate import PartialState

    from ldm.data.index import Index
    from ldm.data.stream import Stream
    from ldm.models.autoencoder import Autoencoder
    from ldm.models.text_encoder import AnyTextEncoder


@training_command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--config", required=True, type=Path, help="a YAML file, for example configs/openmoji.yaml")
    parser.add_argument("--stage", choices=("1", "2"), help="only this stage; default: both")
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would be trained and its cost; train nothing"
    )
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", help="choose the steps of both stages so that all ends in time"
    )
    parser.add_argument("--fresh", action="store_true", help="start in a new folder where run.dir is used")
    parser.add_argument("--yes", action="store_true", help="train where one folder's name captions all images")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="for example stage2.steps=2000")
    args = parser.parse_intermixed_args(arguments)

    if args.budget is not None:
        if not 0 < args.budget < float("inf"):
            raise UserError(f"--budget: {args.budget:g} minutes; give a number above 0")
        if clash := [flag for flag in ("stage", "fresh", "dry_run") if getattr(args, flag)]:
            raise UserError(f"--budget: is for both stages of one run; leave out --{clash[0].replace('_', '-')}")
    settings = loader.load(args.config, args.overrides)
    steps = [text for text in args.overrides if text.startswith(("stage1.steps=", "stage2.steps="))]
    if args.budget is not None and settings.budget.points and steps:
        raise UserError(f"--budget: chooses the steps; leave out {steps[0]}")
    from ldm.distributed.launch import training_processes

    with training_processes(settings.run) as state:
        if args.dry_run:
            dry_run(settings, args.stage, args.yes)
        else:
            train(settings, state, args.stage, args.fresh, args.yes, args.budget)


def train(
    settings: Config,
    state: PartialState,
    stage: str | None,
    fresh: bool,
    confirmed: bool,
    minutes: float | None = None,
) -> None:
    """Trains the unfinished stages: of `stage`, which is `1` or `2`, or of both, in `minutes` if they are given.

    A caption that all images share is guessed from a folder's name only where that is `confirmed`.
    """
    from ldm.data import dataset
    from ldm.distributed.launch import on_main
    from ldm.evaluation.report import write_report
    from ldm.training import budget, checks, plan, planned_steps
    from ldm.training.fingerprint import check_finished
    from ldm.training.model_card import write_card
    from ldm.training.run_dir import prepare_run_dir
    from stage1_vae.train import train as train_autoencoder
    from stage2_diffusion.finetune import prior

    disable_progress_bars()
    prior.check(settings)
    encoder = checks.check(settings, state.num_processes)  # finds stage two's mistakes before stage one takes hours
    if not confirmed:
        checks.check_captions(settings)
    planned_now = minutes is not None and not on_main((settings.run.dir / budget.FILE).exists)
    if minutes is not None:
        stages = unfinished_stages(settings, None)
        measured, loaded = partial(measure, settings, encoder), partial(load_data, settings, encoder)
        settings = planned_steps.plan_steps(settings, minutes, stages, loaded, measured)
    settings = prepare_run_dir(settings, fresh)
    folder = settings.run.dir
    result, stages = folder / settings.finetune.deliverable, unfinished_stages(settings, stage)
    if "stage1" in stages and stage == "2":
        raise UserError(f"--stage 2: no autoencoder in {folder}; run --stage 1 first, or set stage1.pretrained")
    with_classes = prior.with_class_images(settings, encoder) if "stage2" in stages else settings  # may draw them
    data = load_data(with_classes, encoder)
    if "stage2" in stages:
        prior.check_found(settings, data)
    if not on_main(result.exists):
        on_main(lambda: checks.check_on_images(settings, next(dataset.iter_images(data, 2)), state.device))
    if stages and state.is_main_process:
        print(plan.describe(settings, state.num_processes), flush=True)
    for name in stages if settings.run.preflight else ():
        report = measure(settings, encoder, name, data)
        if state.is_main_process:
            print(report, flush=True)

    if "stage1" in stages:
        begun = budget.seconds_since_start()
        train_autoencoder(settings, data)
        if planned_now and "stage2" in stages:
            settings = prepare_run_dir(planned_steps.adjust_steps(settings, begun))
    if stage != "1":
        if "stage2" in stages:
            settings = train_stage2(settings, data, encoder, planned_now)
        else:
            on_main(partial(check_finished, folder / "stage2", {"data": data.select("train").fingerprint()}))
        if state.is_main_process and ("stage2" in stages or not (folder / "README.md").exists()):
            write_card(settings)
            write_report(folder)
    if state.is_main_process:
        print(f"finished: {result if stage != '1' else autoencoder_path(settings)}")


def train_stage2(settings: Config, data: Index | Stream, encoder: AnyTextEncoder | None, planned_now: bool) -> Config:
    """Trains stage two, with the steps of a plan that was made now or before; returns the steps that it had."""
    from ldm.training import budget, planned_steps
    from ldm.training.run_dir import prepare_run_dir
    from stage2_diffusion.train import train

    begun = budget.seconds_since_start()
    while True:
        pause = planned_steps.pause_after(settings) if planned_now else 0  # of another process, its time isn't known
        try:
            train(settings, data, load_autoencoder(settings), encoder, pause)
            return settings
        except budget.Paused:
            pass  # and its traceback, which holds all weights, is gone
        settings = prepare_run_dir(planned_steps.adjust_rest(settings, begun))


def unfinished_stages(settings: Config, stage: str | None) -> list[str]:
    """`stage1`, `stage2`, both or neither. Stage two needs stage one, so `stage` 2 does not exclude it."""
    from ldm.distributed.launch import on_main

    stages = []
    if not settings.stage1.needs_none and not on_main((settings.run.dir / "autoencoder").exists):
        stages.append("stage1")
    if stage != "1" and not on_main((settings.run.dir / settings.finetune.deliverable).exists):
        stages.append("stage2")
    return stages


def autoencoder_path(settings: Config) -> str | Path:
    """The autoencoder in whose latents stage two trains."""
    stage = settings.stage1
    return stage.pretrained or ("identity" if stage.needs_none else settings.run.dir / "autoencoder")


def load_autoencoder(settings: Config) -> Autoencoder:
    """It, loaded by every process, once it sees the folder, which the main process may just have written."""
    from ldm.distributed.consensus import wait_until_visible
    from ldm.models import autoencoder

    path = autoencoder_path(settings)
    if path == settings.run.dir / "autoencoder":
        wait_until_visible([settings.run.dir / "autoencoder"], Path.is_dir, "run.dir")
    return autoencoder.load(path)


def load_data(settings: Config, encoder: AnyTextEncoder | None) -> Index | Stream:
    """The data set, after the checks that need all its samples."""
    from ldm.data import check, index
    from ldm.data.stream import Stream
    from stage2_diffusion.evaluation import check_real_images
    from stage2_diffusion.finetune.prior import warn_of_shared_captions

    folder, conditions = settings.run.dir, settings.stage2.conditions
    data: Index | Stream
    if settings.data.streaming:
        data = Stream(settings.data, settings.cache_dir, folder / "data-report.jsonl", conditions)
    else:
        data = index.build(settings.data, settings.cache_dir, conditions)
    batches = (settings.stage1.batch, settings.stage2.batch)
    warn_of_shared_captions(data)
    check.before_training(data, folder, encoder, settings.text.model, batches)
    check_real_images(settings, data)
    return data


def dry_run(settings: Config, stage: str | None, confirmed: bool) -> None:
    """Prints what would be trained; measures it if data and text encoder are available. Creates no run folder.

    A guessed caption is reported where it is not `confirmed`.
    """
    from ldm.data import source_kinds
    from ldm.distributed.launch import join, on_main
    from ldm.distributed.sharding import sharding_kind
    from ldm.models import text_encoder
    from ldm.training import checks, memory_estimate, plan, preflight
    from stage2_diffusion.finetune import prior

    disable_progress_bars()
    state = join(settings.run)
    stages = unfinished_stages(settings, stage)
    if state.is_main_process:
        print(plan.describe(settings, state.num_processes), flush=True)
        if settings.run.device != "cpu" and "stage2" in stages:
            sharded = sharding_kind() == "fsdp"
            print(memory_estimate.estimate_memory(settings, state.num_processes, sharded), flush=True)
    try:  # a dry run may come before data and text encoder are downloaded
        source_kinds.check(settings.data.source, settings.data.streaming, settings.stage2.conditions)
        if settings.stage2.text:
            text_encoder.of(settings.text)
    except UserError as error:
        if state.is_main_process:
            print(f"not measured: {error}")
        return
    prior.check(settings)
    encoder = checks.check(settings, state.num_processes)
    tmp_path = on_main(lambda: Path(tempfile.mkdtemp(prefix="ldm-dry-run-")))
    try:
        if not on_main(settings.run.dir.exists):
            settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": tmp_path})})
        if not confirmed:
            try:
                checks.check_captions(settings)
            except UserError as error:
                if state.is_main_process:
                    print(f"training would stop: {error}")
        undrawn = prior.count_undrawn(settings, encoder) if "stage2" in stages else 0
        draws_none = "stage2" in stages and not undrawn
        data = load_data(prior.with_class_images(settings, encoder) if draws_none else settings, encoder)
        for name in stages:
            report = measure(settings, encoder, name, data)
            if state.is_main_process:
                print(report, flush=True)
        if state.is_main_process and (total := preflight.describe_total(settings, stages)):
            print(total, flush=True)
        if undrawn and state.is_main_process:
            print(prior.describe_drawing(settings, undrawn), flush=True)
        state.wait_for_everyone()
    finally:
        if state.is_main_process:
            shutil.rmtree(tmp_path, ignore_errors=True)


def measure(
    settings: Config,
    encoder: AnyTextEncoder | None,
    stage: str,
    data: Index | Stream,
    steps: int = 2,
    anew: bool = False,
) -> str:
    """A line on the cost of `stage1` or `stage2`, from some steps; an untrained autoencoder has random weights."""
    import torch

    from ldm.distributed.launch import on_main
    from ldm.models import autoencoder
    from ldm.training import preflight
    from stage1_vae.train import train as train_autoencoder
    from stage2_diffusion.train import train as train_unet

    def train(settings: Config, data: Index | Stream) -> None:
        if stage == "stage1":
            return train_autoencoder(settings, data)
        if path == "identity" or settings.stage1.pretrained or on_main(Path(path).exists):
            vae = load_autoencoder(settings)
        else:
            vae = autoencoder.Autoencoder(autoencoder.build(settings.stage1, settings.data.size))
        text = copy.deepcopy(encoder) if settings.trains_text_encoder else encoder  # by the two steps
        return train_unet(settings, data, vae, text)

    path = autoencoder_path(settings)
    report = preflight.measure(settings, stage, data, train, steps, anew)
    if encoder:
        encoder.to(torch.device("cpu"))  # stage one, which may come first, needs its memory
    return report


if __name__ == "__main__":
    sys.exit(main())
