"""What tests share: the repository's root, a finished tiny run, a way to call commands as a person does."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState

from ldm import config
from ldm.data import index
from ldm.data.index import Index

os.environ["HF_HUB_OFFLINE"] = "1"  # no test asks a network for anything
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))  # train_ldm.py and scripts/ are files, not packages


@pytest.fixture(autouse=True)
def fresh_accelerator() -> Iterator[None]:
    """accelerate keeps one state a process; each test has its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture
def drawings(tmp_path: Path) -> Callable[..., tuple[config.Config, Index]]:
    """Settings of configs/tiny.yaml at 16 px with overrides, and the index of their pictures."""

    def indexed(*overrides: str) -> tuple[config.Config, Index]:
        settings = config.load(
            ROOT / "configs/tiny.yaml",
            [f"run.dir={tmp_path / 'run'}", "run.tracker=none", "data.size=16", *overrides],
        )
        return settings, index.build(settings)

    return indexed


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, environment: dict[str, str]) -> Path:
    """The folder of an uninterrupted run of configs/tiny.yaml."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    command = [sys.executable, "train_ldm.py", "--config", "configs/tiny.yaml", f"run.dir={folder}"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder
