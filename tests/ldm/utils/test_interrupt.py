"""Ctrl-C before a command has begun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.utils.interrupt import MESSAGE, was_interrupted

MODULES = ["train_ldm", "ldm.cli.txt2img", "stage1_vae.suitability"]


def run(root: Path, folder: Path, module: str, source: str) -> subprocess.CompletedProcess[str]:
    """Imports a command's module where the library that it imports next, numpy or yaml, is `source`."""
    for name in ("numpy", "yaml", "torch"):
        (folder / f"{name}.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(root)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", f"import {module}"], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("after", ["", "    raise ImportError('a library hides the reason')"])
def test_an_interrupt_during_imports_is_one_line(root: Path, tmp_path: Path, module: str, after: str) -> None:
    source = "import os, signal\ntry:\n    os.kill(os.getpid(), signal.SIGINT)\n    import time; time.sleep(9)\n"
    ended = run(root, tmp_path, module, f"{source}except KeyboardInterrupt:\n{after or '    raise'}\n")
    assert (ended.returncode, ended.stdout, ended.stderr) == (130, "", f"{MESSAGE}\n")


def test_other_errors_keep_their_traceback(root: Path, tmp_path: Path) -> None:
    ended = run(root, tmp_path, "train_ldm", "raise ImportError('broken')")
    assert ended.returncode == 1 and "Traceback" in ended.stderr and "broken" in ended.stderr


def test_a_cause_is_found_and_a_mere_error_is_none() -> None:
    error = ImportError()
    error.__context__ = ValueError()
    assert not was_interrupted(error)
    error.__context__.__cause__ = KeyboardInterrupt()
    assert was_interrupted(error) and not was_interrupted(None)
