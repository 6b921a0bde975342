"""Streaming: data sets that are read shard by shard."""

import gzip
import re
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import of_config
import pyarrow as pa
import pytest
import torch
from PIL import Image
from pyarrow import parquet

from ldm.config import loader
from ldm.config.schema import Training
from ldm.data.records import Sample
from ldm.data.stream import Stream
from ldm.data.stream_reader import LanePosition, lane_blocks, lanes_of, usable_workers
from ldm.utils.errors import UserError

SHARDS, SAMPLES_PER_SHARD = 6, 10


class Streamed(NamedTuple):
    stream: Stream
    training: Training


@pytest.fixture
def tars(tmp_path: Path, shard: Callable[[Path, int, str], None]) -> Path:
    """Six tars of ten images."""
    folder = tmp_path / "tars"
    folder.mkdir()
    for number in range(SHARDS):
        shard(folder / f"{number:02}.tar", SAMPLES_PER_SHARD, f"{number}-")
    return folder


@pytest.fixture
def streamed(root: Path, tmp_path: Path, tars: Path) -> Callable[..., Streamed]:
    def build(*overrides: str) -> Streamed:
        config = loader.load(
            root / "configs/tiny.yaml",
            [
                f"run.dir={tmp_path}",
                f"data.source={tars}",
                "data.size=16",
                "data.streaming=true",
                "data.cache=none",
                "data.flip=true",
                "stage2.batch=12",
                "stage2.steps=15",
                *overrides,
            ],
        )
        return Streamed(of_config.streamed(config), config.stage2)

    return build


def test_tars_without_captions_are_streamed_where_none_are_needed(
    streamed: Callable[..., Streamed], tars: Path, write_tar: Callable[[Path, dict[str, bytes]], None]
) -> None:
    for path in tars.glob("*.tar"):
        with tarfile.open(path) as tar:
            names = [name for name in tar.getnames() if name.endswith(".png")]
            files = {name: tar.extractfile(name).read() for name in names}  # type: ignore[union-attr]
        write_tar(path, files)
    stream = streamed("stage2.conditions=[]", "stage2.pooled_text=false", "stage2.steps=2")
    steps = read(stream)
    assert [len(step["pixels"]) for step in steps] == [12, 12]
    assert {caption for step in steps for caption in step["caption"]} == {""}


def read(
    stream: Streamed, processes: int = 1, workers: int = 0, first: int = 0, **positions: Any
) -> list[dict[str, Any]]:
    """The global batches of every step."""
    data, training = stream
    shares = [list(data.batches(training, first, rank, processes, workers, positions)) for rank in range(processes)]
    return [
        {
            "position": torch.cat([part["position"] for part in parts]),
            "pixels": torch.cat([part["pixels"] for part in parts]),
            "caption": [caption for part in parts for caption in part["caption"]],
            "places": {lane: position for part in parts for lane, position in part["places"].items()},
        }
        for parts in zip(*shares, strict=True)
    ]


def equal(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x["position"], y["position"])
        and torch.equal(x["pixels"], y["pixels"])
        and (x["caption"], x["places"]) == (y["caption"], y["places"])
        for x, y in zip(a, b, strict=True)
    )


def test_every_sample_comes_once_an_epoch(streamed: Callable[..., Streamed]) -> None:
    steps = read(streamed())  # 15 steps of 12 over 60 samples: three epochs
    captions = [caption for step in steps for caption in step["caption"]]
    assert Counter(captions) == dict.fromkeys((f"{s}-{i}" for s in range(SHARDS) for i in range(SAMPLES_PER_SHARD)), 3)
    assert captions[:60] != captions[60:120]


def test_every_sample_comes_once_an_epoch_where_lanes_have_unequal_shares(
    streamed: Callable[..., Streamed], tars: Path
) -> None:
    (tars / "05.tar").unlink()
    steps = read(streamed("stage2.batch=4", "stage2.steps=100"))  # five shards of ten on four lanes: eight epochs
    seen = Counter(caption for step in steps for caption in step["caption"])
    assert len(seen) == 50
    assert set(seen.values()) == {8}


