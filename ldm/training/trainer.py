"""`Run`: the bookkeeping of a training run, so that a loop can show nothing but its idea.

Processes and precision (accelerate), learning rate, EMA, progress, metrics, atomic checkpoints, exact resume, signals.
Random numbers are not kept here: they follow from the position in the run (`ldm.data.sampler`).
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import nn
from torch.distributed.fsdp import FSDPModule
from tqdm import tqdm

from ldm.config.loader import differences
from ldm.config.schema import RunConfig, Training
from ldm.data.sampler import Positions
from ldm.data.stream import Stream
from ldm.distributed.consensus import gather_objects
from ldm.distributed.launch import (
    accelerator,
    accumulated,
    join,
    leave_signals_to_parent,
    on_main,
    precision,
    say_idle_cores,
)
from ldm.distributed.sharding import shard
from ldm.training import dry_run
from ldm.training.checkpoint import CheckpointManager
from ldm.training.deepspeed import ZeroNetwork
from ldm.training.ema import Averages
from ldm.training.metrics_logger import MetricsLogger
from ldm.training.nonfinite import Skips
from ldm.training.optimizer import DTYPES, Network
from ldm.training.signals import Interrupted, SignalHandler
from ldm.training.throughput import TRAINING, Clock, forward_flops, matmul_peak
from ldm.utils.errors import UserError

MEASURED = ("time", "images_per_second", "waiting", "mfu")  # in a line of metrics: what no two runs have alike
PARTS = (("model", "optimizer"), ("adversary", "adversary_optimizer"))  # the files of each network in a checkpoint


def learning_rate(step: int, training: Training) -> float:
    """Share of the full learning rate at optimiser step `step`, from 0: linear warm-up, then as `decay` says."""
    rise = min(1.0, (step + 1) / max(1, training.lr_warmup_steps))
    if training.lr_scheduler == "constant":
        return rise
    progress = max(0, step - training.lr_warmup_steps) / max(1, training.steps - training.lr_warmup_steps)
    return rise * (1 - progress if training.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * progress)))


class Run:
    """One stage's training run: wraps model and optimiser, resumes, and keeps the books.

    The loop is the caller's:

        for batch in run.batches(dataset):
            with run.accumulate():
                loss = …
                run.backward(loss)
                run.update(loss=loss)

    `contract` is stored in each checkpoint; resuming under another is refused. An `adversary`, given with its learning
    rate, trains beside the model: it learns from whatever `backward` leaves in its gradients. `name` tells people what
    sample a position is. A `sharded` model is spread over the processes where accelerate's configuration says so.

    Within the block of a `DryRun` it takes its steps to measure them, writes no checkpoint, and ends before the export.
    """

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        stage: str,
        model: nn.Module,
        contract: dict[str, Any] | None = None,
        adversary: tuple[nn.Module, float] | None = None,
        name: Callable[[int], str] = "sample {}".format,
        sharded: bool = False,
    ):
        self.config, self.training, self.stage = config, training, stage
        self.dry_run = dry_run.current()
        self.contract = json.loads(json.dumps(contract or {}))
        self.folder = config.dir / stage
        self.passes = accumulated(stage, training, join(config).num_processes)
        self.accelerator = accelerator(config, self.passes.steps)
        self.device, self.precision = self.accelerator.device, precision(config)
        self._checkpoints = CheckpointManager(self.folder, config.checkpoints_total_limit)
        self._logger = MetricsLogger(self.folder / "metrics.jsonl", self.accelerator)
        self._check_contract()
        if self.is_main and self.device.type == "cpu":
            say_idle_cores(self.accelerator.num_processes)
        if sharded:
            shard(self.accelerator, training, self.passes)
        zero = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        kind = ZeroNetwork if zero else Network
        self._network = kind(model, training.lr, training, self.accelerator, self.precision)
        self._adversary = adversary and Network(*adversary, training, self.accelerator, self.precision)
        self._networks = [network for network in (self._network, self._adversary) if network]
        self.model, self.module, self.parameters = (
            self._network.ddp_model,
            self._network.module,
            self._network.parameters,
        )
        self.ema = Averages(((name, p) for name, p in self.module.named_parameters() if p.requires_grad), training)
        self.step = 0  # optimiser steps done
        self.skips = Skips(name)
        self._metrics: list[dict[str, torch.Tensor]] = []  # of this step, a pass each
        self._places: dict[str, Any] = {}  # of a stream: how far this process's lanes have been read
        self._bar: tqdm | None = None
        self._clock = Clock()
        self._signals = SignalHandler()
        self._stopped = 0  # the one that was heeded
        self._released = False
        self._resume()
        if self.accelerator.log_with:
            self.accelerator.init_trackers(self.stage)
        if self.dry_run:
            self.dry_run.weight_bytes = sum(p.numel() * p.element_size() for p in self.parameters)
        self._begin("encoding the data")

    def _check_contract(self) -> None:
        """UserError, on all processes, where one has other pictures or latents than the main one."""
        for rank, theirs in enumerate(every := gather_objects(self.contract)):
            if changed := "; ".join(differences(every[0], theirs)):
                raise UserError(
                    f"{self.stage}: process {rank} has other pictures, captions or latents than process 0 ({changed}); "
                    "give data and autoencoder on a file system that all machines share"
                )

    # ------------------------------------------------------------------------------------------------ the loop's side

    def batches(self, dataset: torch.utils.data.Dataset[Any] | Stream, workers: int = 0) -> Iterator[Any]:
        """Micro-batches of this process from where the run stands to its end, on its device but for `position`."""
        t, a = self.training, self.accelerator
        self._begin("a training step")
        hidden = bool(self.dry_run and not self.dry_run.progress)
        self._bar = tqdm(
            total=t.steps * t.batch, initial=self.step * t.batch, unit=" img", desc=self.stage, smoothing=0.1,
            disable=hidden or not a.is_main_process, dynamic_ncols=True, mininterval=1 if sys.stderr.isatty() else 30,
        )  # fmt: skip
        self._start_clock()
        self.model.train()
        try:
            with nullcontext() if self.dry_run else self._signals.installed():
                for batch in self._loaded(dataset, workers):
                    yield batch
                    if self._stopped:
                        raise Interrupted(128 + self._stopped)
                if self._signals.end and a.num_processes == 1:  # it came after the last step was saved
                    raise Interrupted(128 + self._signals.end)
            if self.dry_run:
                a.free_memory()
                raise dry_run.Finished
        except BaseException:
            self.close()
            raise
        finally:
            self._bar.close()

    def _loaded(self, dataset: torch.utils.data.Dataset[Any] | Stream, workers: int) -> Iterator[Any]:
        """This process's passes."""
        t, a = self.training, self.accelerator
        loader: Iterable[Any]
        if isinstance(dataset, Stream):
            loader = dataset.batches(t, self.step, a.process_index, a.num_processes, workers, self._places)
        else:
            positions = Positions(self.step, t.steps, t.batch, self.passes.steps, a.process_index, a.num_processes)
            loader = torch.utils.data.DataLoader(
                dataset, batch_sampler=positions, num_workers=workers, pin_memory=a.device.type == "cuda",
                worker_init_fn=leave_signals_to_parent,
            )  # fmt: skip
        for batch in self._clock.waiting(loader):
            position = batch.pop("position")
            self.skips.bring(position, batch.pop("key", ()))
            self._places.update(batch.pop("places", {}))
            yield {"position": position, **send_to_device(batch, self.device, non_blocking=True)}

    def _start_clock(self) -> None:
        """For the progress line: the peak is measured now, FLOPs are counted after the first line of metrics."""
        a = self.accelerator
        begun, peak = self.step, a.num_processes * matmul_peak(self.device, DTYPES[self.precision])
        self._clock.restart()

        def count(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if self.step < begun + self.config.log_every:  # trials end before
                return
            hook.remove()
            flops = TRAINING * forward_flops(self._network.plain, *arguments, **options) / self.passes.images
            self._clock.restart(flops, peak)

        hook = self.model.register_forward_pre_hook(count, with_kwargs=True)

    def accumulate(self) -> AbstractContextManager[Any]:
        """Gradients are added up, and synchronised over processes, over the passes of one step."""
        return self.accelerator.accumulate(*(network.ddp_model for network in self._networks))

    def autocast(self) -> AbstractContextManager[Any]:
        """The run's mixed precision, as in the forward pass of `model`."""
        return self._network.autocast()

    @property
    def adversary(self) -> nn.Module:
        assert self._adversary, "this run was given none"
        return self._adversary.ddp_model

    def frozen_discriminator(self, x: torch.Tensor) -> torch.Tensor:
        """The adversary's output for a batch, with gradients for `x` and none for the adversary."""
        assert self._adversary, "this run was given none"
        bare = self._adversary.module
        frozen = {name: p.detach() for name, p in bare.named_parameters()}
        return torch.func.functional_call(bare, frozen, (x,))  # type: ignore[no-any-return]

    def track_nonfinite(self, positions: torch.Tensor, outputs: torch.Tensor) -> None:
        """Keeps in mind whose output `(N, …)` is not finite, to name these samples should the step be skipped."""
        self.skips.track_nonfinite(positions, outputs)

    def backward(self, loss: torch.Tensor) -> None:
        if self.accelerator.sync_gradients:  # the last pass of a step
            for network in self._networks:
                network.set_rate(network.lr * learning_rate(self.step, self.training))
        self._network.backward(loss)

    def update(self, **metrics: torch.Tensor) -> None:
        """After each pass, whose metrics are scalars; means are logged.

        After a step's last one: clips, steps, averages, logs, saves. A step with a loss or gradient that is not finite
        is skipped; UserError after `run.max_skipped` in a row.
        """
        self._metrics.append({name: value.detach().float() for name, value in metrics.items()})
        if not self.accelerator.sync_gradients:
            return
        learning = [network for network in self._networks if network.has_gradients]
        for network in learning if self.accelerator.scaler else ():
            self.accelerator.unscale_gradients(network.optimizer)
        norms = [network.clip_gradients() for network in learning]
        finite, stop, save = self._agreed(norms)
        if self._take_step(learning, finite):
            self._metrics[-1] |= zip(("gradient_norm", "adversary_gradient_norm"), norms, strict=False)
            self.ema.step()
        for network in self._networks:
            network.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        names = self.skips.end_step(finite)
        if finite:
            self._logger.add(self._metrics)
        else:
            self._say_skipped(names)
        self._metrics = []
        self._after_step(stop, save)

    def _agreed(self, norms: list[torch.Tensor]) -> tuple[bool, int, bool]:
        """Of all processes: is the step finite, which signal asks for the end, is a checkpoint wanted?"""
        values = [value for each in self._metrics for value in each.values()]
        if self.loss_scale <= 1:  # above, a gradient that is not tells that fp16's scale is too high
            values += norms
        finite = torch.stack([value.to(self.device) for value in values]).isfinite().all()
        if self.accelerator.num_processes == 1:
            return bool(finite), self._signals.end, self._signals.save
        flags = torch.stack([~finite, *torch.tensor([self._signals.end, self._signals.save], device=self.device)])
        bad, stop, save = self.accelerator.gather(flags[None]).amax(0).tolist()
        return not bad, stop, bool(save)

    def _take_step(self, networks: list[Network], finite: bool) -> bool:
        """False where nothing was learned: it was not finite, or fp16's scale was too high and has been lowered."""
        scaler = self.accelerator.scaler
        if not scaler:
            for network in networks:
                network.step(finite)
            return finite
        for network in networks if finite else ():  # accelerate's step lets the scale change between two optimisers
            scaler.step(network.optimizer.optimizer)
        before = scaler.get_scale()
        scaler.update()
        return finite and bool(scaler.get_scale() >= before)

    def _say_skipped(self, names: str) -> None:
        """Says whose step was skipped; UserError where it has become too many in a row."""
        said, skips = f"{self.stage}: a loss or gradient is not finite at step {self.step}, of {names}", self.skips
        if skips.in_a_row >= self.config.max_skipped:
            last = self._checkpoints.last()
            kept = f"{last} stands" if last else "there is no checkpoint yet"
            raise UserError(
                f"{said}; {skips.in_a_row} steps in a row were so, and nothing was learned from them; {kept}. Raise "
                f"run.max_skipped to go on, or mend these samples or lower {self.stage}.lr and start with --fresh"
            )
        if self._bar is not None and self.is_main:
            self._bar.write(f"{said}; the step is skipped, {skips.in_a_row} in a row, {skips.total} in all")

    def due(self, every: int, last: bool = False) -> bool:
        """After each step whose number is a multiple of `every`, the last one only where asked for.

        Before the first batch of a run that goes on, the same for what its last step may have left undone.
        """
        at_end = self.step == self.training.steps
        if self.dry_run:
            return self.dry_run.evaluate and at_end and self.accelerator.sync_gradients
        return self.accelerator.sync_gradients and not self._stopped and (last if at_end else self.step % every == 0)

    @contextmanager
    def averaged(self, activity: str) -> Iterator[None]:
        """Within it, the model has its EMA weights, is in evaluation mode, and runs eagerly where it was compiled.

        `activity` tells a dry run what for, should memory run out.
        """
        before = self._begin(activity)
        compiled = any(module._compiled_call_impl for module in self.module.modules())
        with torch.compiler.set_stance("force_eager") if compiled else nullcontext():
            if self._released:
                yield
            else:
                with self._evaluating():
                    yield
        self._begin(before)  # not after an error, which tells of it

    def _begin(self, activity: str) -> str:
        """Tells a dry run what memory and time are needed for from now on; returns what they were needed for before."""
        return self.dry_run.begin(activity) if self.dry_run else ""

    @contextmanager
    def _evaluating(self) -> Iterator[None]:
        self.ema.swap()
        if isinstance(self.module, FSDPModule):  # parts of it are called by themselves
            self.module.unshard()
        self.module.eval()
        try:
            yield
        finally:
            if isinstance(self.module, FSDPModule):
                self.module.reshard()
            self.ema.swap()
            self.module.train()

    def export_ema(self) -> Any:
        """Ends the training: the model with its EMA weights, whole, and computing as it was built, without autocast."""
        self._released = True
        return self._network.export_ema(self.ema.tensors(self.ema.main))

    def close(self) -> None:
        """Ends the trackers' runs: last, after the last sheet."""
        self._logger.close()

    def log(self, values: dict[str, float]) -> None:
        """A line of metrics, to the trackers too."""
        if self.dry_run:
            told = {"loss_scale": self.loss_scale, "skipped": self.step - self.ema.updates}
            self.dry_run.lines.append({"step": self.step, "time": time.time(), **values, **told})
        else:
            self._logger.write(self.step, values)

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies losses by; 1 in other precisions."""
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler else 1.0

    def mean(self, tensor: torch.Tensor) -> torch.Tensor:
        """Mean over processes; on one, the tensor itself."""
        return self.accelerator.reduce(tensor, "mean")  # type: ignore[no-any-return]

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes, where the tensor was."""
        return self.accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)  # type: ignore[no-any-return]

    def averages(self, parameter: nn.Parameter) -> list[torch.Tensor]:
        """Those of a parameter: one, or one of each of `ema_widths`."""
        i = next(i for i, p in enumerate(self.parameters) if p is parameter)
        return [model.shadow_params[i] for model in self.ema.models]

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------ the books

    def _after_step(self, stop: int, save: bool) -> None:
        t, bar = self.training, self._bar
        assert bar is not None  # steps are taken within `batches`
        bar.update(t.batch)
        self._clock.count(t.batch)
        if self.dry_run:
            self.dry_run.end_step()
        if self.step % self.config.log_every == 0 or self.step == t.steps:
            self._log(bar)
        if self.dry_run:
            return
        if self.ema.due(self.step):  # before the checkpoint, which is where a killed run goes on
            self.ema.snapshot(self.folder / "ema", self.step)
        if stop or save or self.step % t.checkpoint_every == 0 or self.step == t.steps:
            self.save()
        if save:
            self._signals.save = False
        if stop or save:
            rest = "stopped and saved at step {}; the same command continues." if stop else "saved at step {}."
            if self.is_main:
                bar.write(f"{self.stage}: {rest.format(self.step)}")
        self._stopped = stop

    def _log(self, bar: tqdm) -> None:
        t = self.training
        values = self._logger.pop_means()
        rate = learning_rate(self.step - 1, self.training)
        values |= zip(("lr", "adversary_lr"), [network.lr * rate for network in self._networks], strict=False)
        if self.skips.total:
            values["skipped"] = self.skips.total
        speed = self._clock.read()
        self.log(values | speed)
        shown = {name: f"{value:.3g}" for name, value in values.items() if not name.endswith("gradient_norm")}
        shown |= {name: f"{speed[name]:.0%}" for name in ("waiting", "mfu") if name in speed}
        bar.set_postfix({"step": f"{self.step}/{t.steps}", "batch": t.batch} | shown, refresh=False)

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Writes `checkpoints/step-000500` whole or not at all; older ones go only after it stands.

        UserError, on all processes, where it can't be written.
        """
        metrics = self._logger.state()
        places: dict[str, Any] = {}
        for each in gather_object([self._places]):  # the others know a lane's place only from an earlier start
            places.update({lane: max(tuple(place), tuple(places.get(lane, place))) for lane, place in each.items()})
        parts, groups = self.ema.state(), {}
        for network, (model, optimizer) in zip(self._networks, PARTS, strict=False):
            parts[model], parts[optimizer], groups[optimizer] = network.state()
        state: dict[str, Any] = {
            "step": self.step,
            "ema_step": self.ema.updates,
            "groups": groups,
            "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
            **metrics,
            "metrics_bytes": 0,
            "skipped": self.skips.total,
            "in_a_row": self.skips.in_a_row,
            "places": places,
            "contract": self.contract,
        }

        def write() -> None:
            state["metrics_bytes"] = self._logger.synced_bytes()
            self._checkpoints.write(self.step, parts, state)

        on_main(write)

    def _resume(self) -> None:
        """Continues from the newest sound checkpoint; a damaged one is named, set aside and passed over."""
        metrics_bytes: int | None = 0
        if newest := self._checkpoints.read_newest(self._say):
            folder, parts, state = newest
            if state["contract"] != self.contract:
                changed = "; ".join(differences(state["contract"], self.contract))
                raise UserError(
                    f"{folder}: its pictures, captions or latents were others ({changed}); "
                    "give back those that it was trained with, or start with --fresh"
                )
            for network, (model, optimizer) in zip(self._networks, PARTS, strict=False):
                network.load(parts[model], parts[optimizer], state["groups"][optimizer])
            self.ema.load(parts, state["ema_step"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, metrics_bytes = state["step"], state.get("metrics_bytes")  # none of an older version's
            self._logger.load(state)
            self.skips.total, self.skips.in_a_row = state.get("skipped", 0), state.get("in_a_row", 0)
            self._places = state["places"]
            if self.step < self.training.steps:
                self._say(f"{self.stage}: continuing from step {self.step} of {self.training.steps}.")
        self.accelerator.wait_for_everyone()
        if self.is_main:
            self._checkpoints.set_damaged_aside()
            self._drop_later(metrics_bytes)
        self.accelerator.wait_for_everyone()

    def _drop_later(self, metrics_bytes: int | None) -> None:
        """Removes what was written after the step that the run goes on from; it will be made again.

        Sheets, snapshots, and the metrics beyond so many bytes; None keeps them all.
        """
        if metrics_bytes is not None:
            self._logger.truncate(metrics_bytes)
        for path in (*self.folder.glob("samples/step-*"), *self.folder.glob("ema/step-*")):
            number = path.name.split("-")[1].partition(".")[0]
            if number.isdigit() and (int(number) > self.step or not self.step):
                path.unlink()

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)
