"""Import this before torch: on a busy machine, it has OpenMP's idle threads sleep instead of spin.

An idle thread spins for some milliseconds, to be quick at the next operation. With more threads and other programs than
cores, it takes the core that a working thread needs. Training on two cores (AVX2) with two threads, in images/s: with
one other busy program 22, or 45 with `GOMP_SPINCOUNT=0`; on an idle machine 70, or 57. The variable must be set before
libgomp is loaded, so the choice is made when a command starts. From here on Ctrl-C is one line, also during imports.
"""

from __future__ import annotations

import os

from ldm.utils.cpu_load import busy_cores, own_cpus
from ldm.utils.interrupt import install_hook

USER_SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # either one overrides the choice made here


def disable_spinning_if_busy() -> None:
    """Sets `GOMP_SPINCOUNT=0` where this process's threads and other programs need more cores than there are."""
    cores = len(own_cpus())
    num_threads = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(num_threads) if num_threads.isdigit() else cores
    if threads > 1 and not any(name in os.environ for name in USER_SETTINGS) and threads + busy_cores() > cores + 0.5:
        os.environ["GOMP_SPINCOUNT"] = "0"


install_hook()
disable_spinning_if_busy()
