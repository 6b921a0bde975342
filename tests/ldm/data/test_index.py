"""The index of images: built by one process or several, from an older index, and with any amount of text."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from forked import Forked
from of_config import indexed

from ldm.config import loader
from ldm.data import fingerprint, index, index_file
from ldm.data.arrow_columns import leading_bytes, take_rows
from ldm.data.index import Index
from ldm.data.index_schema import SCHEMA
from ldm.data.index_table import IndexTable

Start = Callable[..., Forked]
Finish = Callable[[Forked], str]
GIB = 2**30


@pytest.fixture
def folder(three_shapes: Callable[[list[str]], Path]) -> Path:
    """Thirty images, of which one is bad."""
    images = three_shapes([f"image {i}" for i in range(30)])
    (images / "17.png").write_bytes(b"bad")
    return images


def overrides(folder: Path, name: str) -> list[str]:
    return [
        f"run.dir={folder.parent / 'run'}",
        f"data.source={folder}",
        "data.size=16",
        "data.flip=true",
        f"data.cache_dir={folder.parent / name}",
        "data.workers=0",
    ]


def settings(root: Path, folder: Path, name: str = "alone") -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", overrides(folder, name))


def index_path(cache: Path) -> Path:
    """The path of the only index in a cache."""
    (path,) = [path for path in cache.iterdir() if "index" in path.name]
    return path


def with_32_bit_offsets(kind: pa.DataType) -> pa.DataType:
    """A type with 32-bit offsets, which older indices had."""
    if pa.types.is_large_list(kind):
        return pa.list_(with_32_bit_offsets(kind.value_type))
    return pa.string() if pa.types.is_large_string(kind) else kind


def test_an_index_with_32_bit_offsets_is_converted_without_opening_an_image(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = settings(root, folder)
    known = indexed(config).fingerprint()
    path = index_path(config.cache_dir)
    current, table = path.read_bytes(), pa.ipc.open_stream(path.read_bytes()).read_all()
    older = pa.schema([(field.name, with_32_bit_offsets(field.type)) for field in SCHEMA])
    assert older != SCHEMA
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, older) as writer:
        writer.write_table(table.cast(older))
    monkeypatch.setattr(index_file, "_read_image", lambda *_: pytest.fail("an image was opened"))
    rebuilt = indexed(config)
    assert (rebuilt.fingerprint(), rebuilt.bad_count()) == (known, 1)
    assert path.read_bytes() == current


def test_an_index_is_memory_mapped(root: Path, folder: Path) -> None:
    path = index_path(indexed(settings(root, folder)).data.cache_dir or folder)
    held = pa.total_allocated_bytes()
    table = pa.Table.from_batches(index_file.memory_map(path), SCHEMA)
    assert len(table) == 30
    assert pa.total_allocated_bytes() == held


def rows(count: int, **fields: Any) -> pa.RecordBatch:
    """`count` equal rows; `fields` replace the defaults."""
    row = {
        "key": "a",
        "file": "a.png",
        "start": 0,
        "size": -1,
        "captions": ["a hat"],
        "label": "",
        "split": "train",
        "weight": 1.0,
        "repeats": 1,
        "source": 0,
        "stamp": bytes(16),
        "width": 16,
        "height": 16,
        **fields,
    }
    columns = {field.name: pa.repeat(pa.scalar(row.get(field.name), field.type), count) for field in SCHEMA}
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=SCHEMA)


@pytest.mark.slow
def test_an_index_may_hold_more_than_2_gib_of_text(root: Path, folder: Path) -> None:
    caption, count = "x" * (GIB // 16), 33  # every row shares the same memory
    batch = rows(1, captions=[caption], key=caption)
    built = Index(IndexTable(pa.Table.from_batches([batch] * count, SCHEMA)), None, settings(root, folder).data)  # type: ignore[arg-type]
    assert sum(len(captions[0]) for captions in built.captions()) == count * len(caption) > 2 * GIB
    assert [len(key) for key in built.first(2).column("key")] == [len(caption)] * 2


@pytest.mark.slow
def test_leading_bytes_of_more_than_2_gib_of_hashes() -> None:
    rows_per_chunk, chunks = 2**20, 65
    hashes = np.random.default_rng(0).integers(0, 256, (rows_per_chunk, 32), np.uint8)
    chunk = pa.Array.from_buffers(pa.binary(32), rows_per_chunk, [None, pa.py_buffer(hashes)])
    starts = leading_bytes(pa.chunked_array([chunk] * chunks), 4)
    assert len(starts) * 32 > 2 * GIB
    for i in range(chunks):
        assert (starts[i * rows_per_chunk : (i + 1) * rows_per_chunk] == hashes[:, :4]).all()


def test_rows_are_taken_in_the_given_order() -> None:
    column = pa.chunked_array([[], ["a", "b"], [], ["c"], ["d", "e", "f"]], pa.string())
    rng = np.random.default_rng(0)
    for order in (np.arange(6), rng.permutation(6), np.array([5, 0, 0, 3, 2]), np.zeros(0, int)):
        values = [value for part in take_rows(column, order) for value in part.to_pylist()]
        assert values == ["abcdef"[i] for i in order]
    assert not list(take_rows(pa.chunked_array([], pa.string()), np.zeros(0, int)))


def reference_fingerprint(built: Index) -> str:
    """The fingerprint of a model without classes, entry by entry."""
    digest = hashlib.sha256()
    for entry in built:
        row = (entry.sha256, entry.weight, entry.repeats, entry.flip, entry.dropout, entry.label)
        digest.update(repr((list(entry.captions), *row)).encode())
    return digest.hexdigest()


def test_what_follows_from_an_index_is_computed_once_and_mapped(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = loader.load(root / "configs/tiny.yaml", [*overrides(folder, "columns"), "data.buckets={step: 8}"])
    first = indexed(config).select("train")
    assert first.fingerprint() == reference_fingerprint(first)
    monkeypatch.setattr(index, "draw_table", lambda *_: pytest.fail("draws were computed again"))
    monkeypatch.setattr(Index, "captions", lambda *_: pytest.fail("captions were read again"))
    second = indexed(config).select("train")
    assert (second.fingerprint(), list(second.sizes)) == (first.fingerprint(), list(first.sizes))
    table = second.draws()
    assert sum(draws.size for draws in table.draws) == len(second) == 29
    for array in (second.rows, table.members):
        assert isinstance(array.base, np.memmap)


def fingerprint_of(table: pa.Table, order: np.ndarray | None = None) -> str:
    digest = hashlib.sha256()
    for part in fingerprint.fingerprint_bytes(table, np.arange(len(table)) if order is None else order):
        digest.update(part)
    return digest.hexdigest()


def test_the_fingerprint_of_many_images_is_that_of_their_values_in_their_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fingerprint, "MAX_SINGLE", 0)
    monkeypatch.setattr(fingerprint, "BLOCK", 3)
    fields = {
        "captions": (["a"], ["a", "b"], ["ab"], ["é"], ["", "c"]),
        "sha256": tuple(bytes([n]) * 32 for n in range(5)),
        "flip": (None, True, False, None, True),
        "dropout": (None, 0.0, 0.5, None, 1.0),
        "label": ("", "x", "", "y", "x"),
        "mask_sha256": (None, b"m" * 32, None, b"n" * 32, None),
    }

    def table(**others: Any) -> pa.Table:
        columns = {**fields, **others}
        records = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        return pa.Table.from_batches([rows(1, **row) for row in records], SCHEMA)

    expected = fingerprint_of(table())
    for chunked in (table().combine_chunks(), pa.concat_tables([table()[:2].combine_chunks(), table()[2:]])):
        assert fingerprint_of(chunked) == expected  # however the rows are stored
    parts = table().combine_chunks()
    assert fingerprint_of(pa.concat_tables([parts[3:], parts[:3]]), np.array([2, 3, 4, 0, 1])) == expected
    others = [
        {"captions": (["a"], ["a"], ["b", "ab"], ["é"], ["", "c"])},
        {"captions": (["a"], ["a", "b"], ["a", "b"], ["é"], ["", "c"])},
        {"captions": (["a"], ["a", "b"], ["ab"], ["é"], ["c", ""])},
        {"flip": (False, True, None, None, True)},
        {"dropout": (0.0, 0.0, 0.5, None, 1.0)},
        {"label": ("", "", "x", "y", "x")},
        {"mask_sha256": (b"m" * 32, None, None, b"n" * 32, None)},
        {"weight": (1.0, 1.0, 1.0, 1.0, 2.0)},
        {"repeats": (1, 2, 1, 1, 1)},
    ]
    known = {expected, fingerprint_of(table(), np.arange(4)), fingerprint_of(table(), np.array([1, 0, 2, 3, 4]))}
    assert len(known | {fingerprint_of(table(**other)) for other in others}) == 3 + len(others)


def test_columns_of_other_images_are_other_files(root: Path, folder: Path) -> None:
    fingerprints = [indexed(settings(root, folder)).fingerprint()]
    (folder / "03.txt").write_text("another caption")
    changed = indexed(settings(root, folder))
    assert changed.fingerprint() == reference_fingerprint(changed) != fingerprints[0]
    assert len(list((folder.parent / "alone").glob("columns-*"))) == 2
    (folder / "03.txt").write_text("image 3")
    assert indexed(settings(root, folder)).fingerprint() == fingerprints[0]


def test_selections_are_those_of_their_rows(root: Path, folder: Path) -> None:
    config = loader.load(root / "configs/tiny.yaml", [*overrides(folder, "splits"), "data.val_fraction=0.3"])
    built = indexed(config)
    unnamed = Index(built.table, built.sources, built.data, built.rows)  # selects by looking at each row
    for splits in (("train",), ("reconstruction",), ("train", "reconstruction"), ("prior",), ("train", "prior")):
        selected = built.select(*splits)
        assert selected.rows.tolist() == unnamed.select(*splits).rows.tolist()
        assert selected.fingerprint() == reference_fingerprint(selected)
        assert {entry.split for entry in selected} == set(selected.column("split").tolist()) <= set(splits)
    assert 0 < len(built.select("reconstruction")) < len(built) == 29


def test_an_index_has_few_chunks_for_any_number_of_rows(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "CHUNK", 2)
    monkeypatch.setattr(index_file, "CHUNKS", 4)
    built = indexed(settings(root, folder))
    assert [len(chunk) for chunk in built.table["key"].chunks] == [8, 8, 8, 6]
    assert [entry.key for entry in built] == [f"{i:02}.png" for i in range(30) if i != 17]


# -------------------------------------------------------------------------------------------------- several processes

PROCESSES = """
import json
import socket
import sys
from pathlib import Path
from accelerate import PartialState
sys.path.insert(0, sys.argv[1])
from ldm.config import loader
from ldm.data import cache, index, index_file, openmoji
from ldm.data.crops import Augmentation, Crop
from ldm.data.sources import Sources
from ldm.distributed import consensus
from ldm.models import autoencoder
from ldm.utils.errors import UserError
from ldm.config.schema import Stage1Config
import torch

