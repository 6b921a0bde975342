"""Ctrl-C during a command's imports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from ldm.utils.interrupt import MESSAGE, was_interrupted

MODULES = ["train_ldm", "ldm.cli.txt2img", "stage1_vae.suitability"]


def run(root: Path, folder: Path, module: str, source: str) -> subprocess.CompletedProcess[str]:
    """Imports a command's module with numpy, yaml and torch replaced by modules whose code is `source`."""
    for name in ("numpy", "yaml", "torch"):
        (folder / f"{name}.py").write_text(source)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), str(root)]), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", f"import {module}"], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("after", ["", "    raise ImportError('a library hides the reason')"])
def test_an_interrupt_during_imports_is_one_line(root: Path, tmp_path: Path, module: str, after: str) -> None:
    # a shell starts what runs in the background with SIGINT ignored
    source = "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"
    source += "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    import time; time.sleep(9)\n"
    completed = run(root, tmp_path, module, f"{source}except KeyboardInterrupt:\n{after or '    raise'}\n")
    assert (completed.returncode, completed.stdout, completed.stderr) == (130, "", f"{MESSAGE}\n")


def test_other_errors_keep_their_traceback(root: Path, tmp_path: Path) -> None:
    completed = run(root, tmp_path, "train_ldm", "raise ImportError('broken')")
    assert completed.returncode == 1 and "Traceback" in completed.stderr and "broken" in completed.stderr


def test_an_interrupt_is_recognized_as_the_cause_of_another_error() -> None:
    error = ImportError()
    error.__context__ = ValueError()
    assert not was_interrupted(error)
    error.__context__.__cause__ = KeyboardInterrupt()
    assert was_interrupted(error) and not was_interrupted(None)
