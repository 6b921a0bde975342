"""Does an image follow its prompt? Each generated image is compared with the nearest real images of the data set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from ldm.data.index import Index
from ldm.data.openmoji import TONES
from ldm.data.records import Record


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
