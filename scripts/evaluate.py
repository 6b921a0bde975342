"""How well a run's pictures follow their prompts, held-out combinations and training captions apart.

    python scripts/evaluate.py runs/openmoji

    python scripts/evaluate.py runs/openmoji --solver ddim --steps 10
    python scripts/evaluate.py runs/openmoji --model runs/openmoji-few/pipeline-8

For each prompt one picture is generated and the nearest real picture of the whole set is found, by 16 × 16 pixels
and by latents; and the Fréchet distance between the pictures and the real ones of these prompts is measured, in
the autoencoder's latents. The run's own figures go to `evaluation.json` and into its card; those of another model,
or of other ways to draw, are only printed.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ldm.utils.openmp  # noqa: F401  # before torch

import numpy as np
import torch
from tqdm import tqdm

from ldm.config import loader
from ldm.config.schema import SOLVERS, SPACINGS, Config
from ldm.data import images, index
from ldm.data.crops import crop_resize
from ldm.data.index import Index
from ldm.evaluation.frechet import frechet_distance
from ldm.evaluation.prompt_following import by_pixels, following, nearest
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.training.model_card import write_card
from ldm.utils.errors import Parser, UserError, command


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--count", type=int, default=100, help="training captions to try")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    parser.add_argument("--model", help="another pipeline than the run's, one with fewer steps for example")
    parser.add_argument("--steps", type=int, help="default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="default: the run's sample.guidance")
    parser.add_argument("--solver", choices=SOLVERS, help="default: the model's own")
    parser.add_argument("--spacing", choices=SPACINGS, help="of the steps")
    parser.add_argument("--precision", choices=("auto", "no", "bf16", "fp16"), default="no", help="of the U-Net")
    parser.add_argument("--sheet", type=Path, help="some of the pictures in a row, .png")
    args = parser.parse_args(arguments)
    if args.count < 2:
        raise UserError(f"--count: {args.count}; give 2 or more")
    how = Sampling(args.steps, args.guidance, args.solver, args.spacing)
    settings = _settings(args.run)
    records = index.build(settings.data, settings.cache_dir, settings.stage2.conditions)
    if not len(records):
        raise UserError(f"{settings.data.name}: no picture is left to compare with")
    model = LatentDiffusion.load(args.model or args.run / "pipeline").optimize_for_inference(args.precision)
    own = not args.model and how == Sampling()
    steps, guidance = how.steps or model.steps, model.guidance if how.guidance is None else how.guidance
    figures: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": args.seed}

    square = (settings.data.size, settings.data.size)
    real = torch.stack([images.to_tensor(crop_resize(records.load_image(i), square)[0]) for i in range(len(records))])
    features = {"pixels": by_pixels, "latents": lambda x: _latents(model, x)}
    known = {by: of(real) for by, of in features.items()}
    pictures: dict[int, torch.Tensor] = {}  # by the number of the real one that its prompt describes
    groups = {name: wanted for name, wanted in _groups(records, args.count).items() if wanted}
    for name, wanted in groups.items():
        prompts = [records[i].captions[0] for i in wanted]
        made = _generate(model, prompts, args.seed, how)
        pictures |= zip(wanted, made, strict=True)
        figures[name] = {}
        for by, of in features.items():
            found = nearest(of(made), known[by])
            another = np.roll(wanted, len(wanted) // 2).tolist()  # chance: held against another one's prompt
            figures[name] |= {
                by: following(found, wanted, records),
                f"{by}, prompts shuffled": following(found, another, records),
            }
        for by, scores in figures[name].items():
            shown = "  ".join(f"{key} {value:.2f}" for key, value in scores.items())
            print(f"{name:22} {by:25} {shown}", flush=True)
        if own:
            _sheet(args.run / f"{name.replace(' ', '-')}.png", pictures, wanted, records, 10)
    distance = frechet_distance(model.autoencoder, real[list(pictures)], torch.stack(list(pictures.values())))
    figures["Fréchet distance of latents"] = distance
    print(f"{len(pictures)} pictures and the real ones of their prompts: Fréchet distance of latents {distance:.2f}")
    if args.sheet:
        some = [i for wanted in groups.values() for i in wanted[:: -(-len(wanted) // 6)]]
        _sheet(args.sheet, pictures, some, records, len(some))
    if own:
        (args.run / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
        write_card(settings, figures)


def _settings(run: Path) -> Config:
    """The configuration of a finished run that is told prompts."""
    settings = loader.load_run(run)
    if settings.stage2.conditions != ("text",):
        told = ", ".join(settings.stage2.conditions) or "nothing"
        raise UserError(
            f"{run}: its model is told {told}, and this measures how prompts are followed; "
            f"python -m stage2_diffusion.likelihood {run} measures any"
        )
    return settings


def _groups(records: Index, count: int) -> dict[str, list[int]]:
    """Numbers of the pictures whose captions are tried."""
    splits = records.column("split").tolist()
    train = [i for i, split in enumerate(splits) if split == "train"]
    return {
        "training captions": [train[i] for i in np.random.default_rng(0).permutation(len(train))[:count]],
        "held-out combinations": [i for i, split in enumerate(splits) if split == "combination"],
    }


def _sheet(path: Path, pictures: dict[int, torch.Tensor], shown: list[int], records: Index, columns: int) -> None:
    captions = [records[i].captions[0] for i in shown]
    images.grid(images.to_pil(torch.stack([pictures[i] for i in shown])), captions, columns=columns).save(path)


def _generate(model: LatentDiffusion, prompts: list[str], seed: int, how: Sampling) -> torch.Tensor:
    parts = []
    for start in tqdm(range(0, len(prompts), 32), desc="sampling", unit=" batch", leave=False):
        part = prompts[start : start + 32]
        seeds = range(seed + start, seed + start + len(part))
        parts.append(model.autoencoder.decode(model.latents(part, seeds, how)).cpu())
    return torch.cat(parts)


def _latents(model: LatentDiffusion, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.autoencoder.encode(part).cpu() for part in pictures.clamp(-1, 1).split(64)]).flatten(1)


if __name__ == "__main__":
    sys.exit(main())
