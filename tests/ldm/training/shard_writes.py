"""`shard_writes.py FOLDER` is run by two processes, which write checkpoints of a sharded tensor, all of one number.

That of step 1 is written; that of step 2 fails, as there is no room for the second process's shard; that of step 3 is
written; while that of step 4 is, the second process makes a file `writing` and waits to be killed.
"""

import resource
import sys
import time
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from ldm.distributed import shard_files
from ldm.training.checkpoint import CheckpointManager
from ldm.training.checkpoint_writer import CheckpointWriter, Copies
from ldm.utils.errors import UserError

folder = Path(sys.argv[1])
process = PartialState(cpu=True)
mesh, writer, manager = init_device_mesh("cpu", (2,)), CheckpointWriter(), CheckpointManager(folder, 1)
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)


def start(step: int) -> None:
    full = torch.full((5, 1000), float(step))
    parts = {"model": {"weight": distribute_tensor(full, mesh, [Shard(0)]), "scalar": torch.tensor(float(step))}}

    def write(copies: Copies) -> None:
        manager.write(step, copies, {"step": step})

    writer.start(parts, write)


def hang(*_: object) -> None:
    (folder / "writing").touch()
    time.sleep(600)


start(1)
writer.wait()
if process.process_index == 1:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
try:
    start(2)
    writer.wait()
except UserError as error:
    (folder / f"error-{process.process_index}").symlink_to(str(error))
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
start(3)
writer.wait()
if process.process_index == 1:
    shard_files.write_shard = hang
start(4)
writer.wait()
