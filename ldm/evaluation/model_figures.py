"""Figures of a model's images: against real ones, with what real images reach themselves, and against another model."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from ldm.config.rules import FIGURES, FIGURES_OF_NETWORKS
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.evaluation import distances, retrieval
from ldm.evaluation.features import FeatureNetwork, Features
from ldm.evaluation.figures import Figure
from ldm.evaluation.generation import MAX_REAL_IMAGES, GenerationPlan, in_batches, real_features
from ldm.evaluation.networks import prompt_features, reads_text
from ldm.sampling.pipeline import LatentDiffusion

ENOUGH_HELD_OUT = 100  # images: fewer would make the ceiling a matter of chance


@dataclass(frozen=True)
class RealImages:
    """The real images of a run that generated ones are compared with, at the size of its model."""

    data: Index
    side: int
    """In pixels."""
    cache_dir: Path
    """Keeps their features."""

    @property
    def training(self) -> Index:
        """Those that figures are measured against."""
        return self.data.select("train").subset(MAX_REAL_IMAGES)

    @property
    def held_out(self) -> Index:
        """Those that were not trained on."""
        return self.data.select(*HELD_OUT).subset(MAX_REAL_IMAGES)

    @property
    def held_out_at_random(self) -> Index:
        """Those of them that chance chose, not their captions."""
        return self.data.select("reconstruction").subset(MAX_REAL_IMAGES)

    def features(self, images: Index, network: FeatureNetwork) -> Features:
        """Those of some images, taken from the training and held-out images' where they are among them."""
        known = np.concatenate([self.training.rows, self.held_out.rows])
        order = known.argsort()
        position = order[np.searchsorted(known[order], images.rows).clip(max=len(known) - 1)]
        if not np.array_equal(known[position], images.rows):
            return self._computed(images, network)
        parts = [self._computed(part, network) for part in (self.training, self.held_out) if len(part)]
        return Features.cat(parts)[torch.from_numpy(position)]

    def _computed(self, images: Index, network: FeatureNetwork) -> Features:
        features = real_features(images, self.side, network, self.cache_dir)
        assert features is not None, "a command is a single process"
        return features

    def fingerprint(self, network: FeatureNetwork) -> str:
        """Of the network and the training images: figures with the same one are comparable."""
        return sha256(f"{network.fingerprint} {self.training.fingerprint()} {self.side}".encode()).hexdigest()

    def ceiling(self, count: int) -> tuple[Index, Index]:
        """Two sets of real images, whose figures a perfect model would have: held-out images, and training images.

        Without enough images that were held out at random they are every other training image. The first has at most
        `count`.
        """
        training, held_out = self.training, self.data.select("reconstruction")
        if len(held_out) >= ENOUGH_HELD_OUT:
            return held_out.subset(count), training
        halves = [Index(self.data.table, self.data.sources, self.data.data, training.rows[i::2]) for i in (0, 1)]
        return halves[0].subset(count), halves[1]


def draw_images(plan: GenerationPlan, model: LatentDiffusion, what: str = "drawing images") -> torch.Tensor:
    """The plan's images, `(N, 3, H, W)` uint8, in a file that vanishes with the tensor: they may be gigabytes."""
    shape = (plan.count, 3, model.side, model.side)
    with tempfile.TemporaryFile() as file:  # which the mapping keeps
        images = torch.from_numpy(np.memmap(file, np.uint8, "w+", shape=shape))

    def draw(numbers: range) -> None:
        images[numbers.start : numbers.stop] = plan.draw(model, numbers)

    in_batches(plan.count, plan.batch, draw, what)
    return images


def usual_metrics(network: str, text: bool) -> list[str]:
    """What is measured where no metric is named: all that the network's features give, but for costly doubles."""
    able = [metric for metric in FIGURES if network in FIGURES_OF_NETWORKS.get(metric, (network,))]
    return [metric for metric in able if metric not in ("sfid", *(() if text else ("clip_score",)))]


def measure(
    metrics: Sequence[str],
    real: Features,
    generated: Features,
    network: FeatureNetwork,
    prompts: Sequence[str] | None,
    bootstrap: int = distances.resampling.SPLITS,
) -> dict[str, Figure]:
    """Figures by metric, of generated images and the prompts that they have."""
    text = prompt_features(network, prompts) if "clip_score" in metrics else None
    return distances.measure(metrics, real, generated, text=text, bootstrap=bootstrap, network=network.label)


@dataclass(frozen=True)
class PromptFollowing:
    """How well images fit their prompts."""

    ranks: retrieval.Retrieval
    shuffled: retrieval.Retrieval | None
    """The same of each image and another one's prompt: the floor; None where all have one prompt."""
    real: retrieval.Retrieval | None
    """The same of the real images that the prompts describe: the ceiling; None where they are what is ranked."""
    scores: torch.Tensor
    """`(N,)`: the cosine of each image and its prompt, or the real image that its prompt describes."""

    def figures(self, network: FeatureNetwork) -> dict[str, dict[str, Any]]:
        """For `evaluation.json`."""
        parts = {"": self.ranks, ", prompts shuffled": self.shuffled, ", real images": self.real}
        figures = {f"{network.name}{key}": ranks.figures(network.label) for key, ranks in parts.items() if ranks}
        return {key: {name: figure.to_json() for name, figure in part.items()} for key, part in figures.items()}


def prompt_following(
    plan: GenerationPlan, generated: Features, real: RealImages, network: FeatureNetwork
) -> PromptFollowing:
    """Ranks each image's prompt among all, where the network reads text; else the described image among real ones."""
    assert plan.prompts and plan.described, "a model of text"
    described, n = plan.described, plan.count
    first = [captions[0] for captions in described.captions()]
    seen = real.features(described, network).pooled
    own = torch.arange(n) % len(described)
    if reads_text(network):
        prompts = list(plan.prompts)
        captions = list(dict.fromkeys([*prompts, *first]))
        text = prompt_features(network, captions)
        number = {caption: i for i, caption in enumerate(captions)}
        target = text[[number[prompt] for prompt in prompts]]

        def ranked(images: torch.Tensor, texts: Sequence[str]) -> retrieval.Retrieval:
            return retrieval.by_text(images, texts, text, captions)

        ceiling = ranked(seen, first)
    else:
        prompts, target, ceiling = [first[int(i)] for i in own], seen[own], None

        def ranked(images: torch.Tensor, texts: Sequence[str]) -> retrieval.Retrieval:
            return retrieval.by_images(images, texts, seen, first)

    distinct = min(n, len(described))  # the prompts come again after so many
    shuffled = [prompts[(int(i) + distinct // 2) % distinct] for i in own]
    floor = ranked(generated.pooled, shuffled) if len(set(prompts)) > 1 else None
    scores = F.cosine_similarity(generated.pooled.double(), target.double(), dim=1)
    return PromptFollowing(ranked(generated.pooled, prompts), floor, ceiling, scores)
