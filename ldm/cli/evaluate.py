"""How well a run's images follow their prompts, or how well a super-resolution model's run enlarges images.

    ldm-evaluate runs/openmoji

    ldm-evaluate runs/openmoji --solver ddim --steps 10
    ldm-evaluate runs/openmoji --model runs/openmoji-few/pipeline-8
    ldm-evaluate runs/openmoji --lora runs/lora-openmoji/lora --concept openmoji-thumbs

For each prompt, one image is generated and compared with the nearest real image of the data set, by 16 × 16 pixels and
by latents. The Fréchet distance between the generated images and the real images of these prompts is measured in the
autoencoder's latents.

A super-resolution model enlarges the held-out images, which were shrunk for it; bicubic enlarging is the comparison.

A concept that a fine-tune of the run learned is measured with the run's own prompts, which shows what was forgotten.

The run's own figures go to `evaluation.json` and into its model card; those of another model or of other sampling
options are only printed.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ldm.cli.sampling_arguments import add_embedding_argument, add_lora_argument, errors_name_flags, sampling_options
from ldm.config import loader
from ldm.config.schema import SOLVERS, SPACINGS, Config, DataConfig
from ldm.data import images, index
from ldm.data.crops import crop_resize
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.evaluation.enlarging import compare_enlarging
from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.prompt_following import nearest_neighbors, pixel_features, prompt_following
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.model_card import write_card
from ldm.utils.errors import Parser, UserError, command
from ldm.utils.paths import path_or_id

SAMPLING_BATCH, ENCODING_BATCH = 32, 64

Features = dict[str, Callable[[torch.Tensor], torch.Tensor]]
"""By name: images `(N, 3, H, W)` → features `(N, D)`."""


@command
@errors_name_flags()
def main(arguments: Sequence[str] | None = None) -> None:
    args = _parse(arguments)
    options = Sampling(**sampling_options(args))
    settings = _run_settings(args.run)
    records = index.build(settings.data, settings.cache_dir, settings.stage2.conditions).select("train", *HELD_OUT)
    if not len(records):
        raise UserError(f"{settings.data.name}: no image is left to compare with")
    model = LatentDiffusion.load(args.model or args.run / "pipeline").add_loras(*args.lora)
    model.add_embeddings(*args.embedding)
    model.optimize_for_inference(args.precision)
    enlarges = "upscale" in settings.stage2.conditions
    if (model.task == "upscale") != enlarges or model.task == "inpaint":
        does = {"generate": "makes images from text", "inpaint": "completes images", "upscale": "enlarges images"}
        what = "a super-resolution model" if enlarges else "a text-to-image model"
        raise UserError(f"--model: {args.model} {does[model.task]}; {args.run} measures {what}")
    if not enlarges and args.noise_level != Sampling.noise_level:
        raise UserError("--noise-level: this model enlarges no image; leave it out")
    if enlarges and args.concept:
        raise UserError("--concept: of a text-to-image model; this one enlarges images, leave it out")
    concept = _concept(args.concept, settings) if args.concept else None
    is_default = not (args.model or args.lora or args.embedding or concept) and options == Sampling()
    metrics: dict[str, Any] = {
        "steps": options.num_inference_steps or model.steps,
        "guidance": model.guidance if options.guidance_scale is None else options.guidance_scale,
        "seed": args.seed,
    }
    side = settings.data.size
    if enlarges:
        metrics |= _evaluate_enlarging(args, model, records, side, options, is_default)
    else:
        metrics |= _evaluate_prompts(args, model, records, concept, side, options, is_default)
    if is_default:
        (args.run / "evaluation.json").write_text(json.dumps(metrics, indent=2) + "\n")
        write_card(settings, metrics)


def _evaluate_prompts(
    args: argparse.Namespace,
    model: LatentDiffusion,
    records: Index,
    concept: Index | None,
    side: int,
    options: Sampling,
    is_default: bool,
) -> dict[str, Any]:
    """How well images follow their prompts; prints it, and returns it for the run's card.

    So do prompts of a `concept`, which are compared with its images too.
    """
    metrics: dict[str, Any] = {}
    real = _real_images(records, range(len(records)), side)
    features: Features = {"pixels": pixel_features, "latents": lambda x: _latent_features(model, x)}
    real_features = {name: extract(real) for name, extract in features.items()}
    generated: dict[int, torch.Tensor] = {}  # by the index of the real image that the prompt describes
    groups = {name: targets for name, targets in _prompt_groups(records, args.count).items() if targets}
    for name, targets in groups.items():
        prompts = [records[i].captions[0] for i in targets]
        samples = _generate(model, prompts, args.seed, options)
        generated |= zip(targets, samples, strict=True)
        metrics[name] = _score(samples, targets, records, features, real_features)
        for measure, scores in metrics[name].items():
            text = "  ".join(f"{key} {value:.2f}" for key, value in scores.items())
            print(f"{name:22} {measure:25} {text}", flush=True)
        if is_default:
            _save_sheet(args.run / f"{name.replace(' ', '-')}.png", generated, targets, records, 10)
    if concept:
        metrics["concept"] = _score_concept(args, model, concept, side, options, features, real_features)
    distance = frechet_distance(model.autoencoder, real[list(generated)], torch.stack(list(generated.values())))
    metrics["Fréchet distance of latents"] = distance
    count = len(generated)
    print(f"{count} images and the real ones of their prompts: Fréchet distance of latents {distance:.2f}")
    if args.sheet:
        shown = [i for targets in groups.values() for i in targets[:: -(-len(targets) // 6)]]
        _save_sheet(args.sheet, generated, shown, records, len(shown))
    return metrics


def _score_concept(
    args: argparse.Namespace,
    model: LatentDiffusion,
    concept: Index,
    side: int,
    options: Sampling,
    features: Features,
    real_features: dict[str, torch.Tensor],
) -> dict[str, dict[str, float]]:
    """Shares of images of the concept's prompts whose nearest real image, of all, is one of the concept's, or its own.

    A caption comes as often as the others, each time with another noise.
    """
    real = _real_images(concept, range(len(concept)), side)
    targets = [i % len(concept) for i in range(args.count)]
    samples = _generate(model, [concept[i].captions[0] for i in targets], args.seed, options)
    scores = {}
    for name, extract in features.items():
        known = len(real_features[name])
        nearest = nearest_neighbors(extract(samples), torch.cat([real_features[name], extract(real)]), 1)[:, 0]
        exact = nearest == known + torch.tensor(targets)
        scores[name] = {"concept": float((nearest >= known).float().mean()), "top1": float(exact.float().mean())}
        text = "  ".join(f"{key} {value:.2f}" for key, value in scores[name].items())
        print(f"{'concept':22} {name:25} {text}", flush=True)
    if args.sheet:
        path = args.sheet.with_name(f"{args.sheet.stem}-concept{args.sheet.suffix}")
        shown = {i: samples[i] for i in range(min(12, len(samples)))}
        captions = [concept[targets[i]].captions[0] for i in shown]
        images.grid(images.to_pil(torch.stack(list(shown.values()))), captions, columns=6).save(path)
    return scores


def _evaluate_enlarging(
    args: argparse.Namespace, model: LatentDiffusion, records: Index, side: int, options: Sampling, is_default: bool
) -> dict[str, Any]:
    """How well a super-resolution model enlarges the held-out images, or training images where there are none."""
    splits = records.column("split").tolist()
    held_out = [i for i, split in enumerate(splits) if split != "train"]
    if len(held_out) < 2:  # a distance between sets of images needs two
        held_out = []
    numbers = (held_out or [*range(len(records))])[: args.count]
    if len(numbers) < 2:
        raise UserError(f"{args.run}: its data have a single image; enlarging is measured on two or more")
    real, captions = _real_images(records, numbers, side), [records[i].captions[0] for i in numbers]
    metrics, enlarged = compare_enlarging(model, real, captions, args.seed, options)
    print(
        f"{len(numbers)} {'held-out' if held_out else 'training'} images, shrunk to {side // model.upscale_factor} px"
    )
    for name, scores in metrics.items():
        print(f"{name:10} " + "  ".join(f"{key} {value:.4g}" for key, value in scores.items()), flush=True)
    sheet = args.sheet or (args.run / "enlarged.png" if is_default else None)
    if sheet:
        few = slice(0, len(numbers), -(-len(numbers) // 8))
        squares = F.interpolate(enlarged["small"], (side, side))  # each pixel as a square
        large = {**enlarged, "small": squares, "real": real}
        rows = [(name, image) for name, batch in large.items() for image in batch[few]]
        shown = images.to_pil(torch.stack([image for _, image in rows]))
        images.grid(shown, [name for name, _ in rows], columns=len(real[few])).save(sheet)
    return metrics


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument(
        "--count", type=int, default=100, help="training captions to try, or images to enlarge; default: 100"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first image")
    parser.add_argument("--model", type=path_or_id, help="another pipeline than the run's, for example a distilled one")
    add_lora_argument(parser)
    add_embedding_argument(parser)
    concept = "what a fine-tune of the run learned, as data.source has it, such as openmoji-thumbs; measured too"
    parser.add_argument("--concept", type=path_or_id, metavar="SOURCE", help=concept)
    parser.add_argument("--steps", type=int, help="default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="default: the run's sample.guidance")
    parser.add_argument("--solver", choices=SOLVERS, help="default: the model's own")
    parser.add_argument("--spacing", choices=SPACINGS, help="of the steps")
    noise_level = "on what a super-resolution model enlarges, 0 to 349; default: 20"
    parser.add_argument("--noise-level", type=int, default=Sampling.noise_level, help=noise_level)
    parser.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="no", help="of the U-Net")
    parser.add_argument("--sheet", type=Path, help="some of the images, .png")
    args = parser.parse_args(arguments)
    if args.count < 2:
        raise UserError(f"--count: {args.count}; give 2 or more")
    return args


def _run_settings(run: Path) -> Config:
    """The configuration of a finished run; UserError if its model has other conditions than text, or enlarging."""
    settings = loader.load_run(run)
    if settings.stage2.conditions not in (("text",), ("text", "upscale")):
        conditions = ", ".join(settings.stage2.conditions) or "no conditions"
        raise UserError(
            f"{run}: its model has {conditions}, and this measures prompt following or enlarging; "
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


def _real_images(records: Index, numbers: Sequence[int], side: int) -> torch.Tensor:
    """Images `(N, 3, side, side)` in [-1, 1], centre cropped."""
    return torch.stack([images.to_tensor(crop_resize(records.load_image(i), (side, side))[0]) for i in numbers])


def _prompt_groups(records: Index, count: int) -> dict[str, list[int]]:
    """Indices of the images whose captions are the prompts."""
    splits = records.column("split").tolist()
    train = [i for i, split in enumerate(splits) if split == "train"]
    return {
        "training captions": [train[i] for i in np.random.default_rng(0).permutation(len(train))[:count]],
        "held-out combinations": [i for i, split in enumerate(splits) if split == "combination"],
    }


def _score(
    samples: torch.Tensor,
    targets: list[int],
    records: Index,
    features: Features,
    real_features: dict[str, torch.Tensor],
) -> dict[str, dict[str, float]]:
    """Prompt-following scores by each kind of features, and chance: scores against other samples' prompts."""
    shuffled = np.roll(targets, len(targets) // 2).tolist()
    scores = {}
    for name, extract in features.items():
        neighbors = nearest_neighbors(extract(samples), real_features[name])
        scores[name] = prompt_following(neighbors, targets, records)
        scores[f"{name}, prompts shuffled"] = prompt_following(neighbors, shuffled, records)
    return scores


def _save_sheet(path: Path, generated: dict[int, torch.Tensor], shown: list[int], records: Index, columns: int) -> None:
    captions = [records[i].captions[0] for i in shown]
    images.grid(images.to_pil(torch.stack([generated[i] for i in shown])), captions, columns=columns).save(path)


def _generate(model: LatentDiffusion, prompts: list[str], seed: int, options: Sampling) -> torch.Tensor:
    """Images `(N, 3, H, W)` in [-1, 1], the i-th from the noise of `seed + i`."""
    parts = []
    for start in tqdm(range(0, len(prompts), SAMPLING_BATCH), desc="sampling", unit=" batch", leave=False):
        part = prompts[start : start + SAMPLING_BATCH]
        seeds = range(seed + start, seed + start + len(part))
        parts.append(model.autoencoder.decode(model.latents(part, seeds, options)).cpu())
    return torch.cat(parts)


def _latent_features(model: LatentDiffusion, x: torch.Tensor) -> torch.Tensor:
    """Images `(N, 3, H, W)` → flattened latents `(N, C·h·w)`."""
    parts = x.clamp(-1, 1).split(ENCODING_BATCH)
    return torch.cat([model.autoencoder.encode(part).cpu() for part in parts]).flatten(1)
