"""Which cores other programs use, and how many threads that leaves. No torch is imported unless threads are set."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

SECONDS = 0.1  # over which the load is measured
LONGER = 0.5  # where a run's threads depend on it


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


def threads_with_a_core(threads: int, seconds: float = LONGER) -> int:
    """How many of so many threads have a core to themselves while other programs run; one at least.

    Threads wait for each other at every operation: with one of two cores busy, two took 5.0 s for a step that one took
    1.1 s for, and two idle cores 0.65 s (AVX512-bf16).
    """
    if threads == 1 or (busy := busy_cores(seconds)) < 0.5:
        return threads
    return max(1, min(threads, int(len(own_cpus()) - busy + 0.5)))


def limit_threads() -> int:
    """Has torch take no more threads than have a core to themselves, and says so; returns how many."""
    import torch

    before = torch.get_num_threads()
    threads = threads_with_a_core(before)
    if threads < before:
        torch.set_num_threads(threads)
        print(f"threads  {threads} of {before}: other programs use the other cores", file=sys.stderr, flush=True)
    return threads
