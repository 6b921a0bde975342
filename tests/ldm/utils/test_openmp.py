"""OpenMP's threads wait asleep where the cores are busy."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.utils import openmp

NO_TORCH = ("ema.py", "benchmark_results.py", "resume_drill.py")  # commands that compute nothing with it


@pytest.mark.parametrize(
    ("busy", "given", "expected"),
    [
        (0.1, {}, None),
        (1.0, {}, "0"),
        (1.0, {"OMP_NUM_THREADS": "1"}, None),
        (1.0, {"GOMP_SPINCOUNT": "1000"}, "1000"),
        (1.0, {"OMP_WAIT_POLICY": "ACTIVE"}, None),
    ],
    ids=["idle", "busy", "one thread", "a count that was chosen", "a policy that was chosen"],
)
def test_threads_spin_unless_the_cores_are_busy_or_a_person_decided(
    busy: float, given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (*openmp.CHOSEN, "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that it comes back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    monkeypatch.setattr(openmp, "busy_cores", lambda: busy)
    openmp.wait_asleep_where_busy()
    assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_busy_cores_are_those_of_other_programs() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        try:
            assert openmp.busy_cores(0.5) > 0.6
        finally:
            other.kill()


def test_where_the_system_does_not_tell_no_core_is_busy(tmp_path: Path) -> None:
    assert openmp.busy_cores(0.0, tmp_path / "stat") == 0


def test_every_command_decides_before_it_imports_torch(root: Path) -> None:
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
        assert others[0] == "ldm.utils.openmp", path
