"""The peak memory of this process."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

PROCESS = Path("/proc/self")


class Peak(NamedTuple):
    """Bytes: of a GPU, allocated to tensors and reserved by torch; of a CPU, the resident set size, twice."""

    allocated: int
    reserved: int


def reset_peak_memory(cuda: bool) -> None:
    """Starts a new measurement. Where the system can't, the peak remains that since the process began."""
    if cuda:
        torch.cuda.init()  # or resetting fails
        torch.cuda.reset_peak_memory_stats()
    elif (clear := PROCESS / "clear_refs").exists():
        with suppress(OSError):
            clear.write_text("5")


def peak_memory(cuda: bool) -> Peak:
    """The peak since `reset_peak_memory`, or since the process began."""
    if cuda:
        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    if (status := PROCESS / "status").exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        peak = 1024 * int(line.split()[1])
    else:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Peak(peak, peak)
