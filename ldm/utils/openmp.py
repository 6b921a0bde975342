"""To be imported before torch: where other programs keep the cores busy, OpenMP's threads wait asleep, not spinning.

A thread that has done its part of an operation spins for some milliseconds, lest it be late for the next one. Where
threads and other programs are more than the cores, it spins on the core that a slower one needs. Measured, two threads
on two cores, AVX2: with one other busy program 22 images/s of training, and 45 with `GOMP_SPINCOUNT=0`; on an idle
machine 70, and 57. It can only be set before libgomp is loaded, so it is decided when a command starts.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

CHOSEN = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # by which a person may have decided
SECONDS = 0.1  # in which the load is measured


def own_cpus() -> set[int]:
    """The numbers of those that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def busy_cores(seconds: float = SECONDS, file: Path = Path("/proc/stat")) -> float:
    """Of this process's cores, those that other programs keep busy, as far as the system tells: measured asleep."""
    names = {f"cpu{number}" for number in own_cpus()}

    def ticks() -> tuple[int, int]:
        """Busy and idle, of these cores together."""
        lines = [line.split() for line in file.read_text().splitlines() if line.startswith("cpu")]
        cores = {name: [*map(int, numbers)] for name, *numbers in lines}
        counted = names if names <= cores.keys() else {"cpu"}  # all, where a container's have other numbers
        busy = idle = 0
        for user, nice, system, free, waiting, *more in (cores[name] for name in counted):
            busy, idle = busy + user + nice + system + sum(more[:3]), idle + free + waiting
        return busy, idle

    try:
        before = ticks()
        time.sleep(seconds)
        busy, idle = (now - then for now, then in zip(ticks(), before, strict=True))
    except (OSError, ValueError, KeyError):  # not on Linux
        return 0.0
    return busy / max(1, busy + idle) * len(names)


def wait_asleep_where_busy() -> None:
    """Sets `GOMP_SPINCOUNT=0` where this process's threads and other programs are more than the cores."""
    cores = len(own_cpus())
    told = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(told) if told.isdigit() else cores
    if threads > 1 and not any(name in os.environ for name in CHOSEN) and threads + busy_cores() > cores + 0.5:
        os.environ["GOMP_SPINCOUNT"] = "0"


wait_asleep_where_busy()
