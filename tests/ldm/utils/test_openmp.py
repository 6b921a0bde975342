"""OpenMP threads sleep while they wait if other programs keep the cores busy."""

from __future__ import annotations

import ast
import os
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from ldm.utils import openmp

NO_TORCH = ("benchmark_results.py", "notebook.py", "resume_drill.py")  # commands that don't compute with torch


@pytest.mark.parametrize(
    ("busy", "user_settings", "expected"),
    [
        (0.1, {}, None),
        (1.0, {}, "0"),
        (1.0, {"OMP_NUM_THREADS": "1"}, None),
        (1.0, {"GOMP_SPINCOUNT": "1000"}, "1000"),
        (1.0, {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
    ids=["idle", "busy", "one thread", "spin count set by the user", "policy set by the user"],
)
def test_spinning_is_disabled_only_if_cores_are_busy_and_the_user_set_nothing(
    busy: float, user_settings: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*openmp.USER_SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    for name, value in user_settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(openmp, "busy_cores", lambda: busy)
    openmp.disable_spinning_if_busy()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def stat(*cpus: tuple[int, int, int, int, int, int, int, int]) -> str:
    """The text of /proc/stat: per CPU the ticks of user, nice, system, idle, iowait, irq, softirq and steal."""
    lines = [("cpu", [sum(ticks) for ticks in zip(*cpus, strict=True)]), *((f"cpu{i}", t) for i, t in enumerate(cpus))]
    return "".join(f"{name} {' '.join(map(str, ticks))} 0 0\n" for name, ticks in lines) + "intr 5 0 1\nctxt 9\n"


IDLE = (7, 0, 3, 90, 0, 0, 0, 0)  # ticks at the first reading


@pytest.mark.parametrize(
    ("own", "expected"),
    [({0, 1}, 0.0), ({2}, 1.0), ({0, 2}, 1.0), ({1, 3, 4}, 0.75), ({0, 1, 2, 3, 4}, 1.75), ({4, 5}, 0.7)],
    ids=["idle", "busy", "one of two busy", "partly busy", "all cores", "a core that /proc/stat lacks"],
)
def test_busy_cores_counts_only_the_cores_this_process_may_use(
    own: set[int], expected: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = [
        (0, 0, 0, 90, 10, 0, 0, 0),  # waiting for a disk is idle
        (0, 0, 0, 100, 0, 0, 0, 0),
        (60, 10, 10, 0, 0, 5, 5, 10),
        (30, 0, 20, 50, 0, 0, 0, 0),
        (0, 25, 0, 75, 0, 0, 0, 0),
    ]
    file = tmp_path / "stat"
    file.write_text(stat(*[IDLE] * 5))
    after = stat(*(tuple(map(sum, zip(IDLE, delta, strict=True))) for delta in ticks))
    monkeypatch.setattr(time, "sleep", lambda seconds: file.write_text(after) if seconds == 0.3 else None)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: own, raising=False)
    assert openmp.busy_cores(0.3, file) == pytest.approx(expected)


def test_busy_cores_of_others_do_not_disable_spinning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This process may use two idle cores of 64; other programs keep thirty others busy."""
    file = tmp_path / "stat"
    file.write_text(stat(*[IDLE] * 64))
    after = stat(*[(7, 0, 3, 190, 0, 0, 0, 0)] * 34, *[(107, 0, 3, 90, 0, 0, 0, 0)] * 30)
    monkeypatch.setattr(time, "sleep", lambda _: file.write_text(after))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    for name in (*openmp.USER_SETTINGS, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that monkeypatch restores it
        monkeypatch.delenv(name)
    measured = partial(openmp.busy_cores, file=file)
    monkeypatch.setattr(openmp, "busy_cores", measured)
    openmp.disable_spinning_if_busy()
    assert "GOMP_SPINCOUNT" not in os.environ


def test_without_proc_stat_no_core_counts_as_busy(tmp_path: Path) -> None:
    assert openmp.busy_cores(0.0, tmp_path / "stat") == 0


def test_every_command_sets_openmp_before_it_imports_torch(root: Path) -> None:
    commands = [
        path
        for path in [root / "train_ldm.py", *root.glob("s*/*.py")]
        if 'if __name__ == "__main__"' in path.read_text() and path.name not in NO_TORCH
    ]
    assert len(commands) > 10
    for path in commands:
        imports = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
        names = [node.module if isinstance(node, ast.ImportFrom) else node.names[0].name for node in imports]
        others = [name for name in names if str(name).partition(".")[0] not in sys.stdlib_module_names]
        # the __init__ of ldm.cli imports it
        assert others[0] == "ldm.utils.openmp" or others[0].startswith("ldm.cli."), path
    package = ast.parse((root / "ldm/cli/__init__.py").read_text()).body[1]
    assert isinstance(package, ast.Import) and package.names[0].name == "ldm.utils.openmp"
