"""Does an image follow its prompt? Each generated image is compared with the nearest real images of the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from ldm.data import images
from ldm.data.crops import crop_resize
from ldm.data.index import Index
from ldm.data.openmoji import TONES
from ldm.data.records import Record
from ldm.evaluation.generation import BAR_DELAY
from ldm.models.finite import check_output
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import OVERFLOW, LatentDiffusion

SAMPLING_BATCH = 32


def prompt_groups(records: Index, count: int) -> dict[str, list[int]]:
    """Indices of the images whose captions are the prompts."""
    splits = records.column("split").tolist()
    train = [i for i, split in enumerate(splits) if split == "train"]
    return {
        "training captions": [train[i] for i in np.random.default_rng(0).permutation(len(train))[:count]],
        "held-out combinations": [i for i, split in enumerate(splits) if split == "combination"],
    }


def real_images(records: Index, numbers: Sequence[int], side: int) -> torch.Tensor:
    """Images `(N, 3, side, side)` in [-1, 1], centre cropped."""
    return torch.stack([images.to_tensor(crop_resize(records.load_image(i), (side, side))[0]) for i in numbers])


def generate(model: LatentDiffusion, prompts: list[str], seed: int, options: Sampling) -> torch.Tensor:
    """Images `(N, 3, H, W)` in [-1, 1], the i-th from the noise of `seed + i`."""
    parts = []
    starts = range(0, len(prompts), SAMPLING_BATCH)
    for start in tqdm(starts, desc="sampling", unit=" batch", delay=BAR_DELAY, leave=False):
        part = prompts[start : start + SAMPLING_BATCH]
        latents = model.latents(part, range(seed + start, seed + start + len(part)), options)
        check_output(latents, "U-Net", model.unet, OVERFLOW[model.unet.dtype == torch.float16])
        parts.append(model.autoencoder.decode(latents).cpu())
    return torch.cat(parts)


def pixel_features(images: torch.Tensor) -> torch.Tensor:
    """`(N, 3, H, W)` → `(N, 768)`: average-pooled to 16 × 16."""
    return F.adaptive_avg_pool2d(images.clamp(-1, 1), 16).flatten(1)


def nearest_neighbors(generated: torch.Tensor, real: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Indices `(N, k)` of the nearest real images, nearest first; Euclidean, features `(N, D)` and `(M, D)`."""
    return torch.cdist(generated, real).topk(min(k, len(real)), largest=False).indices


def prompt_following(
    neighbors: torch.Tensor, targets: Sequence[int], records: Sequence[Record] | Index
) -> dict[str, float]:
    """Shares, in [0, 1], of generated images whose nearest real images, `neighbors` `(N, k)`, fit the prompt.

    `targets[i]` is the index in `records` of the image that prompt i describes. top1: the target is the nearest;
    top5: it is among the k nearest. Prompts for people also have role (the nearest image shows the same role),
    role+tone (and exactly the same tone), and role+tone near (and the same or an adjacent tone).
    """
    scores = prompt_scores(neighbors, targets, records)
    return {name: float(values.nanmean()) for name, values in scores.items()}


def prompt_scores(
    neighbors: torch.Tensor, targets: Sequence[int], records: Sequence[Record] | Index
) -> dict[str, torch.Tensor]:
    """The scores of `prompt_following` of each image, `(N,)`: 1 or 0, and NaN for people's where it shows none."""
    hits = neighbors.cpu() == torch.as_tensor(targets)[:, None]
    scores = {"top1": hits[:, 0].float(), "top5": hits.any(1).float()}
    pairs = [(records[int(i)].attributes, records[t].attributes) for i, t in zip(neighbors[:, 0], targets, strict=True)]
    people = torch.tensor([bool(target.get("role")) for _, target in pairs])
    if people.any():
        same_role = torch.tensor([nearest.get("role") == target.get("role") for nearest, target in pairs])
        distance = torch.tensor(
            [_tone_distance(nearest, target) if target.get("role") else 0 for nearest, target in pairs]
        )
        named = {
            "role": same_role,
            "role+tone": same_role & (distance == 0),
            "role+tone near": same_role & (distance <= 1),
        }
        scores |= {name: right.float().masked_fill(~people, torch.nan) for name, right in named.items()}
    return scores


def _tone_distance(neighbor: Mapping[str, str], target: Mapping[str, str]) -> int:
    """Steps between two skin tones; where either is none of the five: 0 if they are equal, else more than any."""
    if neighbor.get("tone") not in TONES or target["tone"] not in TONES:
        return 0 if neighbor.get("tone") == target["tone"] else len(TONES)
    return abs(TONES.index(neighbor["tone"]) - TONES.index(target["tone"]))
