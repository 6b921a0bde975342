"""Images of a model and of its data, and their features: drawn and computed in fixed batches.

Image i starts from the noise of `seed + i` and has prompt i of a list that follows from the data. Batches are cut by
index, so that neither the number of processes nor an interruption changes a bit of the images, the features or the
figures: what a run measures while it trains, `scripts/evaluate.py` measures again for the same weights.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from accelerate import PartialState
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from ldm.data.crops import crop_resize
from ldm.data.index import Index
from ldm.data.records import HELD_OUT
from ldm.distributed.consensus import gather_objects, on_all
from ldm.distributed.launch import on_main
from ldm.evaluation.features import FeatureNetwork, Features
from ldm.sampling.loop import Step
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.sampling.request import AS_SAVED, SamplingRequest
from ldm.utils.atomic_files import Tensors, atomic_file, tensors_sha256
from ldm.utils.errors import UserError, first_line

MAX_REAL_IMAGES = 10_000  # that generated ones are compared with; k-NN metrics need their distances to each other
REAL_BATCH = 32  # images whose features are computed at once
BAR_DELAY = 2.0  # seconds that something takes before its progress is shown

Result = TypeVar("Result")


@dataclass(frozen=True)
class GenerationPlan:
    """Which images are drawn: entry i is of image i."""

    count: int
    seed: int
    """Image i starts from the noise of `seed + i`."""
    batch: int
    """Images that are drawn at once; other sizes change the last bits."""
    options: Sampling = AS_SAVED
    prompts: tuple[str, ...] | None = None
    labels: tuple[str, ...] | None = None
    described: Index | None = None
    """The images whose captions and classes these are, in turn; None for an unconditional model."""

    @classmethod
    def of(
        cls,
        data: Index,
        conditions: Sequence[str],
        count: int,
        seed: int = 0,
        batch: int = 16,
        options: Sampling = AS_SAVED,
    ) -> GenerationPlan:
        """Prompts and classes of held-out images, then of training images, always the same ones of a data set.

        Where there are fewer images than `count` they come again, with other noise, and with their next caption if they
        have several. `conditions` are the model's: those without `text` and `class` need no image.
        """
        if not {"text", "class"} & set(conditions):
            return cls(count, seed, batch, options)
        held = data.select(*HELD_OUT).subset(count)
        train = data.select("train").subset(max(0, count - len(held)))
        described = Index(data.table, data.sources, data.data, np.concatenate([held.rows, train.rows]))
        if "class" in conditions:
            labelled = np.array([bool(label) for label in described.column("label")], bool)
            described = Index(data.table, data.sources, data.data, described.rows[labelled])
        if not len(described):
            raise UserError("data.source: no image whose caption or class could be a prompt")
        entries = list(described)
        captions = [entry.captions for entry in entries]
        turns = [divmod(i, len(entries)) for i in range(count)]
        return cls(
            count,
            seed,
            batch,
            options,
            tuple(captions[j][turn % len(captions[j])] for turn, j in turns) if "text" in conditions else None,
            tuple(entries[j].label for _, j in turns) if "class" in conditions else None,
            described,
        )

    def draw(
        self, model: LatentDiffusion, numbers: range, callback: Callable[[Step], None] | None = None
    ) -> torch.Tensor:
        """The images of these numbers, `(N, 3, H, W)` uint8: the values that a PNG of them has."""
        request = SamplingRequest(
            prompts=None if self.prompts is None else [self.prompts[i] for i in numbers],
            seed=[self.seed + i for i in numbers],
            labels=None if self.labels is None else [self.labels[i] for i in numbers],
            count=1 if self.prompts or self.labels else len(numbers),
            options=self.options,
        )
        return stack(model.generate(request, len(numbers), callback))


def stack(images: Sequence[Image.Image]) -> torch.Tensor:
    """RGB images of one size as `(N, 3, H, W)` uint8."""
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def in_batches(count: int, batch: int, compute: Callable[[range], Result], what: str) -> list[Result]:
    """`compute(numbers)` of each batch of `count` images, in order, on all processes.

    The processes take whole batches in turn. All call it equally often, with a batch again where there are no more: a
    process without work would block the others, which have a share of its weights. An error of one is raised on all.
    """
    state, starts, parts = PartialState(), range(0, count, batch), list[Result]()
    rounds = range(0, len(starts), state.num_processes)
    for first in tqdm(rounds, what, unit="batch", delay=BAR_DELAY, leave=False, disable=not state.is_main_process):
        start = starts[min(first + state.process_index, len(starts) - 1)]
        part = on_all(partial(compute, range(start, min(start + batch, count))))
        parts += gather_objects(part)[: len(starts) - first]
    return parts


def generated_features(
    plan: GenerationPlan,
    model: LatentDiffusion,
    network: FeatureNetwork,
    callback: Callable[[Step], None] | None = None,
) -> Features:
    """Features of the plan's images, on all processes, each of which draws whole batches."""

    def compute(numbers: range) -> Features:
        return network(plan.draw(model, numbers, callback))

    return Features.cat(in_batches(plan.count, plan.batch, compute, "drawing images"))


