"""`full_disk.py FOLDER` trains, continues, and runs out of disk in the main process; each process prints its part."""

import resource
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import nn

import ldm.training.checkpoint
from ldm.config.schema import RunConfig, Training
from ldm.training.checkpoint import checkpoints
from ldm.training.trainer import Trainer
from ldm.utils.atomic_files import file_sha256
from ldm.utils.errors import UserError
from ldm.utils.rng import normal

SIDE = 64  # a layer of 16 KB
checked: list[str] = []


def check(path: Path) -> str:
    checked.append(path.name)
    return file_sha256(path)


class Positions(torch.utils.data.Dataset):
    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        return {"position": torch.tensor(n), "x": normal(0, "x", torch.tensor([n]), (SIDE,))[0]}


def train(steps: int) -> Trainer:
    torch.manual_seed(0)
    config = RunConfig(dir=Path(sys.argv[1]), precision="no", device="cpu", tracker="none", log_every=100)
    training = Training(steps=steps, batch=4, lr=0.02, checkpoint_every=4)
    run = Trainer(config, training, "stage1", nn.Linear(SIDE, SIDE))
    for batch in run.batches(Positions()):
        with run.accumulate():
            loss = (run.model(batch["x"]) - batch["x"]).square().mean()
            run.backward(loss)
            run.optimizer_step()
            run.log(loss=loss)
        run.checkpoint_if_due()
    return run


def say(text: str) -> None:
    """A line in one write: those of two processes don't mix."""
    print(f"\n{rank} {text}\n", end="", flush=True)


ldm.training.checkpoint.file_sha256 = check
rank = train(4).accelerator.process_index
resumed = train(8)
say(f"checked {sorted(set(checked))} after {len(checked)} files")
if rank == 0:
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, resource.RLIM_INFINITY))
try:
    train(1000)
except UserError as error:
    say(f"reported {error}")
say(f"has {[path.name for path in checkpoints(resumed.folder)]}")
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
