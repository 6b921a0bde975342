"""The index of pictures: made by one process or several, over an older one, and of any amount of text."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from forked import Process
from of_config import indexed

from ldm.config import loader
from ldm.data import index, index_file
from ldm.data.index import Index
from ldm.data.index_file import SCHEMA

Start = Callable[..., Process]
Finish = Callable[[Process], str]
GIB = 2**30


@pytest.fixture
def folder(three_shapes: Callable[[list[str]], Path]) -> Path:
    """Thirty pictures, and one that is bad."""
    made = three_shapes([f"picture {i}" for i in range(30)])
    (made / "17.png").write_bytes(b"bad")
    return made


def overrides(folder: Path, name: str) -> list[str]:
    return [
        f"run.dir={folder.parent / 'run'}",
        f"data.source={folder}",
        "data.size=16",
        "data.flip=true",
        f"data.cache_dir={folder.parent / name}",
        "data.workers=0",
    ]


def settings(root: Path, folder: Path, name: str = "one") -> loader.Config:
    return loader.load(root / "configs/tiny.yaml", overrides(folder, name))


def written(cache: Path) -> Path:
    """The only index of a cache."""
    (path,) = [path for path in cache.iterdir() if "index" in path.name]
    return path


def narrow(kind: pa.DataType) -> pa.DataType:
    """A type with offsets of 32 bits, as indices had them."""
    if pa.types.is_large_list(kind):
        return pa.list_(narrow(kind.value_type))
    return pa.string() if pa.types.is_large_string(kind) else kind


def test_an_index_with_offsets_of_32_bits_is_taken_over_without_opening_a_picture(
    root: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(root, folder)
    before = indexed(given).fingerprint()
    path = written(given.cache_dir)
    now, table = path.read_bytes(), pa.ipc.open_stream(path.read_bytes()).read_all()
    older = pa.schema([(field.name, narrow(field.type)) for field in SCHEMA])
    assert older != SCHEMA
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, older) as writer:
        writer.write_table(table.cast(older))
    monkeypatch.setattr(index_file, "_read_image", lambda *_: pytest.fail("a picture was opened"))
    found = indexed(given)
    assert (found.fingerprint(), found.bad_count()) == (before, 1)
    assert path.read_bytes() == now


def test_an_index_is_memory_mapped(root: Path, folder: Path) -> None:
    path = written(indexed(settings(root, folder)).data.cache_dir or folder)
    held = pa.total_allocated_bytes()
    table = pa.Table.from_batches(index_file._memory_map(path), SCHEMA)
    assert len(table) == 30
    assert pa.total_allocated_bytes() == held


def rows(count: int, **facts: Any) -> pa.RecordBatch:
    """So many pictures, all alike."""
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
        **facts,
    }
    columns = {field.name: pa.repeat(pa.scalar(row.get(field.name), field.type), count) for field in SCHEMA}
    return pa.RecordBatch.from_arrays(list(columns.values()), schema=SCHEMA)


@pytest.mark.slow
def test_an_index_may_hold_more_than_2_gib_of_text(root: Path, folder: Path) -> None:
    caption, count = "x" * (GIB // 16), 33  # many times the same memory
    one = rows(1, captions=[caption], key=caption)
    found = Index(pa.Table.from_batches([one] * count, SCHEMA), None, settings(root, folder).data)  # type: ignore[arg-type]
    assert sum(len(captions[0]) for captions in found.captions()) == count * len(caption) > 2 * GIB
    assert [len(key) for key in found.first(2).column("key")] == [len(caption)] * 2


@pytest.mark.slow
def test_more_sha256_than_fit_in_2_gib_are_drawn_from() -> None:
    many, times = 2**20, 65
    drawn = np.random.default_rng(0).integers(0, 256, (many, 32), np.uint8)
    one = pa.Array.from_buffers(pa.binary(32), many, [None, pa.py_buffer(drawn)])
    starts = index_file.leading_bytes(pa.chunked_array([one] * times), 4)
    assert len(starts) * 32 > 2 * GIB
    for i in range(times):
        assert (starts[i * many : (i + 1) * many] == drawn[:, :4]).all()


def test_rows_are_taken_in_the_order_that_is_asked_for() -> None:
    column = pa.chunked_array([[], ["a", "b"], [], ["c"], ["d", "e", "f"]], pa.string())
    rng = np.random.default_rng(0)
    for asked in (np.arange(6), rng.permutation(6), np.array([5, 0, 0, 3, 2]), np.zeros(0, int)):
        found = [value for part in index._take_rows(column, asked) for value in part.to_pylist()]
        assert found == ["abcdef"[i] for i in asked]
    assert not list(index._take_rows(pa.chunked_array([], pa.string()), np.zeros(0, int)))


# -------------------------------------------------------------------------------------------------- several processes

PROCESSES = """
import json
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
folder, tiny, told = Path(sys.argv[2]), str(Path(sys.argv[1]) / "configs/tiny.yaml"), {}
index_file.CHUNK = index_file.PREFETCH = 4
consensus.WAITS = (0.05, 0.1)

def settings(name, *overrides):
    return loader.load(tiny, [*sys.argv[3:], f"data.cache_dir={folder.parent / name}", *overrides])

def attempt(name, action, owner=None, function="", instead=None):
    '''Tells what an action gives, or its error, perhaps with another function in the place of one.'''
    was = getattr(owner, function) if owner else None
    if owner:
        setattr(owner, function, instead)
    try:
        told[name] = action()
    except UserError as error:
        told[name] = f"error: {error}"
    if owner:
        setattr(owner, function, was)

