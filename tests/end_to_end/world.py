"""`world.py WORLD_SIZE` joins the processes that a launcher started, and adds up a one of each."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).parents[2]))
from ldm.config.schema import RunConfig
from ldm.distributed.launch import join

join(RunConfig(device="cpu"))
total = torch.ones(())
torch.distributed.all_reduce(total)
assert PartialState().num_processes == int(total) == int(sys.argv[1])
print(f"a world of {int(total)}\n", end="", flush=True)
PartialState().destroy_process_group()
