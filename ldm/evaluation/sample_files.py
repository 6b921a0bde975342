"""Images of an evaluation that are kept: the best and worst, those close to training images, a grid of options."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from ldm.data.images import grid
from ldm.data.index import Index
from ldm.diffusion.parameterization import is_flow
from ldm.evaluation.generation import GenerationPlan, load_images
from ldm.evaluation.memorization import ClosePair
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.atomic_files import atomic_file

KEPT = 12  # of the best, and of the worst images


def to_images(images: torch.Tensor) -> list[Image.Image]:
    """Images `(N, 3, H, W)` uint8."""
    return [Image.fromarray(image.permute(1, 2, 0).contiguous().numpy()) for image in images]


def write_best_and_worst(
    folder: Path, images: torch.Tensor, prompts: Sequence[str], scores: torch.Tensor, groups: Sequence[str]
) -> None:
    """PNGs of the images `(N, 3, H, W)` uint8 with the highest and the lowest scores `(N,)`, and `samples.json`.

    It lists all images, the best first: `{"number", "prompt", "score", "group"}`, and `"file"` of those that are kept.
    Files of an earlier evaluation are removed.
    """
    order = scores.argsort(descending=True, stable=True).tolist()
    kept = set(order if len(order) <= 2 * KEPT else [*order[:KEPT], *order[-KEPT:]])
    folder.mkdir(exist_ok=True)
    for old in folder.glob("sample-*.png"):
        old.unlink()
    entries = []
    for i in order:
        entry = {"number": i, "prompt": prompts[i], "score": float(scores[i]), "group": groups[i]}
        if i in kept:
            entry["file"] = f"sample-{i:05d}.png"
            to_images(images[[i]])[0].save(folder / entry["file"])
        entries.append(entry)
    with atomic_file(folder / "samples.json") as tmp_path:
        tmp_path.write_text(json.dumps(entries, indent=1, ensure_ascii=False) + "\n", "utf-8")


def remove_stale(folder: Path, grid: bool, figures: bool) -> None:
    """Removes what earlier evaluations left of parts that this one does not have: the grid, or all but the grid."""
    stale = [] if grid else ["grid.png"]
    stale += [] if figures else ["memorization.png", "samples.json", "sample-*.png"]
    for pattern in stale:
        for path in folder.glob(pattern):
            path.unlink()


def write_closest_pairs(path: Path, pairs: Sequence[ClosePair], images: torch.Tensor, training: Index) -> None:
    """A sheet of generated images, of `(N, 3, H, W)` uint8, each above the training image nearest to it."""
    side = images.shape[-1]
    generated = to_images(images[[pair.generated for pair in pairs]])
    nearest = to_images(load_images(training, [pair.training for pair in pairs], side))
    captions = [f"generated, ratio {pair.ratio:.2f}" for pair in pairs]
    captions += [f"training: {training[pair.training].key}" for pair in pairs]
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as tmp_path:
        grid([*generated, *nearest], captions, columns=len(pairs)).save(tmp_path, "PNG")


def write_grid(path: Path, plan: GenerationPlan, model: LatentDiffusion) -> None:
    """The plan's first image with other guidance, a row each, and other numbers of steps."""
    steps = plan.options.num_inference_steps or model.steps
    most = 1000 if is_flow(model.scheduler.config) else int(model.scheduler.config.num_train_timesteps)
    guidance = plan.options.guidance_scale
    scale = float(model.guidance if guidance is None or isinstance(guidance, Sequence) else guidance)
    scales = sorted({1.0, max(1.0, scale / 2), scale, 2 * scale}) if plan.described else [scale]
    numbers = sorted({min(most, max(1, steps * factor // 4)) for factor in (1, 2, 4, 8)})
    cells, captions = [], []
    for guided in scales:
        for number in numbers:
            options = replace(plan.options, guidance_scale=guided, num_inference_steps=number)
            cells += to_images(replace(plan, options=options).draw(model, range(1)))
            captions.append(f"guidance {guided:g}, {number} steps" if plan.described else f"{number} steps")
    path.parent.mkdir(exist_ok=True)
    with atomic_file(path) as tmp_path:
        grid(cells, captions, columns=len(numbers)).save(tmp_path, "PNG")