state = PartialState(cpu=True)
assert state.num_processes == 2
second = state.process_index == 1
folder, tiny, results = Path(sys.argv[2]), str(Path(sys.argv[1]) / "configs/tiny.yaml"), {}
index_file.CHUNK = index_file.PREFETCH = 4
consensus.WAITS = (0.05, 0.1)

def settings(name, *overrides):
    return loader.load(tiny, [*sys.argv[3:], f"data.cache_dir={folder.parent / name}", *overrides])

def attempt(name, action, owner=None, function="", replacement=None):
    '''Records what an action returns, or its error; `owner.function` is replaced meanwhile.'''
    original = getattr(owner, function) if owner else None
    if owner:
        setattr(owner, function, replacement)
    try:
        results[name] = action()
    except UserError as error:
        results[name] = f"error: {error}"
    if owner:
        setattr(owner, function, original)

opened, read_image, records = [], index_file._read_image, Sources.records

def count_opened(*args):
    opened.append(args[1].location.file)
    return read_image(*args)

index_file._read_image = count_opened

def build_index(name, *overrides):
    opened.clear()
    config = settings(name, *overrides)
    result = index.build(config.data, config.cache_dir, config.stage2.conditions)
    return [len(opened), len(result), result.bad_count(), result.fingerprint()]

