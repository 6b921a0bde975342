"""The most memory that this process has taken."""

from __future__ import annotations

import resource
import sys
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

PROCESS = Path("/proc/self")


class Peak(NamedTuple):
    """Bytes: of a GPU, what tensors took and what torch's allocator held; of a CPU, what the process took, twice."""

    allocated: int
    reserved: int


def reset_peak_memory(cuda: bool) -> None:
    """Where the system can't, the peak stays that of the whole process."""
    if cuda:
        torch.cuda.init()  # before it is used there is nothing to reset, which is an error
        torch.cuda.reset_peak_memory_stats()
    elif (clear := PROCESS / "clear_refs").exists():
        with suppress(OSError):
            clear.write_text("5")


def peak_memory(cuda: bool) -> Peak:
    """Since `reset_peak_memory`, or else since the process began."""
    if cuda:
        return Peak(torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved())
    if (status := PROCESS / "status").exists():
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        taken = 1024 * int(line.split()[1])
    else:
        taken = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return Peak(taken, taken)
