"""Data sets that are read sequentially, shard by shard, because they are too large for an index or for the disk.

The samples of step n are the same for any number of processes and loader workers (`ldm.data.stream_reader`). The
positions of the lanes travel with the batches and are saved in the checkpoints, from where reading continues.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from tqdm import tqdm

from ldm.config.schema import DataConfig, Training
from ldm.data.draws import Draw, Item
from ldm.data.records import BadSample
from ldm.data.sampler import SampleSpec
from ldm.data.source_kinds import CAPTIONED
from ldm.data.sources import Sources
from ldm.data.stream_reader import LanePosition, StreamReader, decoded_image, lanes_of, pixels_of, usable_workers
from ldm.distributed.accumulation import accumulation
from ldm.distributed.launch import DataLoader
from ldm.utils.errors import UserError

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
            image = decoded_image(sample, self.data)
            if isinstance(image, BadSample):
                yield image
            elif not isinstance(sample, BadSample):
                yield pixels_of(image, self.data, self.spec), sample[0].captions[0]

    def iter_images(self, batch: int) -> Iterator[torch.Tensor]:
        """Images to estimate statistics from, in batches `(N, 3, H, W)`."""
        good = (sample[0] for sample in self.first_samples(STATISTICS_IMAGES) if not isinstance(sample, BadSample))
        while images := list(itertools.islice(good, batch)):
            yield torch.stack(images)

    def lanes(self, batch: int) -> int:
        """How many shards fill a batch together: `data.stream_lanes` at most."""
        return lanes_of(batch, len(self.shards), self.data.stream_lanes)

    def describe(self, batch: int, processes: int) -> str:
        """How many shards there are and are read at once, and how many loader processes read the same one."""
        lanes = self.lanes(batch)
        readers = processes * max(1, usable_workers(max(1, batch // processes), self.data.workers))
        shared = f"; {-(-readers // lanes)} loader processes read the same one, see data.stream_lanes"
        return f"shards     {len(self.shards):,}, {lanes} at once{shared if readers > lanes else ''}"

    def reader(
        self, training: Training, first_step: int, rank: int, processes: int, positions: Mapping[str, LanePosition]
    ) -> StreamReader:
        """Reads one process's rows of each batch from a step on; `positions` are the lanes' after the steps before."""
        lanes, rows = self.lanes(training.batch), training.batch // processes
        if positions and len(positions) != lanes:
            raise UserError(
                f"data.stream_lanes: {len(positions)} lanes of this run were read, and now there would be {lanes}; "
                "give back the batch, the shards and the data.stream_lanes that it was trained with"
            )
        own_rows, steps = range(rank * rows, (rank + 1) * rows), range(first_step, training.steps)
        return StreamReader(self, training.batch, lanes, own_rows, steps, positions)

    def batches(
        self,
        training: Training,
        first_step: int,
        rank: int,
        processes: int,
        workers: int,
        positions: Mapping[str, LanePosition],
        pin_memory: bool = False,
    ) -> Iterator[Item]:
        """The batches of each pass of one process, from a step on. `positions` are the lanes' before it."""
        share = accumulation(training.batch, processes, training.device_batch).images
        reader = self.reader(training, first_step, rank, processes, positions)
        workers = usable_workers(len(reader.rows), workers)
        loader = DataLoader[Any](reader, batch_size=None, num_workers=workers)
        parts = iter(loader)  # of the workers in turn
        parts_of_step = max(1, min(workers, len(reader.rows)))
        seen = bad = 0
        for _ in reader.steps:
            step = _join_parts([next(parts) for _ in range(parts_of_step)], pin_memory)
            seen, bad = seen + step.pop("seen"), bad + len(step["bad"])
            self._report(step.pop("bad"), seen, bad)
            places = step.pop("places")
            for start in range(0, len(step["position"]), share):
                yield {**{key: value[start : start + share] for key, value in step.items()}, "places": places}

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
        too_many = seen >= MIN_SEEN and bad > data.max_bad * seen
        if bad and (data.on_error == "stop" or too_many):
            rule = "data.on_error is stop" if data.on_error == "stop" else f"data.max_bad is {data.max_bad}"
            raise UserError(f"{bad} of {seen} samples were bad, and {rule}; see {self.report}")


def _join_parts(parts: Sequence[Item], pin_memory: bool = False) -> Item:
    """The items of a step from all workers, ordered by position, so that the number of workers doesn't matter."""
    order = torch.cat([part["position"] for part in parts]).argsort()
    step: Item = {}
    for key in parts[0]:
        if key == "seen":
            step[key] = sum(part[key] for part in parts)
        elif key == "places":
            step[key] = {number: position for part in parts for number, position in part[key].items()}
        elif isinstance(parts[0][key], torch.Tensor):
            joined = torch.cat([part[key] for part in parts])
            step[key] = torch.index_select(joined, 0, order, out=torch.empty_like(joined, pin_memory=pin_memory))
        else:
            values = [value for part in parts for value in part[key]]
            step[key] = values if key == "bad" else [values[i] for i in order]
    return step