def fails_midway(sources, number):
    '''A listing that fails in one process.'''
    for i, item in enumerate(records(sources, number)):
        if second and i == 26:
            raise UserError("data.source: can't list it; let it be read")
        yield item

def one_short(sources, number):
    listed = list(records(sources, number))
    return iter(listed[:-1] if second else listed)

def reversed_order(sources, number):
    listed = list(records(sources, number))
    return iter(listed[::-1] if second else listed)

hostname = socket.gethostname
socket.gethostname = lambda: f"machine {state.process_index}"
attempt("index", lambda: build_index("shared"))
attempt("unchanged", lambda: build_index("shared"))
attempt("failed midway", lambda: build_index("failed"), Sources, "records", fails_midway)
attempt("continued", lambda: build_index("failed"))
attempt("one short", lambda: build_index("listings"), Sources, "records", one_short)
attempt("reversed order", lambda: build_index("listings"), Sources, "records", reversed_order)
attempt("not shared", lambda: build_index("rank-1" if second else "rank-0"))
memory_map = index_file.memory_map

def other_content(path):
    return memory_map(path)[second:]

attempt("different content", lambda: build_index("rank-0"), index_file, "memory_map", other_content)
attempt("repaired", lambda: build_index("rank-0"))

listed = []

def count_listed(sources, number):
    listed.append(number)
    return records(sources, number)

