"""An engine on DeepSpeed's ZeRO-2, which shards gradients and the optimizer's tensors over the processes."""

from __future__ import annotations

import itertools
from typing import Any

import torch

from ldm.distributed.sharding import on_main_cpu
from ldm.training.engine import Engine, total_bytes
from ldm.training.optimizer import unflatten_optimizer
from ldm.utils.atomic_files import Tensors
from ldm.utils.safetensors_file import SavedTensors, read_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class ZeroEngine(Engine):
    """Each process has all parameters, and AdamW's tensors of some; DeepSpeed sums gradients, clips and steps.

    DeepSpeed's own mixed precision is off: it would train a bf16 copy of the network. Autocast is as without it.
    """

    @property
    def has_gradients(self) -> bool:
        return True  # DeepSpeed has taken them

    def backward(self, loss: torch.Tensor) -> None:
        self.ddp_model.set_gradient_accumulation_boundary(self.accelerator.sync_gradients)
        self.ddp_model.backward(loss)  # accelerate's would step at once

    def clip_gradients(self) -> torch.Tensor:
        """Norm of the gradients, which `step` will clip; infinite where one is not finite."""
        norm = torch.as_tensor(self._zero.scaled_global_norm())
        return torch.where(norm < 0, torch.inf, norm)  # -1 is DeepSpeed's sign for it

    def step(self, finite: bool) -> None:
        from deepspeed.utils import safe_set_full_grad

        if not finite:  # DeepSpeed drops the gradients of a step that it itself finds so
            safe_set_full_grad(self.parameters[0], torch.full_like(self.parameters[0], torch.inf))
        self.ddp_model.step()

    @property
    def _zero(self) -> Any:
        """DeepSpeed's optimizer, around AdamW's."""
        return self.optimizer.optimizer

    def optimizer_bytes(self) -> int:
        return len(MOMENTS) * total_bytes(self.parameters)

    def state(self) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        adamw, tensors = self._zero.optimizer, Tensors()
        if adamw.state:
            (step,) = {float(entry["step"]) for entry in adamw.state.values()}
            for i, parameter in enumerate(self._in_order()):
                tensors[f"{i}.step"] = torch.tensor(step)
                for name in MOMENTS:
                    tensors |= on_main_cpu(f"{i}.{name}", safe_get_full_optimizer_state(parameter, name))
        numbers = itertools.count()
        groups = [
            {**described, "params": list(itertools.islice(numbers, len(group)))}
            for described, group in zip(adamw.state_dict()["param_groups"], self._zero.bit16_groups, strict=True)
        ]
        return self.module.state_dict(), tensors, groups

    def load(self, weights: SavedTensors, tensors: SavedTensors, groups: list[dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        self.module.load_state_dict(read_tensors(weights))
        state = unflatten_optimizer(read_tensors(tensors), groups)["state"]
        adamw = self._zero.optimizer
        for part in self._zero.single_partition_of_fp32_groups if state else ():
            moments = {name: torch.zeros_like(part) for name in MOMENTS}
            adamw.state[part] = {"step": state[0]["step"].to(part.device), **moments}
        if state:
            self._zero._lazy_init_hp_params_optimizer_state()  # where DeepSpeed looks for them; else at its first step
        for i, parameter in enumerate(self._in_order()):
            safe_set_full_fp32_param(parameter, parameter.detach())
            for name in MOMENTS if state else ():
                safe_set_full_optimizer_state(parameter, state[i][name].to(parameter.device), name)

    def _in_order(self) -> list[torch.nn.Parameter]:
        """The parameters in the optimizer's order."""
        return [parameter for group in self._zero.bit16_groups for parameter in group]
