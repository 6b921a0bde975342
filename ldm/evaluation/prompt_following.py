"""Does the picture follow the prompt? Each generated picture is matched with the nearest real one of the whole set."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F

from ldm.data.index import Index
from ldm.data.openmoji import TONES
from ldm.data.records import Record


def by_pixels(pictures: torch.Tensor) -> torch.Tensor:
    """`(N, 3, H, W)` → `(N, 768)`: average-pooled to 16 × 16."""
    return F.adaptive_avg_pool2d(pictures.clamp(-1, 1), 16).flatten(1)


def nearest(generated: torch.Tensor, real: torch.Tensor, k: int = 5) -> torch.Tensor:
    """Indices `(N, k)` of the nearest real pictures, nearest first; Euclidean, features `(N, D)` and `(M, D)`."""
    return torch.cdist(generated, real).topk(min(k, len(real)), largest=False).indices


def following(found: torch.Tensor, wanted: Sequence[int], records: Sequence[Record] | Index) -> dict[str, float]:
    """Shares, in [0, 1], of generated pictures whose nearest real ones, `found` `(N, k)`, are what was asked for.

    `wanted[i]` is the index in `records` of the picture that prompt i describes. top1, top5: it is the nearest, among
    the k nearest. For people also role, role with the tone exact, and role with the tone exact or adjacent.
    """
    target = torch.as_tensor(wanted)
    hits = found.cpu() == target[:, None]
    scores = {"top1": float(hits[:, 0].float().mean()), "top5": float(hits.any(1).float().mean())}
    pairs = ((records[int(f)].attributes, records[w].attributes) for f, w in zip(found[:, 0], wanted, strict=True))
    people = [(got, want) for got, want in pairs if want.get("role")]
    if people:
        role = torch.tensor([got.get("role") == want["role"] for got, want in people])
        apart = torch.tensor([_tones_apart(got, want) for got, want in people])
        for name, right in (
            ("role", role),
            ("role+tone", role & (apart == 0)),
            ("role+tone near", role & (apart <= 1)),
        ):
            scores[name] = float(right.float().mean())
    return scores


def _tones_apart(got: Mapping[str, str], want: Mapping[str, str]) -> int:
    if got.get("tone") not in TONES or want["tone"] not in TONES:
        return 0 if got.get("tone") == want["tone"] else len(TONES)
    return abs(TONES.index(got["tone"]) - TONES.index(want["tone"]))
