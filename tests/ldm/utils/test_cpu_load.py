"""Threads that have a core to themselves while other programs run."""

import os
import time
from pathlib import Path

import pytest

from ldm.utils import cpu_load


@pytest.mark.parametrize(
    ("threads", "busy", "expected"),
    [
        *[(4, 0.0, 4), (4, 0.3, 4), (4, 1.0, 3), (2, 3.6, 1), (4, 9.0, 1), (1, 0.0, 1)],
        *[(9, 0.2, 9), (9, 1.0, 3)],  # more threads than cores, as the user has it
    ],
)
def test_threads_have_a_core_to_themselves(
    threads: int, busy: float, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2, 3}, raising=False)
    monkeypatch.setattr(cpu_load, "busy_cores", lambda seconds: busy)
    assert cpu_load.threads_with_a_core(threads) == expected


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
    assert cpu_load.busy_cores(0.3, file) == pytest.approx(expected)


def test_without_proc_stat_no_core_counts_as_busy(tmp_path: Path) -> None:
    assert cpu_load.busy_cores(0.0, tmp_path / "stat") == 0