@pytest.mark.parametrize(("processes", "workers"), [(1, 1), (1, 3), (2, 3), (3, 2), (4, 0), (12, 0)])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(
    processes: int, workers: int, streamed: Callable[..., Streamed]
) -> None:
    assert equal(read(streamed()), read(streamed(), processes, workers))


def test_workers_take_turns_where_a_step_has_fewer_images(streamed: Callable[..., Streamed]) -> None:
    few = ("stage2.batch=2", "stage2.steps=11")
    assert [usable_workers(2, workers) for workers in range(6)] == [0, 1, 2, 2, 4, 4]
    assert equal(read(streamed(*few)), read(streamed(*few), 1, 5))


@pytest.mark.parametrize("first", [1, 4, 7, 11])
def test_reading_continues_from_a_recorded_position(first: int, streamed: Callable[..., Streamed]) -> None:
    full_run = read(streamed())
    assert equal(full_run[first:], read(streamed(), 2, 1, first, **full_run[first - 1]["places"]))


def test_device_batches_split_the_global_batch(streamed: Callable[..., Streamed]) -> None:
    full_run, (stream, training) = read(streamed()), streamed("stage2.device_batch=4")
    parts = list(stream.batches(training, 0, 0, 1, 0, {}))
    assert len(parts) == 45
    assert torch.equal(torch.cat([part["pixels"] for part in parts[:3]]), full_run[0]["pixels"])


def lane_samples(stream: Stream, position: LanePosition) -> Iterator[tuple[LanePosition, Sample]]:
    """The samples of a single lane, each with the position after it."""
    for block in lane_blocks(stream, 1, position):
        for i in range(block.start, len(block.samples)):
            yield (block.shard, block.first + i + 1), block.samples[i]


def test_shuffling_continues_after_a_stop_within_a_block(streamed: Callable[..., Streamed]) -> None:
    stream = streamed().stream
    reading = lane_samples(stream, (0, 0))
    first = [next(reading) for _ in range(95)]
    for stop in (3, 10, 37, 61):
        again = lane_samples(stream, first[stop - 1][0])
        assert [next(again)[1][0].captions for _ in range(30)] == [s[1][0].captions for s in first[stop : stop + 30]]  # type: ignore[index, union-attr]


def test_a_streamed_dataset_yields_the_same_images_as_its_tars(
    streamed: Callable[..., Streamed], tmp_path: Path, tars: Path
) -> None:
    tar = streamed()
    samples = [sample for shard in tar.stream.shards for sample in tar.stream.sources.samples(shard)]
    rows = {
        "image": [{"bytes": content, "path": None} for _, content in samples],  # type: ignore[misc]
        "text": [record.captions[0] for record, _ in samples],  # type: ignore[misc, union-attr]
    }
    features = datasets.Features({"image": datasets.Image(), "text": datasets.Value("string")})
    datasets.Dataset.from_dict(rows, features).save_to_disk(tmp_path / "saved", num_shards=3)
    stream = streamed(f"data.source={tmp_path / 'saved'}", "stage2.steps=5")
    assert stream.stream.sources.kinds == ["datasets"]
    images = {
        caption: step["pixels"][i] for step in read(stream, workers=2) for i, caption in enumerate(step["caption"])
    }
    expected = {caption: step["pixels"][i] for step in read(tar)[:5] for i, caption in enumerate(step["caption"])}
    assert images.keys() == expected.keys()
    flips = (lambda x: x, lambda x: x.flip(2))
    assert all(any(torch.equal(images[c], flip(expected[c])) for flip in flips) for c in images)


def test_bad_samples_are_skipped_and_reported(
    streamed: Callable[..., Streamed], tars: Path, tmp_path: Path, write_tar: Callable[[Path, dict[str, bytes]], None]
) -> None:
    write_tar(tars / "03.tar", {"x.png": b"not an image", "x.txt": b"x", "y.png": b"\x89PNG"})
    (tars / "04.tar").write_bytes((tars / "04.tar").read_bytes()[:5000])
    steps = read(streamed("stage2.batch=3", "stage2.steps=60"), workers=2)  # three lanes of two shards
    assert len(steps) == 60
    assert not any(caption.startswith("3-") for step in steps for caption in step["caption"])
    report = (tmp_path / "data-report.jsonl").read_text()
    for name in ("03.tar:x", "03.tar:y", "04.tar"):
        assert name in report
    with pytest.raises(UserError, match=r"samples were bad, and data\.on_error is stop"):
        read(streamed("data.on_error=stop", "stage2.batch=3"))
    for tar in tars.glob("*.tar"):
        tar.write_bytes((tars / "03.tar").read_bytes())
    with pytest.raises(UserError, match="shards without any good sample"):
        read(streamed())


