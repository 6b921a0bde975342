"""Threads that have a core to themselves while other programs run."""

import os

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
