"""How well a run's pictures follow their prompts, held-out combinations and training captions apart.

    python scripts/evaluate.py runs/openmoji

For each prompt one picture is generated and the nearest real picture of the whole set is found, by 16 × 16 pixels
and by latents. The figures go to `evaluation.json` and into the run's card.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tqdm import tqdm

from ldm import config
from ldm.data import images, index
from ldm.errors import Parser, UserError, command
from ldm.folder import write_card
from ldm.metrics.following import by_pixels, following, nearest
from ldm.options import Sampling
from ldm.pipeline import LatentDiffusion


@command
def main(arguments: Sequence[str] | None = None) -> None:
    parser = Parser(prog="evaluate.py", description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, help="the folder of a finished run")
    parser.add_argument("--count", type=int, default=100, help="training captions to try")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture")
    parser.add_argument("--steps", type=int, help="default: the run's sample.steps")
    parser.add_argument("--guidance", type=float, help="default: the run's sample.guidance")
    given = parser.parse_args(arguments)
    for name, value, least in (
        ("--count", given.count, 2), ("--steps", given.steps, 1), ("--guidance", given.guidance, 1),
    ):  # fmt: skip
        if value is not None and value < least:
            raise UserError(f"{name}: {value}; give {least} or more")
    if not (given.run / "pipeline").is_dir():
        raise UserError(f"{given.run}: no finished run (it has no pipeline); run train_ldm.py first")
    tree = yaml.safe_load((given.run / "config.yaml").read_text("utf-8"))["configuration"]
    settings = config.parse(tree, str(given.run / "config.yaml"))
    if settings.stage2.conditions != ("text",):
        told = ", ".join(settings.stage2.conditions) or "nothing"
        raise UserError(
            f"{given.run}: its model is told {told}, and this measures how prompts are followed; "
            f"python -m stage2_diffusion.evaluate {given.run} measures any"
        )
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": given.run})})
    records = index.build(settings)
    if not len(records):
        raise UserError(f"{settings.data.name}: no picture is left to compare with")
    model = LatentDiffusion.load(given.run / "pipeline")
    steps = settings.sample.steps if given.steps is None else given.steps
    guidance = settings.sample.guidance if given.guidance is None else given.guidance

    square = (settings.data.size, settings.data.size)
    real = torch.stack([images.to_tensor(images.cut(records.picture(i), square)[0]) for i in range(len(records))])
    splits = records.column("split").tolist()
    train = [i for i, split in enumerate(splits) if split == "train"]
    groups = {
        "training captions": [train[i] for i in np.random.default_rng(0).permutation(len(train))[: given.count]],
        "held-out combinations": [i for i, split in enumerate(splits) if split == "combination"],
    }
    features = {"pixels": by_pixels, "latents": lambda x: _latents(model, x)}
    known = {by: of(real) for by, of in features.items()}
    figures: dict[str, Any] = {"steps": steps, "guidance": guidance, "seed": given.seed}
    for name, wanted in groups.items():
        if wanted:
            prompts = [records[i].captions[0] for i in wanted]
            made = _generate(model, prompts, given.seed, steps, guidance)
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
            sheet = images.grid(images.to_pil(made), prompts, columns=10)
            sheet.save(given.run / f"{name.replace(' ', '-')}.png")
    (given.run / "evaluation.json").write_text(json.dumps(figures, indent=2) + "\n")
    write_card(settings, figures)


def _generate(model: LatentDiffusion, prompts: list[str], seed: int, steps: int, guidance: float) -> torch.Tensor:
    parts = []
    for start in tqdm(range(0, len(prompts), 32), desc="sampling", unit=" batch", leave=False):
        part = prompts[start : start + 32]
        seeds = range(seed + start, seed + start + len(part))
        parts.append(model.autoencoder.decode(model.latents(part, seeds, Sampling(steps, guidance))).cpu())
    return torch.cat(parts)


def _latents(model: LatentDiffusion, pictures: torch.Tensor) -> torch.Tensor:
    return torch.cat([model.autoencoder.encode(part).cpu() for part in pictures.clamp(-1, 1).split(64)]).flatten(1)


if __name__ == "__main__":
    sys.exit(main())
