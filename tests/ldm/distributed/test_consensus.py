"""Files that another machine sees late, as of a network folder, which may list a file a minute after it was written."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import Forked

PROCESSES = """
import json
import sys
import time
from pathlib import Path
import torch
from accelerate import PartialState
from ldm.distributed import consensus
from ldm.training.checkpoint import CheckpointManager, write_checkpoint
from ldm.utils.errors import UserError

state = PartialState(cpu=True)
second = state.process_index == 1
folder, results, is_dir = Path(sys.argv[1]), {}, Path.is_dir
consensus.WAITS, consensus.SILENT_WAITS = (0.05, 0.1, 0.1, 0.2), 1

def attempt(name, action):
    try:
        results[name] = action()
    except UserError as error:
        results[name] = f"error: {error}"
    Path.is_dir = is_dir

def hide_newest(seconds):
    end = time.monotonic() + seconds
    hidden = second and (lambda path: path.name == "step-000008" and time.monotonic() < end)
    Path.is_dir = lambda path: not (hidden and hidden(path)) and is_dir(path)

def newest():
    newest = CheckpointManager(folder, 2).read_newest(print)
    return newest and newest[0].name

if not second:
    for step in (4, 8):
        write_checkpoint(folder / f"checkpoints/step-{step:06d}", {"model": {"w": torch.ones(2)}}, {"step": step})
state.wait_for_everyone()
hide_newest(0.2)
attempt("late", newest)
hide_newest(9.0)
attempt("hidden", newest)
(folder / f"{state.process_index}.json").write_text(json.dumps(results))
state.wait_for_everyone()
state.destroy_process_group()
"""


@pytest.mark.slow
def test_a_checkpoint_that_a_machine_sees_late_is_waited_for_and_not_passed_over(
    launch: Callable[..., Forked], finish: Callable[[Forked], str], tmp_path: Path
) -> None:
    script = tmp_path / "processes.py"
    script.write_text(PROCESSES)
    output = finish(launch(script, tmp_path, processes=2))
    hidden = f"can't see {tmp_path / 'checkpoints/step-000008'}, which another process sees"
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert first["late"] == second["late"] == "step-000008"
    assert f"{hidden}; waiting for it, " in output
    assert first["hidden"] == second["hidden"]
    assert first["hidden"].startswith("error: run.dir: process 1, on ")
    assert first["hidden"].endswith(f"{hidden}; give a folder on a file system that all machines share")
    assert "is damaged" not in output