def as_parquet(stream: Stream, folder: Path) -> Path:
    """The shards of a stream as files of parquet."""
    folder.mkdir()
    for number, shard in enumerate(stream.shards):
        samples = list(stream.sources.samples(shard))
        rows = {
            "image": [content for _, content in samples],  # type: ignore[misc]
            "text": [record.captions[0] for record, _ in samples],  # type: ignore[misc, union-attr]
        }
        parquet.write_table(pa.table(rows), folder / f"{number:02}.parquet")
    return folder


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "parquet"])
def test_a_truncated_shard_is_one_line_with_its_name_and_a_remedy(
    kind: str, streamed: Callable[..., Streamed], tars: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = as_parquet(streamed().stream, tmp_path / "rows") if kind == "parquet" else tars
    if kind == "tar.gz":
        for tar in tars.glob("*.tar"):
            tar.with_suffix(".tar.gz").write_bytes(gzip.compress(tar.read_bytes()))
            tar.unlink()
    truncated = folder / f"04.{kind}"
    truncated.write_bytes(truncated.read_bytes()[: truncated.stat().st_size * 11 // 20])
    steps = read(streamed(f"data.source={folder}"), workers=2)
    printed = re.findall(r"^left out: (.*)$", capsys.readouterr().out, re.MULTILINE)
    assert len(printed) == 1
    assert re.fullmatch(rf"{truncated}: .* on.*; fetch or write it anew", printed[0])
    read_of = Counter(caption.partition("-")[0] for step in steps for caption in step["caption"])
    assert {str(number) for number in range(SHARDS)} - read_of.keys() == ({"4"} if kind == "parquet" else set())


def test_a_truncated_file_that_names_the_columns_is_named(streamed: Callable[..., Streamed], tmp_path: Path) -> None:
    first = as_parquet(streamed().stream, tmp_path / "rows") / "00.parquet"
    first.write_bytes(first.read_bytes()[:-100])
    with pytest.raises(UserError, match=f"can't open .*; {first} is damaged: fetch or write it anew"):
        streamed(f"data.source={first.parent}")


def test_a_batch_has_as_many_lanes_as_divide_it_and_have_shards(streamed: Callable[..., Streamed]) -> None:
    assert [lanes_of(12, SHARDS, most) for most in (1, 4, 5, 64)] == [1, 4, 4, 6]
    assert lanes_of(2048, 10_000, 512) == 512
    assert streamed("data.workers=3").stream.describe(batch=12, processes=2) == "shards     6, 6 at once"
    shared = streamed("data.workers=3").stream.describe(batch=12, processes=4)
    assert shared == "shards     6, 6 at once; 2 loader processes read the same one, see data.stream_lanes"


def test_a_position_of_other_lanes_is_an_error(streamed: Callable[..., Streamed]) -> None:
    places = read(streamed("stage2.steps=1"))[0]["places"]
    with pytest.raises(UserError, match=r"data\.stream_lanes: 6 lanes of this run were read, .* would be 3; give"):
        read(streamed("data.stream_lanes=3"), first=1, **places)


def test_what_can_not_be_streamed_is_an_error(streamed: Callable[..., Streamed], tmp_path: Path) -> None:
    (tmp_path / "loose").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "loose/a.png")
    (tmp_path / "loose/a.txt").write_text("a")
    with pytest.raises(UserError, match=r"data\.streaming: .*a caption file beside each image; set it to false"):
        streamed(f"data.source={tmp_path / 'loose'}")
    with pytest.raises(UserError, match=r"it needs data\.buckets=null and data\.cache=none"):
        streamed("data.cache=disk")