def lister_fails(sources, number):
    for i, item in enumerate(records(sources, number)):
        if i == 26:
            raise UserError("data.source: can't list it; let it be read")
        yield item

def full_disk(path, rows):
    next(rows)
    raise UserError("data.cache_dir: full; free some")

socket.gethostname = hostname
attempt("one machine", lambda: build_index("machine"), Sources, "records", count_listed)
results["listed"] = len(listed)
content_of = lambda name: [path.read_bytes() for path in (folder.parent / name).glob("index-*")]
results["same bytes"] = content_of("machine") == content_of("shared")
attempt("lister fails", lambda: build_index("lister"), Sources, "records", lister_fails)
write = full_disk if second else index_file._write
attempt("a reader fails", lambda: build_index("reader"), index_file, "_write", write)
image, content = folder / "05.png", (folder / "05.png").read_bytes()
state.wait_for_everyone()
if not second:
    image.write_bytes((folder / "06.png").read_bytes())
state.wait_for_everyone()
attempt("a file changed", lambda: build_index("machine"))
state.wait_for_everyone()
if not second:
    image.write_bytes(content)
state.wait_for_everyone()

drawings, rendered, atomic_file = openmoji.drawings, [], openmoji.atomic_file
openmoji.drawings = lambda subset: drawings(subset)[:10]
openmoji.atomic_file = lambda path: rendered.append(path) or atomic_file(path)
attempt("openmoji", lambda: build_index("openmoji", "data.source=openmoji-demo")[1:])
results["rendered"] = len(rendered)

torch.manual_seed(0)
shape = Stage1Config(channels=(16, 16), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False)
vae = autoencoder.Autoencoder(autoencoder.build(shape, 16))
config = settings("shared")
entries = index.build(config.data, config.cache_dir, config.stage2.conditions)
options = cache.CacheOptions.of(config.data, config.cache_dir)

