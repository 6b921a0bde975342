"""`killed_writes.py FOLDER KILLS` kills processes at random moments while they write one checkpoint after the other.

After each kill the newest checkpoint has to be whole, of the step in its name, and no older than the one before. The
last line printed is how many kills came during a write.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState

from ldm.training.checkpoint import CheckpointManager, steps_done
from ldm.training.checkpoint_writer import CheckpointWriter

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
PartialState(cpu=True)
torch.set_num_threads(1)
random.seed(0)


def write_on() -> None:
    manager, writer = CheckpointManager(folder, 2), CheckpointWriter()
    weights, step = torch.empty(500_000), steps_done(folder)
    while os.getppid() == parent:
        step += 1
        weights.fill_(step)
        parts = {"model": {"weight": weights}, "ema": {"weight": weights}}
        writer.start(parts, lambda copies, step=step: manager.write(step, copies, {"step": step}))


def wait_for(step: int) -> float:
    """The time at which the checkpoint of a step stands."""
    while steps_done(folder) < step:
        time.sleep(0.001)
    return time.monotonic()


during_write, last, parent = 0, 0, os.getpid()
for _ in range(kills):
    if not (process := os.fork()):
        write_on()
    first = wait_for(last + 1)
    time.sleep(random.uniform(0, 2 * (wait_for(last + 2) - first)))  # within about two writes
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    during_write += any((folder / "checkpoints").glob(".*.writing"))
    manager = CheckpointManager(folder, 2)
    newest = manager.read_newest(lambda line: sys.exit(line))
    assert newest
    path, parts, state = newest
    assert path.name == f"step-{state['step']:06d}" and state["step"] > last
    assert all((tensors["weight"] == state["step"]).all() for tensors in parts.values())
    manager.tidy_up()
    assert {file.name.partition("-")[0] for file in (folder / "checkpoints").iterdir()} == {"step"}
    last = state["step"]
print(during_write)
