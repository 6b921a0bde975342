"""The global sequence of a stream: one for any number of processes, loader workers and restarts, bad samples or not."""

import functools
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import of_config
import pytest

from ldm.config import loader
from ldm.config.schema import Training
from ldm.data import stream_reader
from ldm.data.stream import Stream
from ldm.data.stream_reader import LanePosition, usable_workers

BATCH, STEPS, SHARDS, SAMPLES_PER_SHARD = 384, 3, 16, 24
RANKS, WORKERS = (1, 3, 8, 64, 128), range(5)
COUNTS = [(3, 2), (8, 3), (128, 1)]  # of processes and workers
TRUNCATED, NO_IMAGES, BAD_IMAGES = 3, 7, 11  # the shards that are so


class Read(NamedTuple):
    """What the workers of all processes make of some steps: items by position, lanes after the steps, bad samples."""

    items: dict[int, tuple[str, str, bytes]]
    positions: dict[str, LanePosition]
    bad: Counter[str]
    seen: int


def stream_of(root: Path, folder: Path) -> tuple[Stream, Training]:
    """A stream whose shards are read from the disk once, and are shuffled in blocks of sixteen samples."""
    overrides = [
        f"run.dir={folder.parent / 'run'}",
        f"data.source={folder}",
        "data.size=8",
        "data.streaming=true",
        "data.cache=none",
        "data.flip=true",
        "data.crop=random",
        f"stage2.batch={BATCH}",
        f"stage2.steps={STEPS}",
    ]
    config = loader.load(root / "configs/tiny.yaml", overrides)
    stream = of_config.streamed(config)
    samples = stream.sources.samples
    stream.sources.samples = functools.cache(lambda shard: list(samples(shard)))  # type: ignore[assignment, method-assign, return-value]
    return stream, config.stage2


@pytest.fixture(scope="module", autouse=True)
def several_blocks_a_shard() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stream_reader, "SHUFFLE_BUFFER", 16 * SHARDS)
        yield


def read(
    stream: Stream, training: Training, first: int, last: int, ranks: int, workers: int, places: dict[str, Any]
) -> Read:
    items: dict[int, tuple[str, str, bytes]] = {}
    positions: dict[str, LanePosition] = {}
    bad, seen = Counter[str](), 0
    steps = training.model_copy(update={"steps": last})
    for rank in range(ranks):
        reader = stream.reader(steps, first, rank, ranks, places)
        count = max(1, usable_workers(len(reader.rows), workers))
        for worker in range(count):
            for part in reader.parts(worker, count):
                names = zip(part["key"], part["caption"], part["pixels"], strict=True)
                new = {
                    int(n): (k, c, p.numpy().tobytes()) for n, (k, c, p) in zip(part["position"], names, strict=True)
                }
                assert not items.keys() & new.keys()
                items |= new
                bad.update(part["bad"])
                seen += part["seen"]
                if max(new) // BATCH == last - 1:
                    assert all(positions.get(lane, place) == place for lane, place in part["places"].items())
                    positions |= part["places"]
    return Read(items, positions, bad, seen)


