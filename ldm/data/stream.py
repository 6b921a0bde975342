"""Data sets that are read from beginning to end, shard by shard, because they have no index or don't fit on a disk.

Each epoch has the shards in another order, and they are dealt to lanes like cards. A lane fills the same places of
every batch, whoever reads it, so the samples of step n are the same for any number of processes and loader workers; it
shuffles blocks of neighbours. Its place (shard, sample) travels with the batches and is kept in the checkpoints, from
where reading goes on.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import ImageOps
from torch.utils.data import DataLoader, IterableDataset, default_collate, get_worker_info
from tqdm import tqdm

from ldm.config.schema import DataConfig, Training
from ldm.data.archives import Sample
from ldm.data.crops import crop_resize
from ldm.data.images import decode, to_tensor
from ldm.data.records import BadSample, BadSampleError, Record
from ldm.data.sampler import SampleSpec
from ldm.data.sources import CAPTIONED, Sources
from ldm.distributed.accumulation import accumulation
from ldm.distributed.launch import leave_signals_to_parent
from ldm.utils.errors import UserError
from ldm.utils.rng import generator

Item = dict[str, Any]
Place = tuple[int, int]  # the number of the shard in the endless order of all, and of the sample in the shard

LANES = 64  # at most; no more processes can share them
TOGETHER = 4096  # samples that all lanes shuffle at a time
PATIENCE = 1000  # samples before the share of bad ones is judged
STANDS_FOR_ALL = 4096  # pictures that a mean over the whole set is taken from


class Stream:
    """The shards of a data set's sources; stands where an `Index` stands for sources that have one.

    `conditions` are as for an index; `report` is the file that bad samples are named in as they are met.
    """

    def __init__(self, data: DataConfig, cache_dir: Path, report: Path, conditions: Sequence[str] = CAPTIONED):
        self.data, self.report = data, report
        self.sources = Sources(data.source, data.size, cache_dir, conditions)
        self.shards = [shard for n in range(len(self.sources.configs)) for shard in self.sources.shards(n)]
        self.spec = SampleSpec(batch=1)
        self._named: set[str] = set()  # the bad ones that were reported

    def select(self, *splits: str) -> Self:
        """All of it is training data; other splits are empty."""
        return self._with(shards=self.shards if "train" in splits else [])

    def sampled(self, spec: SampleSpec) -> Self:
        """The same, whose `batches` hold samples as `spec` says; the batch is that of the training."""
        return self._with(spec=spec)

    def reported_in(self, report: Path) -> Self:
        """The same with another report."""
        return self._with(report=report)

    def _with(self, **changes: Any) -> Self:
        twin = copy.copy(self)
        twin.__dict__.update(changes, _named=set())
        return twin

    def some(self, _count: int) -> Self:
        return self  # `iter_images` stops by itself

    def captions(self) -> Iterator[list[str]]:
        return iter(())  # they aren't known before they are read

    def __len__(self) -> int:
        return len(self.shards)

    def fingerprint(self) -> str:
        """SHA-256 of the shards' names."""
        return hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()

    def beginning(self, count: int) -> Iterator[tuple[torch.Tensor, str] | BadSample]:
        """As many of the first of each shard, centre cropped, `(3, H, W)`, with a caption, and those that are bad."""
        per_shard = -(-count // max(1, len(self.shards)))
        samples = (
            sample for shard in self.shards for sample in itertools.islice(self.sources.samples(shard), per_shard)
        )
        for sample in itertools.islice(samples, count):
            pixels = sample if isinstance(sample, BadSample) else _pixels(sample, self.data, self.spec, None)
            yield pixels if isinstance(pixels, BadSample) else (pixels, sample[0].captions[0])  # type: ignore[index]

    def iter_images(self, batch: int) -> Iterator[torch.Tensor]:
        """Some pictures that stand for all, in batches `(N, 3, H, W)`."""
        good = (sample[0] for sample in self.beginning(STANDS_FOR_ALL) if not isinstance(sample, BadSample))
        while part := list(itertools.islice(good, batch)):
            yield torch.stack(part)

    def lanes(self, batch: int, processes: int) -> int:
        """Lanes of a batch; UserError where the processes can't share them."""
        lanes = lanes_of(batch, len(self.shards))
        if lanes % processes:
            raise UserError(
                f"data.streaming: {len(self.shards)} shards make {lanes} lanes of a batch of {batch}, which "
                f"{processes} processes can't share; make more shards, or another batch"
            )
        return lanes

    def batches(
        self, training: Training, first_step: int, rank: int, processes: int, workers: int, places: Mapping[str, Place]
    ) -> Iterator[Item]:
        """Micro-batches of one process from a step on, with the lanes' places after each step as `places`."""
        lanes = self.lanes(training.batch, processes)
        mine = range(rank * lanes // processes, (rank + 1) * lanes // processes)
        workers = min(workers, len(mine))
        reader = _Reader(self, training.batch, lanes, mine, first_step, training.steps, dict(places))
        chunks = iter(DataLoader(reader, batch_size=None, num_workers=workers, worker_init_fn=leave_signals_to_parent))
        seen = bad = 0
        for _ in range(first_step, training.steps):
            parts = [next(chunks) for _ in range(max(1, workers))]  # one of each worker, in their order
            step = _joined(parts)
            seen, bad = seen + len(step["position"]), bad + len(step["bad"])
            self._report(step.pop("bad"), seen, bad)
            share = accumulation(training.batch, processes, training.device_batch).images
            places_now = step.pop("places")
            for start in range(0, len(step["position"]), share):
                yield {**{key: value[start : start + share] for key, value in step.items()}, "places": places_now}

    def _report(self, new: Sequence[str], seen: int, bad: int) -> None:
        for line in new:
            key, reason, fix = json.loads(line)
            if key in self._named:  # in an earlier round
                continue
            self._named.add(key)
            tqdm.write(f"left out: {key}: {reason}; {fix}")
            with self.report.open("a") as file:
                file.write(json.dumps({"key": key, "reason": reason, "fix": fix}, ensure_ascii=False) + "\n")
        data = self.data
        too_many = seen >= PATIENCE and bad > data.max_bad * (seen + bad)
        if bad and (data.on_error == "stop" or too_many):
            rule = "data.on_error is stop" if data.on_error == "stop" else f"data.max_bad is {data.max_bad}"
            raise UserError(f"{bad} of {seen + bad} samples were bad, and {rule}; see {self.report}")


def lanes_of(batch: int, shards: int) -> int:
    """Lanes that a batch is filled from: the most that share it evenly and have a shard each."""
    return max(n for n in range(1, min(batch, shards, LANES) + 1) if batch % n == 0)


def lane(stream: Stream, lanes: int, place: Place) -> Iterator[tuple[Place, Sample]]:
    """The endless samples of a lane from a place on, each with the place after it.

    Shard k of the run is the k-th of one epoch's permutation after the other; a lane reads every `lanes`-th.
    """
    seed, count, (first, skipped) = stream.spec.seed, len(stream.shards), place
    block = min(1024, max(16, TOGETHER // lanes))
    empty = 0
    for k in itertools.count(first, lanes):
        epoch = k // count
        shard = int(np.random.default_rng([seed, epoch, *b"shards"]).permutation(count)[k % count])
        start = skipped // block * block  # what was read of a block is read again, so that it shuffles alike
        samples = itertools.islice(stream.sources.samples(stream.shards[shard]), start, None)
        empty += 1
        while several := list(itertools.islice(samples, block)):
            empty = 0
            shuffled = np.random.default_rng([seed, shard, epoch, start]).permutation(len(several))
            for i in range(max(0, skipped - start), len(several)):
                yield (k, start + i + 1), several[shuffled[i]]
            start += len(several)
        skipped = 0
        if empty > count:
            raise UserError("data.source: no sample in any shard; see that they are sound")
    raise AssertionError("unreachable")


class _Reader(IterableDataset[Item]):
    """What one worker reads of each step: the places of the batch that its lanes fill."""

    def __init__(
        self, stream: Stream, batch: int, lanes: int, mine: range, first: int, steps: int, places: dict[str, Place]
    ):
        self.stream, self.batch, self.lanes, self.mine = stream, batch, lanes, mine
        self.first, self.steps, self.places = first, steps, places

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        mine = list(self.mine)[worker.id :: worker.num_workers] if worker else list(self.mine)
        places = {str(number): tuple(self.places.get(str(number), (number, 0))) for number in mine}
        reading = {n: lane(self.stream, self.lanes, places[str(n)]) for n in mine}  # type: ignore[arg-type]
        share = self.batch // self.lanes
        for step in range(self.first, self.steps):
            items: list[Item] = []
            bad: list[str] = []
            for number in mine:
                for j in range(share):
                    n = step * self.batch + number * share + j
                    before = places[str(number)]
                    while True:
                        places[str(number)], sample = next(reading[number])
                        item = (
                            sample
                            if isinstance(sample, BadSample)
                            else _item(sample, self.stream.data, self.stream.spec, n)
                        )
                        if not isinstance(item, BadSample):
                            break
                        bad.append(json.dumps([item.key, item.reason, item.fix]))
                        if places[str(number)][0] > before[0] + 2 * len(self.stream.shards):  # nothing good in all
                            raise UserError(f"data.source: shards without any good sample; the last: {item}")
                    items.append(item)
            yield {**default_collate(items), "bad": bad, "places": dict(places)}


def _joined(parts: Sequence[Item]) -> Item:
    """The chunks of a step as one, ordered by position, so that it doesn't matter who read what."""
    order = torch.cat([part["position"] for part in parts]).argsort()
    step: Item = {}
    for key in parts[0]:
        if key == "places":
            step[key] = {number: place for part in parts for number, place in part[key].items()}
        elif isinstance(parts[0][key], torch.Tensor):
            step[key] = torch.cat([part[key] for part in parts])[order]
        else:
            values = [value for part in parts for value in part[key]]
            step[key] = values if key == "bad" else [values[i] for i in order]
    return step


def _item(sample: tuple[Record, bytes], data: DataConfig, spec: SampleSpec, n: int) -> Item | BadSample:
    record = sample[0]
    pixels = _pixels(sample, data, spec, n)
    if isinstance(pixels, BadSample):
        return pixels
    choice = int(generator(spec.seed, "caption", n).integers(len(record.captions)))
    return {
        "position": torch.tensor(n), "key": record.key, "pixels": pixels, "caption": record.captions[choice],
        "dropout": torch.tensor(spec.cond_dropout),
    }  # fmt: skip


def _pixels(
    sample: tuple[Record, bytes], data: DataConfig, spec: SampleSpec, n: int | None
) -> torch.Tensor | BadSample:
    """The picture as position n shows it, or centre cropped, `(3, size, size)` in [-1, 1]."""
    record, content = sample
    try:
        picture = decode(content, data.background, data.min_side)
    except BadSampleError as error:
        return BadSample(record.key, *error.args)
    u, v = 0.5, 0.5
    if n is not None and spec.augmentation.crops is not None:
        u, v = generator(spec.seed, "corner", n).random(2).tolist()
    part, _ = crop_resize(picture, (data.size, data.size), u, v)
    if n is not None and spec.augmentation.flip and generator(spec.seed, "flip", n).random() < 0.5:
        part = ImageOps.mirror(part)
    return to_tensor(part)
