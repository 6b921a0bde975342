"""Averages of the weights over a training run, and others that are combined from their snapshots afterwards.

Power-function averages and post-hoc EMA: Karras et al., arXiv 2312.02696, section 3 and appendix C.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from torch import nn
from torch.distributed.fsdp import FSDPModule

from ldm.config.schema import Training
from ldm.distributed.shard_files import Shards, write_shards
from ldm.distributed.sharding import from_local, shard_like, to_local
from ldm.utils.atomic_files import Tensors, atomic_file
from ldm.utils.errors import UserError
from ldm.utils.safetensors_file import SavedTensors, open_tensors, read_metadata, write_safetensors

Numbers = np.ndarray | float


def exponent(width: float) -> float:
    """γ of the profile t^γ whose standard deviation is `width` of the training's length, 0 < width < 12^-½; γ > 0."""
    # eq. 123, σ_rel² = (γ + 1) / ((γ + 2)² (γ + 3)), as a cubic in γ: eq. 126, Algorithm 2
    t = width**-2
    return float(np.roots([1, 7, 16 - t, 12 - t]).real.max())


class EMA:
    """A moving average of tensors, updated in place: no memory but its own.

    The decay after update n is that of diffusers' `EMAModel`, min(decay, (1 + n) / (10 + n)), and 0 for the first.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], decay: float):
        self.decay = decay
        self.shadow_params = [p.detach().clone() for p in parameters]
        self.optimization_step = 0

    def get_decay(self, optimization_step: int) -> float:
        n = optimization_step - 1
        return min(self.decay, (1 + n) / (10 + n)) if n else 0.0

    @torch.no_grad()
    def step(self, parameters: list[torch.Tensor]) -> None:
        self.optimization_step += 1
        torch._foreach_lerp_(self.shadow_params, parameters, 1 - self.get_decay(self.optimization_step))

    @torch.no_grad()
    def swap(self, parameters: Sequence[torch.Tensor]) -> None:
        """Exchanges average and parameters, one tensor after the other: twice changes nothing."""
        for average, parameter in zip(self.shadow_params, parameters, strict=True):
            held = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(held)
            del held  # before the next one is taken


class PowerEMA(EMA):
    """An average in which the weights after update τ count as τ^γ: always the same share of the training."""

    def __init__(self, parameters: Iterable[torch.Tensor], width: float):
        super().__init__(parameters, decay=1.0)
        self.gamma = exponent(width)

    def get_decay(self, optimization_step: int) -> float:
        return float((1 - 1 / optimization_step) ** (self.gamma + 1))  # eq. 127; 0 at the first update


class ScheduleFreeAverage(EMA):
    """The average x of schedule-free training, whose weights in training are y = (1 − β) z + β x.

    Defazio et al., arXiv 2405.15682, eq. 3 to 5; β is the first of `betas`. The optimizer keeps z and updates y: x
    follows from both, without a decay.
    """

    def __init__(self, parameters: Iterable[torch.Tensor], beta: float, z: Callable[[], list[torch.Tensor]]):
        super().__init__(parameters, decay=0.0)
        self.beta, self.z = beta, z

    @torch.no_grad()
    def step(self, parameters: list[torch.Tensor]) -> None:
        self.optimization_step += 1
        torch._foreach_copy_(self.shadow_params, parameters)
        torch._foreach_lerp_(self.shadow_params, self.z(), 1 - 1 / self.beta)


Moment = Callable[[nn.Parameter, str], torch.Tensor | None]


class Averages:
    """The averages of a module's trained parameters, in the order of `named`.

    Each process averages what it has of a sharded parameter.

    Where `ema_widths` are set, a power-function average of each; else an exponential one of decay `ema_decay`. The
    first of `models`, `main`, is sampled, evaluated and exported. Where the optimizer is schedule-free, the only one is
    its own average; `moment` returns what the optimizer keeps of a parameter.
    """

    def __init__(self, named: Iterable[tuple[str, nn.Parameter]], training: Training, moment: Moment | None = None):
        self.names: tuple[str, ...]
        self.parameters: tuple[nn.Parameter, ...]
        self.names, self.parameters = zip(*named, strict=True)
        parameters = self._local()
        self.training, self.widths = training, training.ema_widths
        self.models: list[EMA] = [PowerEMA(parameters, width) for width in self.widths]
        self.models = self.models or [EMA(parameters, training.ema_decay)]
        self._moment = moment if training.optimizer == "schedulefree" else None
        if self._moment:
            self.models = [ScheduleFreeAverage(parameters, training.betas[0], self._z)]
        self.main = self.models[0]
        self._parts = ("ema", *(f"ema-{width}" for width in self.widths[1:]))
        self._swapped = False

    @property
    def updates(self) -> int:
        """Steps averaged over: all but skipped ones."""
        return int(self.main.optimization_step)

    def _local(self) -> list[torch.Tensor]:
        return [to_local(p) for p in self.parameters]

    def _z(self) -> list[torch.Tensor]:
        """What a schedule-free optimizer averages; parameters that have had no gradient are that themselves."""
        assert self._moment
        moments = [(p, self._moment(p, "z")) for p in self.parameters]
        return [to_local(p if z is None else z) for p, z in moments]

    def step(self) -> None:
        for model in self.models:
            model.step(self._local())

    def swap(self) -> None:
        """Gives the parameters the main average, or, the second time, their own values back."""
        self.main.swap(self._local())
        self._swapped = not self._swapped

    @contextmanager
    def swapped(self, module: nn.Module) -> Iterator[None]:
        """Within it, `module` has the main average and is in evaluation mode."""
        self.swap()
        if isinstance(module, FSDPModule):  # parts of it are called by themselves
            module.unshard()
        module.eval()
        try:
            yield
        finally:
            if isinstance(module, FSDPModule):
                module.reshard()
            self.swap()
            module.train()

    def of(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """The averages of a parameter: one, or one for each of `ema_widths`; and z, which schedule-free ones need."""
        i = next(i for i, p in enumerate(self.parameters) if p is parameter)
        z = self._moment and self._moment(parameter, "z")
        return [*(model.shadow_params[i] for model in self.models), *([] if z is None else [z])]

    def tensors(self, model: EMA) -> Tensors:
        """Averages by parameter name, sharded as the parameters are; swapped ones are in these."""
        averages = self._local() if self._swapped and model is self.main else model.shadow_params
        return {
            name: from_local(average.detach(), like)
            for name, average, like in zip(self.names, averages, self.parameters, strict=True)
        }

    def state(self) -> dict[str, Tensors]:
        """By parameter name, for a checkpoint: the main average as `ema`, those of further widths as `ema-0.1`.

        The tensors are those that are averaged, sharded ones too: to keep them, copy them.
        """
        return {part: self.tensors(model) for part, model in zip(self._parts, self.models, strict=True)}

    @torch.no_grad()
    def load(self, parts: Mapping[str, SavedTensors], updates: int) -> None:
        """Restores what `state` returned."""
        for part, model in zip(self._parts, self.models, strict=True):
            for name, average, like in zip(self.names, model.shadow_params, self.parameters, strict=True):
                average.copy_(to_local(shard_like(parts[part][name], like)))
            model.optimization_step = updates

    def due(self, step: int) -> bool:
        """Whether snapshots are to be written after this step: every `ema_snapshot_every`, and the last."""
        t = self.training
        return bool(self.widths) and self.updates > 0 and (step % t.ema_snapshot_every == 0 or step == t.steps)

    def snapshot_writer(self, folder: Path, step: int) -> Callable[[Mapping[str, Tensors | Shards]], None]:
        """A function that writes `step-000500-0.05.safetensors` of each width from copies of what `state` returned.

        Shards go to a folder `step-000500-0.05`. The metadata are the fields of a `Snapshot`. It is whole or not there;
        UserError where it can't be written.
        """
        updates, widths = self.updates, dict(zip(self._parts, self.widths, strict=True))

        def write(parts: Mapping[str, Tensors | Shards]) -> None:
            folder.mkdir(parents=True, exist_ok=True)
            for part, width in widths.items():
                facts = {"average": json.dumps({"step": step, "updates": updates, "width": width})}
                name, tensors = f"step-{step:06d}-{width}", parts[part]
                if isinstance(tensors, Shards):
                    write_shards(folder / name, {"": tensors}, facts)
                    continue
                with atomic_file(folder / f"{name}.safetensors") as tmp_path:
                    write_safetensors(tmp_path, tensors, facts)

        return write


class Snapshot(NamedTuple):
    """A power-function average of σ_rel `width`, as it was after a step of the run."""

    path: Path
    step: int
    updates: int
    width: float


def read_snapshots(folder: Path) -> list[Snapshot]:
    """Those in a folder, by step and width; UserError where one can't be read."""
    snapshots: list[Snapshot] = []
    for path in (path for path in folder.glob("step-*") if path.is_dir() or path.suffix == ".safetensors"):
        try:
            facts = json.loads(read_metadata(path)["average"])
            snapshots.append(Snapshot(path, **facts))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: not a sound snapshot ({error}); move it away") from None
    return sorted(snapshots, key=lambda snapshot: (snapshot.step, snapshot.width))


