"""`fsdp_optimizer.py FOLDER OPTIMIZER STEPS [GATHERED]` trains a small network, in shards if processes are several.

At the end its state is gathered, and written to the folder GATHERED.
"""

import os
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

from ldm.config.schema import RunConfig, Training
from ldm.training.checkpoint import write_checkpoint
from ldm.training.trainer import Trainer
from ldm.utils.rng import normal


class Block(nn.Linear):
    pass


class Network(nn.Module):
    _no_split_modules = ("Block",)  # what FSDP gathers at a time

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.block, self.last = nn.Linear(4, 7), Block(7, 5), nn.Linear(5, 4)  # uneven shards

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.block(self.first(x).tanh()).tanh())


class Positions(torch.utils.data.Dataset):
    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return {"position": torch.tensor(n), "x": normal(0, "x", torch.tensor([n]), (4,))[0]}


folder, optimizer, steps, *gathered = sys.argv[1:]
training = Training(
    steps=int(steps),
    batch=12,
    lr=0.02,
    lr_warmup_steps=2,
    ema_decay=0.5,
    ema_widths=() if optimizer == "schedulefree" else (0.05, 0.1),
    ema_snapshot_every=3,
    checkpoint_every=3,
    optimizer=optimizer,
)
config = RunConfig(dir=Path(folder), precision="no", device="cpu", tracker="none", checkpoints_total_limit=9)
run = Trainer(config, training, "stage2", Network(), sharded=True)
assert run.accelerator.is_fsdp2 == (run.accelerator.num_processes > 1)
for batch in run.batches(Positions()):
    with run.accumulate():
        loss = (run.model(batch["x"]) - batch["x"]).square().mean()
        run.backward(loss)
        run.optimizer_step()
        run.log(loss=loss)
    run.checkpoint_if_due()
if gathered:
    os.environ["FSDP_STATE_DICT_TYPE"] = "FULL_STATE_DICT"
    parts, state = run._state()
    run._writer.start(parts, lambda copies: write_checkpoint(Path(gathered[0]), copies, state))
    run._writer.wait()
run.export_ema()
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
