"""Data sets that are read sequentially, shard by shard, because they are too large for an index or for the disk.

Each epoch permutes the shards and deals them to lanes. A lane fills the same rows of every batch, whichever process or
loader worker reads it, so the samples of step n are the same for any number of them. It shuffles blocks of consecutive
samples. Its position (shard, sample) travels with the batches and is saved in the checkpoints, from where reading
continues.
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
from ldm.data.crops import crop_resize
from ldm.data.draws import Draw, Item, with_drawn
from ldm.data.images import decode, to_tensor
from ldm.data.records import BadSample, BadSampleError, Record, Sample
from ldm.data.sampler import SampleSpec
from ldm.data.source_kinds import CAPTIONED
from ldm.data.sources import Sources
from ldm.distributed.accumulation import accumulation
from ldm.distributed.launch import leave_signals_to_parent
from ldm.utils.errors import UserError
from ldm.utils.rng import generator

LanePosition = tuple[int, int]  # number of the shard, counted over all epochs, and of the sample in it

MAX_LANES = 64  # no more processes can share them
SHUFFLE_BUFFER = 4096  # samples, over all lanes
MIN_SEEN = 1000  # samples before `data.max_bad` applies
STATISTICS_IMAGES = 4096  # from which statistics of the whole set are estimated


class Stream:
    """The shards of a data set's sources: takes the place of an `Index`.

    `conditions` are as for an index; `report` is the file to which bad samples are written when they are read.
    """

    def __init__(self, data: DataConfig, cache_dir: Path, report: Path, conditions: Sequence[str] = CAPTIONED):
        self.data, self.report = data, report
        self.sources = Sources(data.source, data.size, cache_dir, conditions)
        self.shards = [shard for n in range(len(self.sources.configs)) for shard in self.sources.shards(n)]
        self.spec = SampleSpec(batch=1)
        self.draws: tuple[Draw, ...] = ()
        self._reported: set[str] = set()  # keys of bad samples

    def select(self, *splits: str) -> Self:
        """The whole stream is the split `train`; other splits are empty."""
        return self._with(shards=self.shards if "train" in splits else [])

    def with_spec(self, spec: SampleSpec) -> Self:
        """A copy whose samples follow `spec`, except for its batch: `batches` takes that of the training."""
        return self._with(spec=spec)

    def with_draws(self, *draws: Draw) -> Self:
        """A copy whose items have what these draw too."""
        return self._with(draws=(*self.draws, *draws))

    def with_report(self, report: Path) -> Self:
        """A copy that writes bad samples to another file."""
        return self._with(report=report)

    def _with(self, **changes: Any) -> Self:
        changed = copy.copy(self)
        changed.__dict__.update(changes, _reported=set())
        return changed

    def subset(self, _count: int) -> Self:
        return self  # `iter_images` is limited already

    def captions(self) -> Iterator[list[str]]:
        return iter(())  # unknown before the stream is read

    def __len__(self) -> int:
        return len(self.shards)

    def fingerprint(self) -> str:
        """SHA-256 of the shards' names."""
        return hashlib.sha256(json.dumps(self.shards).encode()).hexdigest()

    def first_samples(self, count: int) -> Iterator[tuple[torch.Tensor, str] | BadSample]:
        """The first samples of each shard, `count` in all: centre crop `(3, H, W)` and caption, or why it is bad."""
        per_shard = -(-count // max(1, len(self.shards)))
        samples = (
            sample for shard in self.shards for sample in itertools.islice(self.sources.samples(shard), per_shard)
        )
        for sample in itertools.islice(samples, count):
            pixels = sample if isinstance(sample, BadSample) else _pixels(sample, self.data, self.spec, None)
            yield pixels if isinstance(pixels, BadSample) else (pixels, sample[0].captions[0])  # type: ignore[index]

    def iter_images(self, batch: int) -> Iterator[torch.Tensor]:
        """Images to estimate statistics from, in batches `(N, 3, H, W)`."""
        good = (sample[0] for sample in self.first_samples(STATISTICS_IMAGES) if not isinstance(sample, BadSample))
        while images := list(itertools.islice(good, batch)):
            yield torch.stack(images)

    def lanes(self, batch: int, processes: int) -> int:
        """The number of lanes of a batch; UserError where the processes can't share them evenly."""
        lanes = lanes_of(batch, len(self.shards))
        if lanes % processes:
            raise UserError(
                f"data.streaming: {len(self.shards)} shards make {lanes} lanes of a batch of {batch}, which "
                f"{processes} processes can't share; make more shards, or another batch"
            )
        return lanes

    def batches(
        self,
        training: Training,
        first_step: int,
        rank: int,
        processes: int,
        workers: int,
        places: Mapping[str, LanePosition],
        pin_memory: bool = False,
    ) -> Iterator[Item]:
        """The batches of each pass of one process, from a step on. `places` are the lanes' positions after the step."""
        lanes = self.lanes(training.batch, processes)
        own_lanes = range(rank * lanes // processes, (rank + 1) * lanes // processes)
        workers = min(workers, len(own_lanes))
        reader = _Reader(self, training.batch, lanes, own_lanes, first_step, training.steps, dict(places))
        chunks = iter(DataLoader(reader, batch_size=None, num_workers=workers, worker_init_fn=leave_signals_to_parent))
        seen = bad = 0
        for _ in range(first_step, training.steps):
            parts = [next(chunks) for _ in range(max(1, workers))]  # one of each worker, in order
            step = _join_parts(parts, pin_memory)
            seen, bad = seen + len(step["position"]), bad + len(step["bad"])
            self._report(step.pop("bad"), seen, bad)
            share = accumulation(training.batch, processes, training.device_batch).images
            positions = step.pop("places")
            for start in range(0, len(step["position"]), share):
                yield {**{key: value[start : start + share] for key, value in step.items()}, "places": positions}

    def _report(self, new: Sequence[str], seen: int, bad: int) -> None:
        for line in new:
            key, reason, fix = json.loads(line)
            if key in self._reported:  # in an earlier epoch
                continue
            self._reported.add(key)
            tqdm.write(f"left out: {key}: {reason}; {fix}")
            with self.report.open("a") as file:
                file.write(json.dumps({"key": key, "reason": reason, "fix": fix}, ensure_ascii=False) + "\n")
        data = self.data
        too_many = seen >= MIN_SEEN and bad > data.max_bad * (seen + bad)
        if bad and (data.on_error == "stop" or too_many):
            rule = "data.on_error is stop" if data.on_error == "stop" else f"data.max_bad is {data.max_bad}"
            raise UserError(f"{bad} of {seen + bad} samples were bad, and {rule}; see {self.report}")


def lanes_of(batch: int, shards: int) -> int:
    """The largest number of lanes that share a batch evenly and have a shard each."""
    return max(n for n in range(1, min(batch, shards, MAX_LANES) + 1) if batch % n == 0)


def lane(stream: Stream, lanes: int, start: LanePosition) -> Iterator[tuple[LanePosition, Sample]]:
    """The endless samples of a lane from a position on, each with the position after it.

    Shard k of the run is the k-th of the concatenated permutations of all epochs; a lane reads every `lanes`-th shard.
    """
    seed, count, (first, skipped) = stream.spec.seed, len(stream.shards), start
    block = min(1024, max(16, SHUFFLE_BUFFER // lanes))
    empty = 0  # consecutive shards without any sample
    for k in itertools.count(first, lanes):
        epoch = k // count
        shard = int(np.random.default_rng([seed, epoch, *b"shards"]).permutation(count)[k % count])
        block_start = skipped // block * block  # a block that was begun is read again, to be shuffled alike
        samples = itertools.islice(stream.sources.samples(stream.shards[shard]), block_start, None)
        empty += 1
        while buffer := list(itertools.islice(samples, block)):
            empty = 0
            order = np.random.default_rng([seed, shard, epoch, block_start]).permutation(len(buffer))
            for i in range(max(0, skipped - block_start), len(buffer)):
                yield (k, block_start + i + 1), buffer[order[i]]
            block_start += len(buffer)
        skipped = 0
        if empty > count:
            raise UserError("data.source: no sample in any shard; see that they are sound")
    raise AssertionError("unreachable")


class _Reader(IterableDataset[Item]):
    """The rows of each step's batch that the lanes of one loader worker fill."""

    def __init__(
        self,
        stream: Stream,
        batch: int,
        lanes: int,
        own_lanes: range,
        first_step: int,
        steps: int,
        positions: dict[str, LanePosition],
    ):
        self.stream, self.batch, self.lanes, self.own_lanes = stream, batch, lanes, own_lanes
        self.first_step, self.steps, self.positions = first_step, steps, positions

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        own = list(self.own_lanes)[worker.id :: worker.num_workers] if worker else list(self.own_lanes)
        positions = {str(k): tuple(self.positions.get(str(k), (k, 0))) for k in own}
        samples = {k: lane(self.stream, self.lanes, positions[str(k)]) for k in own}  # type: ignore[arg-type]
        share = self.batch // self.lanes
        for step in range(self.first_step, self.steps):
            items: list[Item] = []
            bad: list[str] = []
            for k in own:
                for j in range(share):
                    n = step * self.batch + k * share + j
                    first_shard = positions[str(k)][0]
                    while True:
                        positions[str(k)], sample = next(samples[k])
                        item = _item(sample, self.stream, n)
                        if not isinstance(item, BadSample):
                            break
                        bad.append(json.dumps([item.key, item.reason, item.fix]))
                        if positions[str(k)][0] > first_shard + 2 * len(self.stream.shards):  # two epochs
                            raise UserError(f"data.source: shards without any good sample; the last: {item}")
                    items.append(item)
            yield {**default_collate(items), "bad": bad, "places": dict(positions)}


def _join_parts(parts: Sequence[Item], pin_memory: bool = False) -> Item:
    """The items of a step from all workers, ordered by position, so that the number of workers doesn't matter."""
    order = torch.cat([part["position"] for part in parts]).argsort()
    step: Item = {}
    for key in parts[0]:
        if key == "places":
            step[key] = {number: position for part in parts for number, position in part[key].items()}
        elif isinstance(parts[0][key], torch.Tensor):
            joined = torch.cat([part[key] for part in parts])
            step[key] = torch.index_select(joined, 0, order, out=torch.empty_like(joined, pin_memory=pin_memory))
        else:
            values = [value for part in parts for value in part[key]]
            step[key] = values if key == "bad" else [values[i] for i in order]
    return step


def _item(sample: Sample, stream: Stream, n: int) -> Item | BadSample:
    """The item at position n, or the reason why it is bad."""
    if isinstance(sample, BadSample):
        return sample
    spec, record, pixels = stream.spec, sample[0], _pixels(sample, stream.data, stream.spec, n)
    if isinstance(pixels, BadSample):
        return pixels
    choice = int(generator(spec.seed, "caption", n).integers(len(record.captions)))
    item: Item = {
        "position": torch.tensor(n),
        "key": record.key,
        "pixels": pixels,
        "caption": record.captions[choice],
        "dropout": torch.tensor(spec.cond_dropout),
    }
    return with_drawn(item, n, stream.draws)


def _pixels(
    sample: tuple[Record, bytes], data: DataConfig, spec: SampleSpec, n: int | None
) -> torch.Tensor | BadSample:
    """The image at position n, or, without n, its centre crop, `(3, size, size)` in [-1, 1]."""
    record, content = sample
    try:
        image = decode(content, data.background, data.min_side)
    except BadSampleError as error:
        return BadSample(record.key, *error.args)
    u, v = 0.5, 0.5
    if n is not None and spec.augmentation.crops is not None:
        u, v = generator(spec.seed, "corner", n).random(2).tolist()
    cropped, _ = crop_resize(image, (data.size, data.size), u, v)
    if n is not None and spec.augmentation.flip and generator(spec.seed, "flip", n).random() < 0.5:
        cropped = ImageOps.mirror(cropped)
    return to_tensor(cropped)
