"""Import this before torch: on a busy machine, it has OpenMP's idle threads sleep instead of spin.

An idle thread spins for some milliseconds, to be quick at the next operation. With more threads and other programs than
cores, it takes the core that a working thread needs. Training on two cores (AVX2) with two threads, in images/s: with
one other busy program 22, or 45 with `GOMP_SPINCOUNT=0`; on an idle machine 70, or 57. The variable must be set before
libgomp is loaded, so the choice is made when a command starts. From here on Ctrl-C is one line, also during imports.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from ldm.utils.interrupt import install_hook

USER_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # either one overrides the choice made here
SECONDS = 0.1  # over which the load is measured


def own_cpus() -> set[int]:
    """The numbers of the CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def busy_cores(seconds: float = SECONDS, file: Path = Path("/proc/stat")) -> float:
    """How many of this process's cores other programs use, measured while it sleeps; 0 where unknown."""
    names = {f"cpu{number}" for number in own_cpus()}

    def ticks() -> tuple[int, int]:
        """Busy and idle ticks, summed over these cores."""
        lines = [line.split() for line in file.read_text().splitlines() if line.startswith("cpu")]
        cores = {name: [*map(int, numbers)] for name, *numbers in lines}
        counted = names if names <= cores.keys() else {"cpu"}  # the total, if a container numbers its CPUs differently
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


def disable_spinning_if_busy() -> None:
    """Sets `GOMP_SPINCOUNT=0` where this process's threads and other programs need more cores than there are."""
    cores = len(own_cpus())
    num_threads = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(num_threads) if num_threads.isdigit() else cores
    if threads > 1 and not any(name in os.environ for name in USER_SETTINGS) and threads + busy_cores() > cores + 0.5:
        os.environ["GOMP_SPINCOUNT"] = "0"


def threads_with_a_core(threads: int, seconds: float = 0.5) -> int:
    """How many of so many threads have a core to themselves, beside other programs; one at least.

    Threads wait for each other at every operation: with one of two cores busy, two took 5.0 s for a step that one took
    1.1 s for, and two idle cores 0.65 s (AVX512-bf16).
    """
    return 1 if threads == 1 else max(1, min(threads, int(len(own_cpus()) - busy_cores(seconds) + 0.5)))


install_hook()
disable_spinning_if_busy()
