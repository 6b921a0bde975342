"""What a network folder and other machines bring: clocks that differ, files that are cut short."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from of_config import cached, indexed

from ldm.config import loader
from ldm.config.schema import Stage1Config
from ldm.data import column_store
from ldm.data.column_store import UNUSED
from ldm.models import autoencoder
from ldm.utils.atomic_files import file_system_time
from ldm.utils.errors import UserError

JUMPS = (-86_400, 0, 7_200, 10 * 365 * 86_400)  # seconds that a machine's clock is ahead of the file server's


@pytest.fixture
def config(root: Path, three_shapes: Callable[[list[str]], Path]) -> loader.Config:
    """Twelve images."""
    folder = three_shapes([f"image {i}" for i in range(12)])
    overrides = [f"run.dir={folder.parent / 'run'}", f"data.source={folder}", "data.size=16", "data.buckets=null"]
    return loader.load(root / "configs/tiny.yaml", overrides)


def encode(config: loader.Config) -> list[torch.Tensor]:
    """The cached means of the latents, encoded where they are missing."""
    torch.manual_seed(0)
    shape = Stage1Config(channels=(16, 16), layers=1, latent_channels=2, norm_num_groups=8, mid_attention=False)
    index = indexed(config)
    built = cached(index, config, autoencoder.Autoencoder(autoencoder.build(shape, 16)), None, per_file=5)
    (store,) = built.latents.values()
    return [store[entry.sha256]["mean"] for entry in index]


# -------------------------------------------------------------------------------------------------------------- clocks


@pytest.mark.parametrize("ahead", JUMPS)
def test_what_another_run_may_be_writing_is_kept_whatever_the_clock_of_this_machine(
    config: loader.Config, ahead: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(config)
    index = next(config.cache_dir.glob("index-*.arrow"))
    lookup = next(path for path in (config.cache_dir / "lookups").iterdir() if path.is_dir())
    columns = next(config.cache_dir.glob("columns-*"))
    in_use, left = {}, {}
    for others, age in ((in_use, 0), (left, UNUSED + 60)):
        name = f"{age:016}"
        for path in (
            index.with_name(f".{index.name}.{name}"),
            lookup.with_name(f"{lookup.name.rpartition('-')[0]}-{name}"),
            columns.with_name(f"{columns.name.rpartition('-')[0]}-{name}"),
        ):
            path.touch() if path.suffix == f".{name}" else path.mkdir()
            then = file_system_time(config.cache_dir) - age
            os.utime(path, (then, then))
            others[path.name] = path
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + ahead)
    encode(config)
    assert all(path.exists() for path in in_use.values())
    assert not [name for name, path in left.items() if path.exists()]


def test_a_folder_that_may_not_be_written_keeps_what_is_old(
    config: loader.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(config)
    columns = next(config.cache_dir.glob("columns-*"))
    old = columns.with_name(f"{columns.name.rpartition('-')[0]}-{0:016}")
    old.mkdir()
    os.utime(old, (0, 0))
    monkeypatch.setattr(column_store, "file_system_time", Mock(side_effect=PermissionError))
    encode(config)
    assert old.exists()


def test_the_time_of_a_file_system_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "time", lambda: 0.0)
    before = file_system_time(tmp_path)
    (tmp_path / "a").touch()
    assert before <= (tmp_path / "a").stat().st_mtime <= file_system_time(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


# ------------------------------------------------------------------------------------------------------ files cut short


def test_a_cut_short_file_of_what_was_made_from_a_cache_is_one_line_or_made_anew(config: loader.Config) -> None:
    expected = encode(config)
    files = [path for path in config.cache_dir.rglob("*") if path.is_file() and path.suffix != ".png"]
    assert {path.suffix for path in files} >= {".arrow", ".json", ".npy", ".safetensors"}
    for number, path in enumerate(sorted(files)):
        whole = path.read_bytes()
        size = (0, len(whole) // 2, len(whole) - 1)[number % 3]
        path.write_bytes(whole[:size])
        try:
            latents = encode(config)
        except UserError as error:
            assert re.fullmatch(rf"data\.cache_dir: can't read {re.escape(str(path))} \(.+\); [^\n]+", str(error))
            path.unlink()  # as the line says
            latents = encode(config)
        assert all(map(torch.equal, latents, expected)), f"{path} of {size} bytes"
        path.write_bytes(whole)  # what is read only to encode may not have been noticed
