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
    hits = neighbors.cpu() == torch.as_tensor(targets)[:, None]
    scores = {"top1": float(hits[:, 0].float().mean()), "top5": float(hits.any(1).float().mean())}
    nearest = [records[int(i)].attributes for i in neighbors[:, 0]]
    described = [records[i].attributes for i in targets]
    people = [pair for pair in zip(nearest, described, strict=True) if pair[1].get("role")]
    if people:
        same_role = torch.tensor([neighbor.get("role") == target["role"] for neighbor, target in people])
        distance = torch.tensor([_tone_distance(neighbor, target) for neighbor, target in people])
        scores["role"] = float(same_role.float().mean())
        scores["role+tone"] = float((same_role & (distance == 0)).float().mean())
        scores["role+tone near"] = float((same_role & (distance <= 1)).float().mean())
    return scores


def _tone_distance(neighbor: Mapping[str, str], target: Mapping[str, str]) -> int:
    """Steps between two skin tones; where either is none of the five: 0 if they are equal, else more than any."""
    if neighbor.get("tone") not in TONES or target["tone"] not in TONES:
        return 0 if neighbor.get("tone") == target["tone"] else len(TONES)
    return abs(TONES.index(neighbor["tone"]) - TONES.index(target["tone"]))