opened, facts, records = [], index_file._read_image, Sources.records

def counted(*given):
    opened.append(given[1].file)
    return facts(*given)

index_file._read_image = counted

def built(name, *overrides):
    opened.clear()
    given = settings(name, *overrides)
    found = index.build(given.data, given.cache_dir, given.stage2.conditions)
    return [len(opened), len(found), found.bad_count(), found.fingerprint()]

def gives_up(sources, number):
    '''A listing that one process can't read on.'''
    for i, item in enumerate(records(sources, number)):
        if second and i == 26:
            raise UserError("data.source: can't list it; let it be read")
        yield item

def lacks_one(sources, number):
    found = list(records(sources, number))
    return iter(found[:-1] if second else found)

def other_order(sources, number):
    found = list(records(sources, number))
    return iter(found[::-1] if second else found)

attempt("index", lambda: built("two"))
attempt("again", lambda: built("two"))
attempt("given up", lambda: built("given-up"), Sources, "records", gives_up)
attempt("taken up", lambda: built("given-up"))
attempt("lacks one", lambda: built("three"), Sources, "records", lacks_one)
attempt("other order", lambda: built("three"), Sources, "records", other_order)
attempt("not shared", lambda: built("four-too" if second else "four"))
mapped = index_file._memory_map
attempt("another", lambda: built("four"), index_file, "_memory_map", lambda path: mapped(path)[second:])
attempt("after all", lambda: built("four"))

drawings, drawn, whole_file = openmoji.drawings, [], openmoji.whole_file
openmoji.drawings = lambda subset: drawings(subset)[:10]
openmoji.whole_file = lambda path: drawn.append(path) or whole_file(path)
attempt("openmoji", lambda: built("five", "data.source=openmoji-demo")[1:])
told["drawn"] = len(drawn)

torch.manual_seed(0)
shape = Stage1Config(channels=(16, 16), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False)
vae = autoencoder.Autoencoder(autoencoder.build(shape, 16))
given = settings("two")
pictures = index.build(given.data, given.cache_dir, given.stage2.conditions)
options = cache.CacheOptions.of(given.data, given.cache_dir)

def filled():
    kept = cache.build(pictures, Augmentation.of(given.data), options, vae, None, per_file=6)
    views = [Crop(size, flip=True) for size in pictures.sizes]
    return [float(kept.latent(view, each.sha256)[0].sum()) for view, each in zip(views, pictures)]

opens = Path.open

def blind(path, *more):
    if second and path.suffix == ".safetensors":
        raise FileNotFoundError(path)
    return opens(path, *more)

attempt("filled", filled, Path, "glob", lambda path, name: iter(()))  # as if listings were old ones
attempt("filled again", filled)
attempt("blind", filled, Path, "open", blind)
told["files"] = sorted(path.name for path in (folder.parent / "two/latents").rglob("*.safetensors"))
(folder.parent / f"{state.process_index}.json").write_text(json.dumps(told))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.fixture
def told(root: Path, folder: Path, launch: Start, finish: Finish, tmp_path: Path) -> list[dict[str, Any]]:
    """What each of two processes tells of the facts below."""
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    finish(launch(script, root, folder, *overrides(folder, "none"), processes=2))
    return [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.slow
def test_processes_share_an_index_and_a_cache_or_all_say_why_not(
    root: Path, folder: Path, told: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(index_file, "CHUNK", 4)
    alone = indexed(settings(root, folder))
    everything = [29, 1, alone.fingerprint()]
    # Each opened its chunks of 4; the index is the same to the byte, whoever made it, and no part is left over.
    assert [each["index"] for each in told] == [[16, *everything], [14, *everything]]
    assert written(tmp_path / "two").read_bytes() == written(tmp_path / "one").read_bytes()
    assert [each["again"] for each in told] == [[0, *everything]] * 2
    # One's mistake is everybody's, and what was found until then is not opened again.
    assert [each["given up"] for each in told] == ["error: data.source: can't list it; let it be read"] * 2
    assert sum(each["taken up"][0] for each in told) <= 30 - 16 - 8
    assert [each["taken up"][1:] for each in told] == [everything] * 2
    # Each lists the same, and sees the same files.
    elsewhere = "on a file system that all machines share"
    for fact, says in (
        ("lacks one", "data.source: process 1 lists other images than process 0 (29 and 30); put them"),
        ("other order", "data.source: process 1 lists other images than process 0 (30 and 30); put them"),
        ("not shared", "data.cache_dir: process 1, on "),
        ("another", "data.cache_dir: the processes read different things in "),
        ("blind", "data.cache_dir: process 1, on "),
    ):
        first, second = (each[fact] for each in told)
        assert first == second
        assert first.startswith(f"error: {says}")
        assert elsewhere in first
        assert "\n" not in first
    assert [each["after all"] for each in told] == [[0, *everything]] * 2
    # The main process draws, once.
    assert [each["drawn"] for each in told] == [10, 0]
    assert [each["openmoji"][:2] for each in told] == [[10, 0]] * 2
    # What one wrote the other reads, though listings don't show it.
    first, second = told
    assert first["filled"] == second["filled"] == first["filled again"] == second["filled again"]
    assert len(first["filled"]) == 29
    assert len(first["files"]) > 6
