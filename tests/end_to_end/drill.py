"""`drill.py FOLDER WORLDS SIGNALS KILLS [KEY=VALUE …]` kills the training of the tiny configuration at random moments.

It is trained uninterrupted, into FOLDER/uninterrupted, and again, into FOLDER/drilled, by processes that are killed and
started anew until they finish. WORLDS, `2,1`, is the number of processes of each start in turn, SIGNALS, `KILL,TERM`,
the signal that all of them get. At least KILLS starts are killed: if a run finishes before that, another is trained,
`drilled-7`. The last line printed is `world signal seconds status …` of each killed start. Processes are forked, so
that a start costs no imports.
"""

from __future__ import annotations

import itertools
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import TINY

import train_ldm

folder, worlds, signals, kills, *overrides = sys.argv[1:]
random.seed(sum(map(ord, worlds + signals)))


def start(run: Path, world: int) -> list[int]:
    """The ids of the processes that train `run`; each writes its output to `RUN.RANK.txt`."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ids = []
    for rank in range(world):
        if not (process := os.fork()):
            output = os.open(f"{run}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(output, 1)
            os.dup2(output, 2)
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            os.environ |= {name: str(value) for name, value in own.items()} | {"MASTER_PORT": str(port)}
            torch.set_num_threads(1)
            try:
                status = train_ldm.main([*TINY, f"run.dir={run}", *overrides])
            except SystemExit as stopped:
                status = int(str(stopped.code))
            except BaseException as error:
                print(repr(error))
                status = 1
            sys.stdout.flush()
            os._exit(status or 0)
        ids.append(process)
    return ids


def wait(ids: list[int], seconds: float) -> bool:
    """Whether all ended by themselves within `seconds`; asserts that their status was 0."""
    end = time.monotonic() + seconds
    for process in list(ids):
        while True:
            ended, status = os.waitpid(process, os.WNOHANG)
            if ended:
                ids.remove(process)
                assert status == 0, f"process {process} ended with status {status}"
                break
            if time.monotonic() > end:
                return False
            time.sleep(0.005)
    return True


began = time.monotonic()
assert wait(start(Path(folder, "uninterrupted"), int(worlds[0])), 300)
duration, drills, run = time.monotonic() - began, [], Path(folder, "drilled")
turns = zip(itertools.cycle(worlds.split(",")), itertools.cycle(signals.split(",")), strict=False)
for world, name in turns:
    if (run / "pipeline").exists():
        if len(drills) >= int(kills):
            break
        run = Path(folder, f"drilled-{len(drills)}")
    seconds = random.uniform(0, 0.6 * duration) if len(drills) < int(kills) else 300
    ids = start(run, int(world))
    if not wait(ids, seconds):
        for process in ids:
            os.kill(process, getattr(signal, f"SIG{name}"))
        codes = [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ids]
        drills.append(f"{world} {name} {seconds:.2f} {'/'.join(map(str, codes))}")
print(" ".join(drills))