@pytest.fixture(scope="module")
def sound_tars(shard: Callable[[Path, int, str], None], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen sound shards."""
    folder = tmp_path_factory.mktemp("sound") / "tars"
    folder.mkdir()
    for number in range(SHARDS):
        shard(folder / f"{number:02}.tar", SAMPLES_PER_SHARD, f"{number}-")
    return folder


@pytest.fixture(scope="module")
def damaged_tars(
    sound_tars: Path, write_tar: Callable[[Path, dict[str, bytes]], None], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """The same, of which one is truncated, one has no image that can be decoded, and one has some that can't."""
    folder = tmp_path_factory.mktemp("damaged") / "tars"
    shutil.copytree(sound_tars, folder)
    truncated = folder / f"{TRUNCATED:02}.tar"
    truncated.write_bytes(truncated.read_bytes()[:28_700])
    pairs = ((f"{i}.{suffix}", b"none") for i in range(SAMPLES_PER_SHARD) for suffix in ("png", "txt"))
    write_tar(folder / f"{NO_IMAGES:02}.tar", dict(pairs))
    some = folder / f"{BAD_IMAGES:02}.tar"
    some.write_bytes(some.read_bytes().replace(b"IDAT", b"DATI", 5))
    return folder


class Expected(NamedTuple):
    """A stream, and what a single process reads of it."""

    stream: Stream
    training: Training
    sequence: Read


@pytest.fixture(scope="module")
def sound(root: Path, sound_tars: Path) -> Expected:
    stream, training = stream_of(root, sound_tars)
    return Expected(stream, training, read(stream, training, 0, STEPS, 1, 0, {}))


@pytest.fixture(scope="module")
def damaged(root: Path, damaged_tars: Path) -> Expected:
    stream, training = stream_of(root, damaged_tars)
    return Expected(stream, training, read(stream, training, 0, STEPS, 1, 0, {}))


@pytest.mark.parametrize(("ranks", "workers"), COUNTS)
def test_any_number_of_processes_and_workers_reads_the_same(damaged: Expected, ranks: int, workers: int) -> None:
    assert damaged.sequence.items.keys() == set(range(STEPS * BATCH))
    assert read(*damaged[:2], 0, STEPS, ranks, workers, {}) == damaged.sequence


@pytest.mark.drill
@pytest.mark.parametrize("workers", [*WORKERS, 8])
@pytest.mark.parametrize("ranks", RANKS)
@pytest.mark.parametrize("tars", ["sound", "damaged"])
def test_all_numbers_of_processes_and_workers_read_the_same(
    tars: str, ranks: int, workers: int, request: pytest.FixtureRequest
) -> None:
    stream, training, sequence = request.getfixturevalue(tars)
    assert read(stream, training, 0, STEPS, ranks, workers, {})[:2] == sequence[:2]


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.drill) for seed in range(1, 9))])
def test_restarts_with_other_processes_and_workers_continue_the_sequence(damaged: Expected, seed: int) -> None:
    rng = np.random.default_rng(seed)
    items: dict[int, Any] = {}
    places: dict[str, Any] = {}
    for step in range(STEPS):
        ranks, workers = int(rng.choice(RANKS)), int(rng.choice(WORKERS))
        part = read(*damaged[:2], step, step + 1, ranks, workers, places)
        items |= part.items
        places = json.loads(json.dumps(part.positions))  # as in a checkpoint
    assert items == damaged.sequence.items


@pytest.mark.parametrize(("ranks", "workers"), COUNTS)
def test_workers_divide_the_decoding(
    ranks: int, workers: int, sound: Expected, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded, decode = Counter[bytes](), stream_reader.decode

    def count(data: bytes, *arguments: Any) -> Any:
        decoded[data] += 1
        return decode(data, *arguments)

    monkeypatch.setattr(stream_reader, "decode", count)
    monkeypatch.setattr(stream_reader, "SHUFFLE_BUFFER", SAMPLES_PER_SHARD * SHARDS)  # a block has a row of each worker
    read(sound.stream, sound.training, 0, 1, ranks, workers, {})  # an epoch
    assert len(decoded) == SHARDS * SAMPLES_PER_SHARD
    assert set(decoded.values()) == {1}


def test_the_order_is_that_of_shuffled_shards_and_blocks_dealt_to_lanes(sound: Expected) -> None:
    seed, rows = sound.stream.spec.seed, BATCH // SHARDS
    captions = dict[int, str]()
    for lane in range(SHARDS):
        samples = list[str]()
        for epoch in range(STEPS):
            shard = int(np.random.default_rng([seed, epoch, *b"shards"]).permutation(SHARDS)[lane])
            for first, size in ((0, 16), (16, 8)):
                order = np.random.default_rng([seed, shard, epoch, first]).permutation(size)
                samples += [f"{shard}-{first + i}" for i in order]
        for row, caption in enumerate(samples):
            captions[row // rows * BATCH + lane * rows + row % rows] = caption
    assert {n: caption for n, (_, caption, _) in sound.sequence.items.items()} == captions


def test_bad_samples_are_counted_and_reported_by_one_process(damaged: Expected) -> None:
    sequence = damaged.sequence  # as any number of processes reads it
    times = {json.loads(line)[0]: count for line, count in sequence.bad.items()}
    of_shard = Counter(Path(key.partition(".tar")[0]).stem for key in times)
    assert of_shard == {f"{TRUNCATED:02}": 1, f"{NO_IMAGES:02}": SAMPLES_PER_SHARD, f"{BAD_IMAGES:02}": 5}
    assert max(times.values()) <= STEPS + 1  # epochs
    left_out = sum(count for key, count in times.items() if key.startswith(f"{NO_IMAGES:02}"))
    assert sequence.seen == STEPS * BATCH + left_out
