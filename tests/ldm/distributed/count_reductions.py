"""`count_reductions.py FOLDER` takes an optimizer step of four accumulation steps under DDP, and another under FSDP.

The first process writes to `FOLDER/counts.json` how often each accumulation step reduced tensors over the processes.
"""

import json
import sys
from pathlib import Path

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from ldm.config.schema import RunConfig, Training
from ldm.distributed.launch import training_processes
from ldm.training.trainer import Trainer

REDUCTIONS = ("c10d::allreduce_", "c10d::_reduce_scatter_base_")


class Block(nn.Linear):
    pass


class Network(nn.Module):
    _no_split_modules = ("Block",)  # what FSDP gathers at a time

    def __init__(self) -> None:
        super().__init__()
        self.first, self.block, self.extra = nn.Linear(4, 6), Block(6, 4), nn.Parameter(torch.zeros(4))
        self.extra_parameters = [self.extra]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.block(self.first(x)) + self.extra


def reductions(name: str, sharded: bool) -> list[int]:
    """Of each accumulation step."""
    training = Training(steps=1, batch=8, device_batch=1)
    run, counts = Trainer(config, training, name, Network(), sharded=sharded), []
    assert run.accelerator.is_fsdp2 == sharded and run.accumulation.steps == 4
    for _ in range(run.accumulation.steps):
        with profile(activities=[ProfilerActivity.CPU]) as profiler, run.accumulate():
            run.backward(run.model(torch.ones(1, 4)).square().mean())
        counts.append(sum(event.count for event in profiler.key_averages() if event.key in REDUCTIONS))
    return counts


config = RunConfig(dir=Path(sys.argv[1]), precision="no", device="cpu", tracker="none")
with training_processes(config) as process:
    counts = {"ddp": reductions("stage1", False), "fsdp": reductions("stage2", True)}
    if process.is_main_process:
        (config.dir / "counts.json").write_text(json.dumps(counts))
