"""The main memory that is free."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil

CGROUPS = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/cgroup")


def available_memory() -> int:
    """Bytes that this process can take without swapping: of the machine, and of its container or job (cgroups v2)."""
    return int(min([psutil.virtual_memory().available, *_left_in_cgroups()]))


def _left_in_cgroups() -> Iterator[int]:
    """What the limits of this process's control groups leave; cached files, which give way, count as free."""
    groups = [line[3:] for line in PROCESS.read_text().splitlines() if line[:3] == "0::"] if PROCESS.exists() else []
    for group in groups:
        path = CGROUPS / group.lstrip("/")
        for folder in (path, *path.parents):
            limit = folder / "memory.max"
            if not limit.exists() or (most := limit.read_text().strip()) == "max":
                continue
            stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            cached = int(stat["active_file"]) + int(stat["inactive_file"])
            yield int(most) - int((folder / "memory.current").read_text()) + cached
