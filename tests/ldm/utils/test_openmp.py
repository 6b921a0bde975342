"""OpenMP threads sleep while they wait if other programs keep the cores busy."""

from __future__ import annotations

import ast
import os
import sys
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