def features_of(images: torch.Tensor, network: FeatureNetwork, batch: int) -> Features:
    """Features of images `(N, 3, H, W)` uint8, computed in batches of so many."""
    parts = tqdm(images.split(batch), network.label, unit="batch", delay=BAR_DELAY, leave=False)
    return Features.cat(network(part) for part in parts)


# ------------------------------------------------------------------------------------------------------- real images


def load_images(images: Index, numbers: Sequence[int], side: int) -> torch.Tensor:
    """Real images `(N, 3, side, side)` uint8: centre cropped, resized to the model's size."""
    return stack([crop_resize(images.load_image(i), (side, side))[0] for i in numbers])


def real_features(images: Index, side: int, network: FeatureNetwork, cache_dir: Path) -> Features | None:
    """Features of real images of `side` pixels, on the main process; None on the others.

    They are computed once: a file in `cache_dir` keeps them, under a name that follows from the images' content, their
    size and the network's weights. A damaged one is named and computed again.
    """
    contents = {
        "images": images.fingerprint(),
        "count": len(images),
        "side": side,
        "background": images.data.background,
        "network": network.fingerprint,
    }
    name = hashlib.sha256(json.dumps(contents, sort_keys=True).encode()).hexdigest()[:16]
    path = cache_dir / "features" / f"{network.name}-{name}.safetensors"
    is_main = PartialState().is_main_process
    cached = read_features(path, contents) if is_main else None
    if on_main(lambda: cached is not None):
        return cached

    def compute(numbers: range) -> Features:
        return network(load_images(images, numbers, side))

    features = Features.cat(in_batches(len(images), REAL_BATCH, compute, "features of real images"))
    on_main(lambda: write_features(path, contents, features))
    return features if is_main else None


def write_features(path: Path, contents: dict[str, object], features: Features) -> None:
    """Writes features, complete or not at all, with their `contents` and a checksum."""
    tensors = _tensors(features)
    path.parent.mkdir(parents=True, exist_ok=True)
    facts = json.dumps({"contents": contents, "sha256": tensors_sha256(tensors)})
    with atomic_file(path) as tmp_path:
        save_file(tensors, tmp_path, {"features": facts})  # of several keys the order would change by chance


def read_features(path: Path, contents: dict[str, object]) -> Features | None:
    """Features from a file; None where there is none, or where it is not sound, which a line says."""
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as file:
            facts = json.loads((file.metadata() or {})["features"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (no dict)
        if facts["contents"] != contents:
            raise ValueError("it is of other images, or of another network")
        if facts["sha256"] != tensors_sha256(tensors):
            raise ValueError("its checksum is wrong")
        return Features(tensors["pooled"], tensors.get("spatial"), tensors.get("logits"))
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        print(f"{path} is damaged ({first_line(error)}); its features are computed again", file=sys.stderr, flush=True)
        return None


def _tensors(features: Features) -> Tensors:
    parts = {"pooled": features.pooled, "spatial": features.spatial, "logits": features.logits}
    return {name: tensor.contiguous() for name, tensor in parts.items() if tensor is not None}
