"""Prompt following for any captioned images: is an image's own caption the one that it fits best?

By CLIP, the captions are ranked by how well they fit the image. Where there is no network for text, the real images are
ranked by how near they are, and those with the prompt's caption are the right ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ldm.evaluation import bootstrap
from ldm.evaluation.figures import Figure
from ldm.utils.errors import UserError

TOP = (1, 5)
ROWS = 1024  # images ranked at once


@dataclass(frozen=True)
class Retrieval:
    """Where each image's own caption comes among all."""

    ranks: torch.Tensor
    """`(N,)` int64, 1 the best; a tie counts as worse."""
    right: torch.Tensor
    """`(N,)`: how many of the candidates are right."""
    candidates: int
    captions: torch.Tensor
    """`(N,)` int64: numbers of the images' own captions."""

    def scores(self, k: int = 1) -> torch.Tensor:
        """`(N,)`: 1 where the right one is among the best k, else 0; for a mean's interval, or to compare two runs."""
        return (self.ranks <= k).double()

    def chance(self, k: int = 1) -> float:
        """The expected score of images that do not depend on their prompts."""
        wrong = [
            math.comb(self.candidates - n, k) / math.comb(self.candidates, min(k, self.candidates))
            for n in self.right.tolist()
        ]
        return 1 - sum(wrong) / len(wrong)

    def figures(self, network: str | None = None) -> dict[str, Figure]:
        """`R@1` and `R@5`: the share of images whose caption is the best, or among the best five.

        Where captions come again, the intervals are of as many captions.
        """
        return {f"R@{k}": bootstrap.mean(self.scores(k), network, self.captions.tolist()) for k in TOP}


def by_text(images: torch.Tensor, prompts: Sequence[str], text: torch.Tensor, captions: Sequence[str]) -> Retrieval:
    """Ranks captions by the cosine of their features `text` `(M, D)` and an image's, `images` `(N, D)`, of one network.

    `prompts` are the N images' own captions, each of which is among the M `captions`; equal captions count once.
    UserError otherwise.
    """
    first = {caption: i for i, caption in reversed([*enumerate(captions)])}
    kept = list(first.values())
    labels = {captions[i]: n for n, i in enumerate(kept)}
    targets = _targets(prompts, labels)
    similarity = F.normalize(images.double(), dim=1), F.normalize(text[kept].double(), dim=1)
    return _rank(*similarity, targets, torch.arange(len(kept)))


def by_images(images: torch.Tensor, prompts: Sequence[str], real: torch.Tensor, captions: Sequence[str]) -> Retrieval:
    """Ranks real images, features `(M, D)`, by the distance to each of `images` `(N, D)`; those of the same caption are
    right.

    `prompts` are the N images' captions, each of which is among the M `captions` of the real ones. UserError otherwise.
    """
    labels = {caption: n for n, caption in enumerate(dict.fromkeys(captions))}
    return _rank(
        images.double(),
        real.double(),
        _targets(prompts, labels),
        torch.tensor([labels[caption] for caption in captions]),
    )


def _rank(images: torch.Tensor, candidates: torch.Tensor, targets: torch.Tensor, labels: torch.Tensor) -> Retrieval:
    """By Euclidean distance, which ranks vectors of length 1 as their cosine does."""
    if images.shape[1] != candidates.shape[1] or len(images) != len(targets) or len(candidates) != len(labels):
        shapes = f"{tuple(images.shape)} and {tuple(candidates.shape)}"
        raise UserError(f"retrieval: features {shapes} of {len(targets)} prompts; use one network, a caption each")
    if not bool(images.isfinite().all() and candidates.isfinite().all()):
        raise UserError("retrieval: features have NaN or Inf; the images or the network are broken")
    ranks, right = [], []
    for part, target in zip(images.split(ROWS), targets.split(ROWS), strict=True):
        is_right = target[:, None] == labels
        distances = torch.cdist(part, candidates)
        best = distances.masked_fill(~is_right, math.inf).amin(1, keepdim=True)
        ranks.append(1 + ((distances <= best) & ~is_right).sum(1))
        right.append(is_right.sum(1))
    return Retrieval(torch.cat(ranks), torch.cat(right), len(candidates), targets)


def _targets(prompts: Sequence[str], labels: dict[str, int]) -> torch.Tensor:
    if not prompts:
        raise UserError("retrieval: no prompt; give one or more")
    for prompt in prompts:
        if prompt not in labels:
            raise UserError(f"retrieval: the prompt {prompt!r} is none of the captions; rank captions that have it")
    return torch.tensor([labels[prompt] for prompt in prompts])