def coefficients(t: np.ndarray, gamma: np.ndarray, t_r: float, gamma_r: float) -> np.ndarray:
    """What to multiply averages `(n,)` of profiles (t, γ) by, so that their sum comes nearest to that of (t_r, γ_r).

    Least squares over the profiles p(τ) = (γ + 1) τ^γ / t^(γ+1), 0 ≤ τ ≤ t (eq. 121): Algorithm 3.
    """
    return np.linalg.lstsq(_inner(t[:, None], gamma[:, None], t, gamma), _inner(t, gamma, t_r, gamma_r), rcond=None)[0]


def _inner(t_a: Numbers, gamma_a: Numbers, t_b: Numbers, gamma_b: Numbers) -> Any:
    """∫ p_a p_b dτ over 0 ≤ τ ≤ min(t_a, t_b), in closed form."""
    t = np.minimum(t_a, t_b)
    scale = (gamma_a + 1) * (gamma_b + 1) / (gamma_a + gamma_b + 1)
    return scale * (t / t_a) ** (gamma_a + 1) * (t / t_b) ** (gamma_b + 1) / t


def fit(snapshots: Sequence[Snapshot], width: float) -> tuple[np.ndarray, float]:
    """Shares `(n,)`, which add up to 1, of snapshots in the average of another width that ends where the last one does.

    And by how much of its norm the profile is missed; 0 is exact.
    """
    t = np.array([float(snapshot.updates) for snapshot in snapshots])
    gamma = np.array([exponent(snapshot.width) for snapshot in snapshots])
    t_r, gamma_r = t.max(), exponent(width)
    shares = coefficients(t, gamma, t_r, gamma_r)
    shares /= shares.sum()  # the paper's networks ignore the length of their weights, others don't
    gram, target = _inner(t[:, None], gamma[:, None], t, gamma), _inner(t, gamma, t_r, gamma_r)
    norm = _inner(t_r, gamma_r, t_r, gamma_r)
    missed = max(0.0, shares @ gram @ shares - 2 * shares @ target + norm)  # ‖Σ share·p − p_r‖²
    return shares, float(np.sqrt(missed / norm))


def weighted_sum(paths: Iterable[Path], shares: Iterable[float]) -> Tensors:
    """Σ share · tensor over snapshots of the same names, one after the other; in float64, returned in float32."""
    total: Tensors = {}
    for path, share in zip(paths, shares, strict=True):
        for name, tensor in open_tensors(path).items():
            part = share * tensor.read().double()
            total[name] = total[name].add_(part) if name in total else part
    return {name: tensor.float() for name, tensor in total.items()}
