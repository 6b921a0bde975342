"""A process that trains in a folder, as far as others can tell: it has the folder's lock."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOLDS = """
import os, sys
from pathlib import Path
from ldm.utils.folder_lock import lock
lock("run.dir", Path(sys.argv[1]))
if not os.fork():
    os.close(1)
    sys.stdin.read()  # as a loader's process, which outlives a killed one for some seconds
    os._exit(0)
print("locked", flush=True)
sys.stdin.read()
"""


@contextmanager
def holder(root: Path, folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock, and a child that it forked."""
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", HOLDS, str(folder)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, text=True, env=environment, **pipes) as process:  # type: ignore[call-overload]
        assert process.stdout.readline() == "locked\n"
        yield process
