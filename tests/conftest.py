"""What is set before anything is imported; the order of tests. Their fixtures are in `shared_fixtures`."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import fork_server
import pytest

gc.disable()  # until tests begin: imports and collection make millions of objects, and hardly any garbage
os.environ["HF_HUB_OFFLINE"] = "1"  # no test needs a network; read when huggingface_hub is imported
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # here as in started processes: sums have one order, bits agree

ROOT = Path(__file__).parents[1]
FIRST = ("test_two_stages.py", "test_train.py")  # the longest; the second needs not wait for the tiny run of the first
LONGEST = ("end_to_end", "stage2_diffusion")  # folders of tests that train
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # train_ldm.py and scripts/ are files, not packages


def pytest_configure(config: pytest.Config) -> None:
    """Fixtures import torch, so the process that only distributes tests does without: it starts the others sooner."""
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")
        return
    gc.enable()  # it collects no tests
    if config.getoption("markexpr") != "not slow":  # tests that start processes are slow
        fork_server.start()  # for all workers; it imports while they do


@pytest.hookimpl(tryfirst=True)  # before tests are chosen by their marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a trained run are slow. Files that take longest come first, so that short ones fill the end."""
    for item in items:
        if "tiny_run" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.slow)
    slow = {item.path for item in items if item.get_closest_marker("slow")}

    def rank(item: pytest.Item) -> tuple[bool, bool, int]:
        longest = item.path.parent.name in LONGEST
        first = FIRST.index(item.path.name) if longest and item.path.name in FIRST else len(FIRST)
        return item.path not in slow, not longest, first

    items.sort(key=rank)


def pytest_collection_finish() -> None:
    """Garbage collection, which some code asks for in each step, no longer visits the millions of imported objects."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_unconfigure(config: pytest.Config) -> None:
    """A worker of pytest-xdist, which has sent all reports, ends at once: taking its modules apart takes seconds."""
    if hasattr(config, "workeroutput"):
        sys.stdout.flush()
        os._exit(0)
    gc.unfreeze()  # or libraries report what they find alive at the end as leaks