def latent_sums():
    store = cache.build(entries, Augmentation.of(config.data), options, vae, None, per_file=6)
    crops = [Crop(size, flip=True) for size in entries.sizes]
    return [float(store.latent(crop, entry.sha256)[0].sum()) for crop, entry in zip(crops, entries)]

open_path = Path.open

def hide_safetensors(path, *args, **options):
    if second and path.suffix == ".safetensors":
        raise FileNotFoundError(path)
    return open_path(path, *args, **options)

attempt("latents", latent_sums, Path, "glob", lambda path, name: iter(()))  # as if directory listings were stale
attempt("latents again", latent_sums)
attempt("hidden files", latent_sums, Path, "open", hide_safetensors)
results["files"] = sorted(path.name for path in (folder.parent / "shared/latents").rglob("*.safetensors"))
(folder.parent / f"{state.process_index}.json").write_text(json.dumps(results))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.fixture
def results(root: Path, folder: Path, launch: Start, finish: Finish, tmp_path: Path) -> list[dict[str, Any]]:
    """The results that the two processes of the script recorded, by rank."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    finish(launch(script, root, folder, *overrides(folder, "none"), processes=2))
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_processes_share_an_index_and_a_cache_or_all_fail_with_the_same_error(
    root: Path, folder: Path, results: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "CHUNK", 4)
    alone = indexed(settings(root, folder))
    everything = [29, 1, alone.fingerprint()]
    # Each process opened its own chunks of 4; the index has the same bytes as one process's, and no part is left over.
    assert [result["index"] for result in results] == [[16, *everything], [14, *everything]]
    assert index_path(tmp_path / "shared").read_bytes() == index_path(tmp_path / "alone").read_bytes()
    assert [result["unchanged"] for result in results] == [[0, *everything]] * 2
    # The failure of one process ends all, and images that were read before it are not opened again.
    assert [result["failed midway"] for result in results] == ["error: data.source: can't list it; let it be read"] * 2
    assert sum(result["continued"][0] for result in results) <= 30 - 16 - 8
    assert [result["continued"][1:] for result in results] == [everything] * 2
    # All processes must list the same images and see the same files.
    elsewhere = "on a file system that all machines share"
    for name, prefix in (
        ("one short", "data.source: process 1 lists other images than process 0 (29 and 30); put them"),
        ("reversed order", "data.source: process 1 lists other images than process 0 (30 and 30); put them"),
        ("not shared", "data.cache_dir: process 1, on "),
        ("different content", "data.cache_dir: the processes read different things in "),
        ("hidden files", "data.cache_dir: process 1, on "),
    ):
        first, second = (result[name] for result in results)
        assert first == second
        assert first.startswith(f"error: {prefix}")
        assert elsewhere in first
        assert "\n" not in first
    assert [result["repaired"] for result in results] == [[0, *everything]] * 2
    # On one machine, one process lists for both; each opens the same images as before, and a change is noticed.
    assert [result["listed"] for result in results] == [1, 0]
    assert [result["one machine"] for result in results] == [[16, *everything], [14, *everything]]
    assert [result["same bytes"] for result in results] == [True] * 2
    assert [result["lister fails"] for result in results] == ["error: data.source: can't list it; let it be read"] * 2
    assert [result["a reader fails"] for result in results] == ["error: data.cache_dir: full; free some"] * 2
    assert [result["a file changed"][:3] for result in results] == [[0, 29, 1], [1, 29, 1]]
    assert results[0]["a file changed"] == [0, *results[1]["a file changed"][1:]] != [0, *everything]
    # Only the main process renders the drawings.
    assert [result["rendered"] for result in results] == [10, 0]
    assert [result["openmoji"][:2] for result in results] == [[10, 0]] * 2
    # Each process reads what the other wrote, even if directory listings are stale.
    first, second = results
    assert first["latents"] == second["latents"] == first["latents again"] == second["latents again"]
    assert len(first["latents"]) == 29
    assert len(first["files"]) > 6
