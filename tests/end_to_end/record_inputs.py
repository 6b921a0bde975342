"""`record_inputs.py WORLD_SIZE FOLDER [KEY=VALUE …]` trains the tiny configuration, and writes its U-Net's inputs."""

import sys
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import UNet2DConditionModel
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[2]))
from tiny import TINY

import train_ldm

world, folder, *overrides = sys.argv[1:]
noisy_latents: list[torch.Tensor] = []
unets: list[UNet2DConditionModel] = []


def record(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
    if isinstance(module, UNet2DConditionModel) and module.training:
        noisy_latents.append(inputs[0].clone())
        unets[:] = [module]


torch.nn.modules.module.register_module_forward_pre_hook(record)
status = train_ldm.main([*TINY, f"run.dir={folder}", *overrides])
assert PartialState().num_processes == int(world)
weights = torch.cat([p.detach().flatten() for p in unets[0].parameters()])
save_file(
    {"x_t": torch.stack(noisy_latents), "weights": weights},
    Path(folder) / f"rank-{PartialState().process_index}.safetensors",
)
sys.exit(status)
