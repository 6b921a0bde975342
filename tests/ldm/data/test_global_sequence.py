"""One global sequence of samples, for any number of processes, loader workers and restarts."""

import pickle
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from ldm.config import loader
from ldm.data.dataset import PlannedSample, SamplePlan
from ldm.data.index import Index
from ldm.data.index_schema import SCHEMA
from ldm.data.index_table import IndexTable
from ldm.data.sampler import Positions, SampleSpec
from ldm.distributed.accumulation import accumulation

BATCH, STEPS, IMAGES = 192, 9, 700
KINDS = ("plain", "buckets", "weights", "prior")
RANKS = (1, 3, 8, 64)


def plan_of(root: Path, kind: str) -> SamplePlan:
    """The samples of 700 images with two captions each."""
    rng = np.random.default_rng(0)
    rows = [
        {
            "key": f"{i}.png",
            "file": f"{i}.png",
            "start": 0,
            "size": -1,
            "captions": [f"image {i}", f"another {i}"],
            "label": "",
            "split": "prior" if kind == "prior" and i % 5 == 0 else "train",
            "weight": float(rng.uniform(1, 3)) if kind == "weights" else 1.0,
            "repeats": 1 + (kind == "weights" and i % 3 == 0),
            "source": 0,
            "stamp": bytes(16),
            "sha256": rng.bytes(32),
            "width": int(rng.choice([16, 24, 40])),
            "height": 16,
        }
        for i in range(IMAGES)
    ]
    buckets = "null" if kind == "plain" else "{step: 8}"
    data = loader.load(root / "configs/tiny.yaml", ["data.size=16", "data.flip=true", f"data.buckets={buckets}"]).data
    index = Index(IndexTable(pa.Table.from_pylist(rows, SCHEMA)), None, data)  # type: ignore[arg-type]
    return SamplePlan(index, SampleSpec.of(data, BATCH, seed=3))


def described(sample: PlannedSample) -> tuple[Any, ...]:
    return sample.number, sample.caption, sample.crop


def computed(plan: bytes, first: int, steps: int, ranks: int, workers: int) -> dict[int, Any]:
    """The samples of some steps by position, as the loader workers of all processes make them.

    A `DataLoader` gives batch i of its process to worker i modulo `workers`, which has a copy of the data set.
    """
    passes, _ = accumulation(BATCH, ranks, 16)
    samples: dict[int, Any] = {}
    for rank in range(ranks):
        parts = list(Positions(first, steps, BATCH, passes, rank, ranks))
        assert len(parts) == (steps - first) * passes
        for worker in range(max(1, workers)):
            copy = pickle.loads(plan)
            for part in parts[worker :: max(1, workers)]:
                assert not samples.keys() & part
                samples |= {n: described(copy[n]) for n in part}
    return samples


@pytest.fixture(scope="module", params=KINDS)
def plan(request: pytest.FixtureRequest, root: Path) -> tuple[bytes, dict[int, Any]]:
    """A pickled plan, and its samples in order of position."""
    plan = plan_of(root, request.param)
    assert (len(plan.order.rounds) > 1) == (request.param != "plain")
    return pickle.dumps(plan), {n: described(plan[n]) for n in range(STEPS * BATCH)}


@pytest.mark.parametrize("workers", range(5))
@pytest.mark.parametrize("ranks", RANKS)
def test_any_number_of_processes_and_workers_computes_the_same_samples(
    plan: tuple[bytes, dict[int, Any]], ranks: int, workers: int
) -> None:
    pickled, expected = plan
    assert computed(pickled, 0, STEPS, ranks, workers) == expected


def test_restarts_with_other_processes_and_workers_continue_the_sequence(plan: tuple[bytes, dict[int, Any]]) -> None:
    pickled, expected = plan
    for seed in range(4):
        rng = np.random.default_rng(seed)
        stops = [0, *np.sort(rng.choice(np.arange(1, STEPS), 3, replace=False)).tolist(), STEPS]
        samples: dict[int, Any] = {}
        for first, steps in pairwise(stops):
            samples |= computed(pickled, first, steps, int(rng.choice(RANKS)), int(rng.integers(5)))
        assert samples == expected


def test_a_global_epoch_has_each_image_once(root: Path) -> None:
    samples = computed(pickle.dumps(plan_of(root, "plain")), 0, 2 * IMAGES // BATCH, 8, 2)
    epoch = [samples[n][0] for n in range(IMAGES)]
    assert sorted(epoch) == list(range(IMAGES))
    assert all(count <= 2 for count in Counter(number for number, *_ in samples.values()).values())
