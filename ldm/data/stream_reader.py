"""What a loader worker reads and decodes of a stream, whose order doesn't depend on the number of workers.

Each epoch permutes the shards and deals them to lanes. A lane cuts its shards into blocks of consecutive samples,
shuffles each block, and fills the same rows of every batch. A worker reads the lanes of its rows, and decodes the
samples of its rows alone: several may read a lane, and none needs to know of the others.

That an image is bad shows only when it is decoded. So that a lane's position (shard, sample) follows from the number of
steps, a bad sample's row takes the next good sample of its block, and a block without any is left out by all who read
its lane.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import IterableDataset, default_collate, get_worker_info

from ldm.config.schema import DataConfig
from ldm.data.crops import crop_resize
from ldm.data.draws import Item, with_drawn
from ldm.data.images import decode, to_tensor
from ldm.data.records import BadSample, BadSampleError, Sample
from ldm.data.sampler import SampleSpec
from ldm.utils.errors import UserError
from ldm.utils.rng import generator

if TYPE_CHECKING:
    from ldm.data.stream import Stream

LanePosition = tuple[int, int]  # number of the shard, counted over all epochs, and of the sample in it

SHUFFLE_BUFFER = 4096  # samples, over all lanes
MAX_EMPTY_SHARDS = 100  # without a good sample, in a row


def lanes_of(batch: int, shards: int, most: int) -> int:
    """The largest number of lanes, `most` at most, that share a batch evenly and have a shard each."""
    return max(n for n in range(1, min(batch, shards, most) + 1) if batch % n == 0)


def usable_workers(rows: int, workers: int) -> int:
    """How many of `workers` can divide a process's rows of a batch: each has some, or equally many share a row."""
    return workers if workers <= rows else workers - workers % rows


class Block(NamedTuple):
    """Consecutive samples of a shard, shuffled; those before `start` were read before a restart."""

    shard: int  # counted over all epochs
    first: int  # number of its first sample in the shard
    samples: list[Sample]
    start: int


