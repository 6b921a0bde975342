"""A process's peak memory: bytes on every system, reset where the system can."""

import os
import resource
import sys
from pathlib import Path

import pytest

from ldm.utils import peak_memory


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system can't reset the peak")
def test_the_peak_is_reset() -> None:
    def allocate() -> None:
        bytearray(b"x") * (256 << 20)

    peak_memory.reset_peak_memory(cuda=False)
    before = peak_memory.peak_memory(cuda=False).allocated
    allocate()
    assert peak_memory.peak_memory(cuda=False).allocated > before + (200 << 20)
    peak_memory.reset_peak_memory(cuda=False)
    assert peak_memory.peak_memory(cuda=False).allocated < before + (100 << 20)


@pytest.mark.parametrize(("platform", "unit"), [("darwin", 1), ("linux", 1024)])
def test_without_proc_the_unit_of_getrusage_is_converted_to_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, platform: str, unit: int
) -> None:
    monkeypatch.setattr(peak_memory, "PROCESS", tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    peak_memory.reset_peak_memory(cuda=False)
    assert peak_memory.peak_memory(cuda=False).allocated == unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
