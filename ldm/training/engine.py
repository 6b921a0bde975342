"""A module in training: how it computes, its optimizer, and what a checkpoint keeps of both."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from types import MethodType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import convert_to_fp32
from torch import nn

from ldm.config.schema import Training
from ldm.distributed.sharding import full_tensor, shard_like, without_weights
from ldm.training.optimizer import flatten_optimizer, make_optimizer, unflatten_optimizer
from ldm.utils.atomic_files import Tensors
from ldm.utils.precision import DTYPES
from ldm.utils.safetensors_file import SavedTensor, SavedTensors


class Engine:
    """A module with its optimizer. `ddp_model` computes in the run's precision and sums gradients over processes.

    What a module names in `extra_parameters`, parameters of another kind than its network's, is not decayed, and its
    gradients are clipped separately, so that large ones don't shorten the network's. It is not sharded either.

    Of the networks whose names begin with one of a module's `frozen_prefixes`, only trained parameters are in
    checkpoints: the others are those of the model that the training starts from.
    """

    def __init__(self, module: nn.Module, lr: float, training: Training, accelerator: Accelerator, precision: str):
        self.module, self.lr, self.max_grad_norm = module.to(accelerator.device), lr, training.max_grad_norm
        self.accelerator, self.precision = accelerator, precision
        self._muon_scale = training.muon_lr / training.lr if training.muon_lr else 1.0
        self._collect_parameters()
        # Scalars, a learned variance for one, have no natural value to decay to either.
        decayed = [p for p in self._network if p.ndim]
        free = [p for p in self._network if not p.ndim] + self._extra
        groups: list[dict[str, Any]] = [{"params": decayed}, *([{"params": free, "weight_decay": 0.0}] if free else [])]
        optimizer = make_optimizer(training, module, groups, lr, accelerator)
        self._unsharded: nn.Module | None = None  # without weights; `export_ema` fills it
        if accelerator.is_fsdp2:
            self._prepare_to_shard()
        self._use_autocast()
        with _without_autocast(accelerator):  # of its own, which under DeepSpeed would be fp16, without a scaler
            self.ddp_model, self.optimizer = accelerator.prepare(module, optimizer)
        if accelerator.is_fsdp2:  # its first forward does that, but a part's, in a validation, may come before
            module._get_fsdp_state()._lazy_init()  # type: ignore[operator]
        self._collect_parameters()

    def autocast(self) -> AbstractContextManager[Any]:
        """Mixed precision, the same whatever spreads the network over the processes; nothing for `no`."""
        dtype = DTYPES[self.precision]
        return torch.autocast(self.accelerator.device.type, dtype=dtype, enabled=self.precision != "no")

    def _use_autocast(self) -> None:
        """The module's forward is under autocast from here on, and returns float32."""
        if self.precision == "no":
            return
        inner, autocast = type(self.module).forward, self.autocast

        def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            with autocast():
                output = inner(module, *args, **kwargs)
            return convert_to_fp32(output)

        self.module.forward = MethodType(forward, self.module)  # a method, so that a copied module calls itself

    def _collect_parameters(self) -> None:
        """Finds the trained parameters; sharding replaces them."""
        self.parameters = [p for p in self.module.parameters() if p.requires_grad]
        extra = {id(p) for p in getattr(self.module, "extra_parameters", ())}
        self._extra = [p for p in self.parameters if id(p) in extra]
        self._network = [p for p in self.parameters if id(p) not in extra]

    def _prepare_to_shard(self) -> None:
        self._unsharded = without_weights(self.module)
        self.accelerator.state.fsdp_plugin.ignored_modules = [nn.ParameterList(self._extra)]
        for parameter in self._extra:
            parameter.register_post_accumulate_grad_hook(self._reduce)

    def _reduce(self, parameter: torch.Tensor) -> None:
        if self.accelerator.sync_gradients:
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    @property
    def unsharded(self) -> nn.Module:
        """The module, or, where it is sharded, an unsharded copy without weights."""
        return self._unsharded or self.module

    @property
    def has_gradients(self) -> bool:
        return any(p.grad is not None for p in self.parameters)

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a loss's gradients up, in every module that it depends on; fp16's are scaled."""
        self.accelerator.backward(loss)

    def clip_gradients(self) -> torch.Tensor:
        """Clips to `max_grad_norm` and returns the norm before; NaN where an extra parameter's is not finite."""
        norm = full_tensor(nn.utils.clip_grad_norm_(self._network, self.max_grad_norm))
        if not self._extra:  # whose norm torch would return on the CPU
            return norm
        extra_norm = nn.utils.clip_grad_norm_(self._extra, self.max_grad_norm)
        return torch.where(extra_norm.isfinite().to(norm.device), norm, torch.nan)

    def step(self, finite: bool) -> None:
        """Takes the optimizer's step; none where gradients are not finite."""
        if finite:
            self.optimizer.step()

    def set_lr(self, lr: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = lr * (self._muon_scale if group.get("use_muon") else 1.0)

    def moment(self, parameter: nn.Parameter, name: str) -> torch.Tensor | None:
        """A tensor that the optimizer keeps of a parameter; None before its first step."""
        return self.optimizer.optimizer.state.get(parameter, {}).get(name)  # type: ignore[no-any-return]

    def optimizer_bytes(self) -> int:
        """Bytes of the tensors that the optimizer keeps of all parameters, of sharded ones too, after a step."""
        entries = self.optimizer.optimizer.state.values()
        return total_bytes(value for entry in entries for value in entry.values() if isinstance(value, torch.Tensor))

    def state(self) -> tuple[Tensors, Tensors, list[dict[str, Any]]]:
        """Weights and buffers, the optimizer's tensors, its groups; all processes call it.

        The tensors are those that train, sharded ones too: to keep them, copy them.
        """
        return self._weights(), *flatten_optimizer(self.optimizer.state_dict())

    def _weights(self) -> dict[str, torch.Tensor]:
        """Weights and buffers that a checkpoint has."""
        weights = self.module.state_dict()
        if not (frozen := getattr(self.module, "frozen_prefixes", ())):
            return weights
        trained = {name for name, parameter in self.module.named_parameters() if parameter.requires_grad}
        return {name: tensor for name, tensor in weights.items() if name in trained or not name.startswith(frozen)}

    def load(self, weights: SavedTensors, tensors: SavedTensors, groups: list[dict[str, Any]]) -> None:
        """Restores what `state` returned, in this or another number of processes, sharded or not."""
        own = self._weights()
        loaded = {name: shard_like(tensor, own.get(name, tensor)) for name, tensor in weights.items()}
        frozen = bool(getattr(self.module, "frozen_prefixes", ()))
        if frozen and loaded.keys() != own.keys():
            raise KeyError(", ".join(loaded.keys() ^ own.keys()))  # frozen weights alone may be missing
        self.module.load_state_dict(loaded, strict=not frozen)
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]

        def sharded(name: str, tensor: torch.Tensor | SavedTensor) -> torch.Tensor:
            index = name.partition(".")[0]  # "groups" of a tensor that is of no parameter
            like = parameters[int(index)] if index.isdigit() else tensor
            return shard_like(tensor, like if like.shape == tensor.shape else tensor)

        own_tensors = {name: sharded(name, tensor) for name, tensor in tensors.items()}
        self.optimizer.load_state_dict(unflatten_optimizer(own_tensors, groups))
        for parameter, entry in self.optimizer.optimizer.state.items():
            for name, value in entry.items():  # fused steps want the parameter's layout, channels last say
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    entry[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)

    @torch.no_grad()
    def export_ema(self, averages: Tensors) -> nn.Module:
        """The module as it was built, unsharded, in full precision, with averages of its parameters."""
        if self._unsharded is None:
            self.module.__dict__.pop("forward", None)
            for name, average in averages.items():
                self.module.get_parameter(name).copy_(average)
            return self.module.eval()
        weights = self.module.state_dict() | averages
        self._unsharded.load_state_dict({name: full_tensor(tensor) for name, tensor in weights.items()}, assign=True)
        return self._unsharded.eval()


def total_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of tensors; of sharded ones, of all shards."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def clip_gradients(engines: Sequence[Engine]) -> list[torch.Tensor]:
    """Unscales fp16's gradients, clips those of each engine, and returns their norms."""
    for engine in engines if engines and engines[0].accelerator.scaler else ():
        engine.accelerator.unscale_gradients(engine.optimizer)
    return [engine.clip_gradients() for engine in engines]


def step_optimizers(engines: Sequence[Engine], finite: bool, accelerator: Accelerator) -> bool:
    """Steps; False where nothing was learned: not `finite`, or fp16's scale was too high and has been lowered."""
    scaler = accelerator.scaler
    if not scaler:
        for engine in engines:
            engine.step(finite)
        return finite
    for engine in engines if finite else ():  # accelerate's step lets the scale change between two optimizers
        scaler.step(engine.optimizer.optimizer)
    before = scaler.get_scale()
    scaler.update()
    return finite and bool(scaler.get_scale() >= before)


@contextmanager
def _without_autocast(accelerator: Accelerator) -> Iterator[None]:
    """Within it, accelerate prepares models without autocast."""
    before, accelerator.native_amp = accelerator.native_amp, False
    try:
        yield
    finally:
        accelerator.native_amp = before
