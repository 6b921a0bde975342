"""Does the picture follow the prompt? Each generated picture is matched with the nearest real one of the whole set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ldm.data.openmoji import TONES
from ldm.data.sources import Record


def by_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """`(N, 3, H, W)` → `(N, 768)`: average-pooled to 16 × 16."""
    return F.adaptive_avg_pool2d(pictures.clamp(-1, 1), 16).flatten(1)


def nearest(generated: torch.Tensor, real: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Indices `(N, k)` of the nearest real pictures, nearest first; Euclidean, features `(N, D)` and `(M, D)`."""
    return torch.cdist(generated, real).topk(k, largest=False).indices


def following(
    generated: torch.Tensor,
    wanted: Sequence[int],
    records: Sequence[Record],
    real: torch.Tensor,
    features: Callable[[torch.Tensor], torch.Tensor],
) -> dict[str, float]:
    """Shares, in [0, 1], of generated pictures `(N, 3, H, W)` whose nearest real ones are what was asked for.

    `wanted[i]` is the index, in `records` and `real`, of the picture that prompt i describes. top1, top5: it is the
    nearest, among the five nearest. For people also role, tone (exact), and role with the tone right or adjacent.
    `shuffled`: top1 where each picture is held against another one's prompt, which is what chance gives.
    """
    found = nearest(features(generated), features(real)).cpu().numpy()
    target = np.asarray(wanted)
    shuffled = np.roll(target, len(target) // 2)
    scores = {
        "top1": float((found[:, 0] == target).mean()),
        "top5": float((found == target[:, None]).any(1).mean()),
        "shuffled": float((found[:, 0] == shuffled).mean()),
    }
    people = [(records[f].attributes, records[w].attributes) for f, w in zip(found[:, 0], wanted, strict=True)]
    people = [(got, want) for got, want in people if want.get("role")]
    if people:
        role = np.array([got.get("role") == want["role"] for got, want in people])
        tone = np.array([got.get("tone") == want["tone"] for got, want in people])
        near = np.array([_tones_apart(got, want) <= 1 for got, want in people])
        scores |= {
            "role": float(role.mean()),
            "tone": float((role & tone).mean()),
            "role_tone_near": float((role & near).mean()),
        }
    return scores


def _tones_apart(got: Any, want: Any) -> int:
    if got.get("tone") not in TONES or want["tone"] not in TONES:
        return 0 if got.get("tone") == want["tone"] else len(TONES)
    return abs(TONES.index(got["tone"]) - TONES.index(want["tone"]))
