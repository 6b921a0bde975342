"""How well a run's super-resolution model enlarges images; bicubic enlarging is the comparison."""

from __future__ import annotations

import argparse
from typing import Any

import torch
import torch.nn.functional as F

from ldm.data import images
from ldm.data.index import Index
from ldm.evaluation.enlarging import compare_enlarging
from ldm.evaluation.prompt_following import real_images
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError


def evaluate_enlarging(
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
    real, captions = real_images(records, numbers, side), [records[i].captions[0] for i in numbers]
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
