"""`exactly.py WORLD_SIZE FOLDER RUNS OVERRIDES` trains small U-Nets in float64, where the order of sums hardly matters.

RUNS (overrides by run name) and OVERRIDES (those of all runs) are JSON. A run whose first override is `after=NAME`
continues a copy of that one. Each process writes to `FOLDER/shares-RANK.json` the share of each run's trained
parameters that it held. They see a tenth of the drawings.
"""

import functools
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel, UNet2DModel

sys.path.insert(0, str(Path(__file__).parents[2]))
from ldm.config import loader
from ldm.data import index
from ldm.data.index import Index
from ldm.distributed.launch import join
from ldm.distributed.sharding import to_local
from ldm.models import text_encoder
from ldm.models.autoencoder import Autoencoder, build
from ldm.training import throughput
from stage2_diffusion import validation
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.train import train


def to_float64(value: Any) -> Any:
    return value.double() if torch.is_tensor(value) and value.is_floating_point() else value


def in_float64(forward: Any) -> Any:
    @functools.wraps(forward)
    def forward_float64(network: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        kwargs = {name: to_float64(value) for name, value in kwargs.items()}
        return forward(network, *map(to_float64, args), **kwargs)

    return forward_float64


def record_shares(module: torch.nn.Module, _: Any) -> None:
    if isinstance(module, Denoiser) and module.training:
        parameters = [p for p in module.parameters() if p.requires_grad]
        shares[name] = sum(to_local(p).numel() for p in parameters) / sum(p.numel() for p in parameters)


world, folder, runs, overrides = sys.argv[1:]
shares: dict[str, float] = {}
torch.nn.modules.module.register_module_forward_pre_hook(record_shares)
torch.set_default_dtype(torch.float64)
throughput.forward_flops = lambda *args, **kwargs: 0  # counting takes as long as a run, and nobody asks how fast it is
validation.EVAL_LOG_SNRS = (-3.0, 3.0)  # as the fixture `two_noise_levels` has it
for kind in (UNet2DConditionModel, UNet2DModel):  # embeddings and noise come in float32
    kind.forward = in_float64(kind.forward)
drawings: Index | None = None
for name, more in json.loads(runs).items():
    if more[0].startswith("after="):
        if PartialState().is_main_process:
            shutil.copytree(Path(folder, more[0].removeprefix("after=")), Path(folder, name))
        PartialState().wait_for_everyone()
        del more[0]
    settings = loader.load("configs/tiny.yaml", [*json.loads(overrides), f"run.dir={folder}/{name}", *more])
    join(settings.run)
    torch.manual_seed(0)
    vae, encoder = Autoencoder(build(settings.stage1, settings.data.size)), text_encoder.of(settings.text)
    encoder.model.double()
    if not drawings:
        built = index.build(settings.data, settings.cache_dir, ("text", "class"))  # they suit all conditions
        drawings = Index(built.table, built.sources, built.data, built.rows[::10])
    train(settings, drawings, vae, encoder if settings.stage2.text else None)
assert PartialState().num_processes == int(world)
(Path(folder) / f"shares-{PartialState().process_index}.json").write_text(json.dumps(shares))
PartialState().wait_for_everyone()
PartialState().destroy_process_group()