def lane_blocks(stream: Stream, lanes: int, position: LanePosition) -> Iterator[Block]:
    """The endless blocks of a lane from a position on; a shard's last one may be empty.

    Shard k of the run is the k-th of the concatenated permutations of all epochs; a lane reads every `lanes`-th shard.
    """
    seed, count, (first_shard, read) = stream.spec.seed, len(stream.shards), position
    size = min(1024, max(16, SHUFFLE_BUFFER // lanes))
    for k in itertools.count(first_shard, lanes):
        epoch = k // count
        shard = int(np.random.default_rng([seed, epoch, *b"shards"]).permutation(count)[k % count])
        first = read // size * size  # a block that was begun is read again, to be shuffled alike
        samples = itertools.islice(stream.sources.samples(stream.shards[shard]), first, None)
        while True:
            buffer = list(itertools.islice(samples, size))
            order = np.random.default_rng([seed, shard, epoch, first]).permutation(len(buffer))
            yield Block(k, first, [buffer[i] for i in order], max(0, read - first))
            first += len(buffer)
            if len(buffer) < size:
                break
        read = 0


class StreamReader(IterableDataset[Item]):
    """The rows of each step's batch that one process computes, divided among its loader workers.

    `positions` are those of the lanes before the first of `steps`; a lane without one begins.
    """

    def __init__(
        self,
        stream: Stream,
        batch: int,
        lanes: int,
        rows: range,
        steps: range,
        positions: Mapping[str, LanePosition],
    ):
        self.stream, self.batch, self.lanes = stream, batch, lanes
        self.rows, self.steps, self.positions = rows, steps, dict(positions)

    def __iter__(self) -> Iterator[Item]:
        worker = get_worker_info()
        return self.parts(worker.id, worker.num_workers) if worker else self.parts(0, 1)

    def parts(self, worker: int, workers: int) -> Iterator[Item]:
        """A worker's part of each of its batches, with the positions of its lanes after the step.

        `bad` are the bad samples among the `seen` ones. `workers` are as many as `usable_workers` says.
        """
        divisor = min(workers, len(self.rows))
        number = worker % divisor
        rows = self.rows[number * len(self.rows) // divisor : (number + 1) * len(self.rows) // divisor]
        steps = self.steps[worker // divisor :: workers // divisor]  # where several share a row, they take turns
        per_lane = self.batch // self.lanes
        numbers = range(rows.start // per_lane, (rows.stop - 1) // per_lane + 1)
        lanes = [_Lane(self, k, rows, steps) for k in numbers]
        for step in self.steps:
            items = [item for lane in lanes for item in lane.next_items()]
            if step in steps:
                yield {
                    **default_collate(items),
                    "bad": [line for lane in lanes for line in lane.take_bad()],
                    "seen": sum(lane.take_seen() for lane in lanes),
                    "places": {str(lane.number): lane.position for lane in lanes},
                }


class _Lane:
    """A lane as one worker reads it: all samples, of which it decodes those of its `rows` in its `steps`."""

    def __init__(self, reader: StreamReader, number: int, rows: range, steps: range):
        self.reader, self.number, self._rows, self._steps = reader, number, rows, steps
        shard, sample = reader.positions.get(str(number), (number, 0))
        self.position: LanePosition = shard, sample
        self._bad: list[str] = []
        self._seen = 0
        self._per_batch = reader.batch // reader.lanes
        self._items = self._read(reader.steps.start * self._per_batch)

    def next_items(self) -> list[Item]:
        """The worker's items of the next step; empty where the step is another worker's."""
        return [item for item in itertools.islice(self._items, self._per_batch) if item is not None]

    def take_bad(self) -> list[str]:
        """The bad samples since the last call, as JSON: key, reason, fix."""
        bad, self._bad = self._bad, []
        return bad

    def take_seen(self) -> int:
        """The number of samples since the last call, good and bad, for which this worker answers."""
        seen, self._seen = self._seen, 0
        return seen

    def _read(self, row: int) -> Iterator[Item | None]:
        """The item of each row from `row` on, counted over all steps; None where it is another worker's."""
        stream = self.reader.stream
        reports_blocks = self._batch_position(row) is not None  # one of the workers that read the lane does
        last_good, patience = self.position[0], min(len(stream.shards), MAX_EMPTY_SHARDS) * self.reader.lanes
        for block in lane_blocks(stream, self.reader.lanes, self.position):
            images = _BlockImages(block.samples, stream.data)
            positions = {i: self._batch_position(row + i - block.start) for i in range(block.start, len(block.samples))}
            own = [i for i, n in positions.items() if n is not None]
            if images.first_good([*own, *range(len(block.samples))]) is None:
                if block.shard - last_good > patience:
                    raise UserError(f"data.source: shards without any good sample; {_last_bad(images.bad)}")
                if reports_blocks:
                    self._bad += map(_as_json, images.bad.values())
                    self._seen += len(images.bad)
                continue
            last_good = block.shard
            for i, n in positions.items():
                self.position = block.shard, block.first + i + 1
                yield None if n is None else self._item(block, images, i, n)
            row += len(positions)

    def _batch_position(self, row: int) -> int | None:
        """The position in the run of a row of the lane, counted over all steps; None where it is another worker's."""
        step, offset = divmod(row, self._per_batch)
        row_of_batch = self.number * self._per_batch + offset
        return step * self.reader.batch + row_of_batch if row_of_batch in self._rows and step in self._steps else None

    def _item(self, block: Block, images: _BlockImages, i: int, n: int) -> Item:
        """The item at position n: sample i of its block, or the next good one."""
        self._seen += 1
        chosen = images.first_good([*range(i, len(block.samples)), *range(i)])
        assert chosen is not None, "a block without any good sample was left out"
        if i in images.bad:
            self._bad.append(_as_json(images.bad[i]))
        stream, sample = self.reader.stream, block.samples[chosen]
        assert not isinstance(sample, BadSample)
        spec, record = stream.spec, sample[0]
        choice = int(generator(spec.seed, "caption", n).integers(len(record.captions)))
        item: Item = {
            "position": torch.tensor(n),
            "key": record.key,
            "pixels": pixels_of(images.image(chosen), stream.data, spec, n),
            "caption": record.captions[choice],
            "dropout": torch.tensor(spec.cond_dropout),
        }
        return with_drawn(item, n, stream.draws)


class _BlockImages:
    """The decoded images of a block: the last one, and why others are bad."""

    def __init__(self, samples: list[Sample], data: DataConfig):
        self.bad: dict[int, BadSample] = {}
        self._samples, self._data = samples, data
        self._last: tuple[int, Image.Image] | None = None

    def first_good(self, numbers: Iterable[int]) -> int | None:
        """The first of `numbers` whose sample is good."""
        return next((i for i in numbers if self._decode(i)), None)

    def image(self, i: int) -> Image.Image:
        """The image of a good sample."""
        assert self._decode(i) and self._last
        return self._last[1]

    def _decode(self, i: int) -> bool:
        if i in self.bad:
            return False
        if self._last is None or self._last[0] != i:
            decoded = decoded_image(self._samples[i], self._data)
            if isinstance(decoded, BadSample):
                self.bad[i] = decoded
                return False
            self._last = i, decoded
        return True


def decoded_image(sample: Sample, data: DataConfig) -> Image.Image | BadSample:
    """The image of a sample, or the reason why it is bad."""
    if isinstance(sample, BadSample):
        return sample
    try:
        return decode(sample[1], data.background, data.min_side)
    except BadSampleError as error:
        return BadSample(sample[0].key, *error.args)


def pixels_of(image: Image.Image, data: DataConfig, spec: SampleSpec, n: int | None = None) -> torch.Tensor:
    """The crop at position n of the run, or, without n, at the centre: `(3, size, size)` in [-1, 1]."""
    u, v = 0.5, 0.5
    if n is not None and spec.augmentation.crops is not None:
        u, v = generator(spec.seed, "corner", n).random(2).tolist()
    cropped, _ = crop_resize(image, (data.size, data.size), u, v)
    if n is not None and spec.augmentation.flip and generator(spec.seed, "flip", n).random() < 0.5:
        cropped = ImageOps.mirror(cropped)
    return to_tensor(cropped)


def _as_json(bad: BadSample) -> str:
    return json.dumps([bad.key, bad.reason, bad.fix])


def _last_bad(bad: Mapping[int, BadSample]) -> str:
    return f"the last: {[*bad.values()][-1]}" if bad else "the last is empty; write or fetch it anew"
