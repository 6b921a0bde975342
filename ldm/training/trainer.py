"""`Trainer`: the bookkeeping of a training run, so that a loop can show nothing but its idea.

Processes and precision (accelerate), learning rate, EMA, progress, metrics, atomic checkpoints, exact resume, signals.
Random numbers are not kept here: they follow from the position in the run (`ldm.data.sampler`).
"""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, gather_object, send_to_device
from torch import nn

from ldm.config.loader import key_of
from ldm.config.schema import Config, RunConfig, Training
from ldm.data.sampler import ORDER
from ldm.data.stream import Stream
from ldm.distributed.launch import accelerator, accumulated, join, precision, say_idle_cores
from ldm.distributed.sharding import shard
from ldm.training import dry_run
from ldm.training.budget import LoadWatch, Paused, planned_threads
from ldm.training.checkpoint import CheckpointManager
from ldm.training.checkpoint_writer import CheckpointWriter, Copies, Parts
from ldm.training.deepspeed import ZeroEngine
from ldm.training.ema import Averages
from ldm.training.engine import Engine, clip_gradients, step_optimizers, total_bytes
from ldm.training.fingerprint import check_same, check_same_on_all_processes, order_changed
from ldm.training.loading import load_batches, report_slow
from ldm.training.metrics_logger import MetricsLogger
from ldm.training.nonfinite import NonfiniteTracker
from ldm.training.optimizer import lr_factor
from ldm.training.progress import ProgressBar
from ldm.training.run_dir import remove_later_outputs
from ldm.training.signals import Interrupted, SignalHandler
from ldm.training.throughput import Clock, gpu_power, matmul_peak
from ldm.utils.errors import UserError
from ldm.utils.precision import DTYPES

PARTS = (("model", "optimizer"), ("discriminator", "discriminator_optimizer"))  # each engine's files in a checkpoint


class Trainer:
    """One stage's training: wraps model and optimizer, resumes, logs and saves. The loop is the caller's:

        for batch in trainer.batches(dataset):
            with trainer.accumulate():
                loss = …
                trainer.backward(loss)
                trainer.optimizer_step()
                trainer.log(loss=loss)
            trainer.checkpoint_if_due()

    `fingerprint` is stored in each checkpoint; resuming under another is refused. A `discriminator`, which comes with
    its learning rate, trains with the model: it learns from whatever `backward` leaves in its gradients. `name` says
    which sample a position is. A `sharded` model is sharded where accelerate's configuration says so. All is
    written to `run_dir/stage`, by default in `config.dir`. After step `pause_after`, `batches` writes a checkpoint and
    raises `Paused`; what else is due there is done by the `Trainer` that continues.

    Within the block of a `DryRun` it takes its steps to measure them, writes no checkpoint, and ends before the export.
    """

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        stage: str,
        model: nn.Module,
        fingerprint: dict[str, Any] | None = None,
        discriminator: tuple[nn.Module, float] | None = None,
        name: Callable[[int], str] = "sample {}".format,
        sharded: bool = False,
        run_dir: Path | None = None,
        pause_after: int = 0,
    ):
        self.config, self.training, self.stage, self._pause = config, training, stage, pause_after
        self.dry_run = dry_run.current()
        self.fingerprint = json.loads(json.dumps(fingerprint or {}))
        self.folder = (run_dir or config.dir) / stage
        self.accumulation = accumulated(stage, training, join(config).num_processes)
        self.accelerator = accelerator(config, self.accumulation.steps, self.folder.parent)
        self.device, self.precision = self.accelerator.device, precision(config)
        self._checkpoints = CheckpointManager(self.folder, config.checkpoints_total_limit)
        self._writer = CheckpointWriter()
        self._logger = MetricsLogger(self.folder / "metrics.jsonl", self.accelerator)
        check_same_on_all_processes(stage, self.fingerprint)
        planned = self.is_main and planned_threads(config.dir) == torch.get_num_threads()
        if self.is_main and self.device.type == "cpu" and not planned:
            say_idle_cores(self.accelerator.num_processes)
        if sharded:  # before the first engine: accelerate's plugins must know
            shard(self.accelerator, training, self.accumulation)
        zero = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        self._engine = (ZeroEngine if zero else Engine)(model, training.lr, training, self.accelerator, self.precision)
        self.discriminator = discriminator and Engine(*discriminator, training, self.accelerator, self.precision)
        self._engines = [self._engine, *([self.discriminator] if self.discriminator else [])]
        self.model, self.module = self._engine.ddp_model, self._engine.module
        self.parameters, self.autocast = self._engine.parameters, self._engine.autocast
        trained = ((name, p) for name, p in self.module.named_parameters() if p.requires_grad)
        self.ema = Averages(trained, training, self._engine.moment)  # of the sharded parameters, so after the engine
        self.step = 0  # optimizer steps done
        self.nonfinite = NonfiniteTracker(name)
        self._losses: list[torch.Tensor] = []  # of this step, of each accumulation step
        self._metrics: list[dict[str, torch.Tensor]] = []  # of this step, one of each accumulation step
        self._finite = True  # the last step
        self._gradient_norms: dict[str, torch.Tensor] = {}  # of the last step
        self._stream_positions: dict[str, Any] = {}  # how far this process's lanes of a stream have been read
        self._progress: ProgressBar | None = None
        self._clock = Clock(power=self._power)
        self._signals = SignalHandler()
        self._stop, self._save = 0, False  # which signal ended the last step, and whether one asked for a checkpoint
        self._exported = False
        self._resume()
        if self.accelerator.log_with:  # after `_resume`, which truncates what a killed run logged too far
            self.accelerator.init_trackers(self.stage)
        if self.dry_run:
            self.dry_run.weight_bytes = total_bytes(self.parameters)
            self.dry_run.frozen_bytes = total_bytes(p for p in self.module.parameters() if not p.requires_grad)
        self._begin("encoding the data")

    # ---------------------------------------------------------------------------------------------------- the loop

    def batches(
        self, dataset: torch.utils.data.Dataset[Any] | Stream, workers: int = 0, prefetch_factor: int = 2
    ) -> Iterator[Any]:
        """This process's batches, one an accumulation step; all but `position` is on its device."""
        t, a = self.training, self.accelerator
        self._begin("a training step")
        hidden = bool(self.dry_run and not self.dry_run.progress) or not self.is_main
        load_watch = None if hidden else LoadWatch.of(self.config.dir, self.stage, t.steps)
        self._progress = ProgressBar(self.stage, self.step, t.steps, t.batch, hidden, load_watch)
        start = self.step
        if self.is_main:  # which alone writes metrics
            self._clock.count_flops(  # after the first line of metrics; dry runs end before
                self.model,
                self._engine.unsharded,
                self.accumulation.images,
                a.num_processes * matmul_peak(self.device, DTYPES[self.precision]),
                lambda: self.step >= start + self.config.log_every,
            )
        self._clock.restart()
        self.model.train()
        try:
            with nullcontext() if self.dry_run else self._signals.installed():
                for batch in self._load(dataset, workers, prefetch_factor):
                    yield batch
                    if self._stop:
                        raise Interrupted(128 + self._stop)
                    if self.step == self._pause > start:
                        self._pause_now()
                self._writer.wait()
                if self._signals.end and a.num_processes == 1:  # it came after the last step was saved
                    raise Interrupted(128 + self._signals.end)
            if self.dry_run:
                states = (total_bytes(engine.parameters) + engine.optimizer_bytes() for engine in self._engines)
                averages = max(1, len(self.training.ema_widths)) * self.dry_run.weight_bytes
                self.dry_run.checkpoint_bytes = sum(states) + averages
                a.free_memory()
                raise dry_run.Finished
        except BaseException:
            self.close()
            raise
        finally:
            self._progress.close()

    def _pause_now(self) -> None:
        """Frees what the next `Trainer` will hold; ends the run where a signal came after the step."""
        self._writer.wait()
        _, stop, _ = self._signals.agree(torch.tensor(True, device=self.device), self.accelerator)
        if stop:
            raise Interrupted(128 + stop)
        self.accelerator.free_memory()
        raise Paused

    def _load(
        self, dataset: torch.utils.data.Dataset[Any] | Stream, workers: int, prefetch_factor: int
    ) -> Iterator[Any]:
        loader = load_batches(
            dataset,
            self.training,
            self.step,
            self.accumulation.steps,
            self.accelerator,
            workers,
            prefetch_factor,
            self._stream_positions,
        )
        for batch in self._clock.waiting(report_slow(loader, self.stage)):
            position = batch.pop("position")
            self.nonfinite.add_keys(position, batch.pop("key", ()))
            self._stream_positions.update(batch.pop("places", {}))
            yield {"position": position, **send_to_device(batch, self.device, non_blocking=True)}

    def accumulate(self) -> AbstractContextManager[Any]:
        """Gradients add up over the accumulation steps of a step; processes synchronise them in the last one."""
        return self.accelerator.accumulate(*(engine.ddp_model for engine in self._engines))

    def backward(self, loss: torch.Tensor) -> None:
        """Adds a loss's gradients up; twice a batch where model and discriminator have losses of their own."""
        self._losses.append(loss.detach().float())
        self._engine.backward(loss)

    def optimizer_step(self) -> None:
        """After the last accumulation step: clips gradients, steps, and updates the averages; nothing before.

        A step with a loss or gradient that is not finite is skipped; UserError after `run.max_skipped` in a row.
        """
        if not self.accelerator.sync_gradients:
            return
        for engine in self._engines:
            engine.set_lr(engine.lr * lr_factor(self.step, self.training))
        learning = [engine for engine in self._engines if engine.has_gradients]
        norms = clip_gradients(learning)
        values = self._losses + (norms if self.loss_scale <= 1 else [])  # above, fp16's scale may be too high
        finite = torch.stack([value.to(self.device) for value in values]).isfinite().all()
        self._signals.save |= self._writer.failed  # asks for a checkpoint, which raises the error on all processes
        self._finite, self._stop, self._save = self._signals.agree(finite, self.accelerator)
        self._gradient_norms = {}
        if step_optimizers(learning, self._finite, self.accelerator):
            names = ("gradient_norm", "discriminator_gradient_norm")
            self._gradient_norms = dict(zip(names, norms, strict=False))
            self.ema.step()
        for engine in self._engines:
            engine.optimizer.zero_grad(set_to_none=True)
        self._losses = []
        self.step += 1
        samples = self.nonfinite.end_step(self._finite)
        if not self._finite:
            self._report_skipped(samples)

    def _report_skipped(self, samples: str) -> None:
        """A line about a skipped step; UserError where there have been too many in a row."""
        skipped = self.nonfinite
        message = f"{self.stage}: a loss or gradient is not finite at step {self.step}, of {samples}"
        if skipped.in_a_row >= self.config.max_skipped:
            self._writer.wait()
            last = self._checkpoints.last()
            lr = key_of(self.stage, "lr") + (f" and {key_of(self.stage, 'muon_lr')}" if self.training.muon_lr else "")
            is_run = self.stage in Config.model_fields  # not a model made from a run, which has its run.max_skipped
            raise UserError(
                f"{message}; {skipped.in_a_row} steps in a row were so, and nothing was learned from them; "
                f"{f'{last} stands' if last else 'there is no checkpoint yet'}. "
                f"{'Raise run.max_skipped to go on, or mend' if is_run else 'Mend'} these samples or lower {lr} and "
                f"{'start with --fresh' if is_run else 'give another --out'}"
            )
        if self._progress and self.is_main:
            self._progress.write(f"{message}; the step is skipped, {skipped.in_a_row} in a row, {skipped.total} in all")

    def log(self, **metrics: torch.Tensor) -> None:
        """Adds the scalars of a batch; a line of their means follows every `run.log_every` steps, and the last one.

        A pair `(2,)` is a sum and a count of a varying number of samples.
        """
        self._metrics.append({name: value.detach().float() for name, value in metrics.items()})
        if not self.accelerator.sync_gradients:
            return
        if self._finite:
            self._metrics[-1] |= self._gradient_norms
            self._logger.add(self._metrics)
        self._metrics = []
        assert self._progress  # steps are taken within `batches`
        self._progress.advance()
        self._clock.count(self.training.batch)
        if self.dry_run:
            self.dry_run.end_step()
        if self.step % self.config.log_every and self.step != self.training.steps:
            return
        values = self._logger.pop_means()
        factor = lr_factor(self.step - 1, self.training)
        values |= zip(("lr", "discriminator_lr"), [engine.lr * factor for engine in self._engines], strict=False)
        if self.nonfinite.total:
            values["skipped"] = self.nonfinite.total
        speed = self._clock.read()
        self.log_values(values | speed)
        self._progress.show(self.step, values, speed)

    def log_values(self, values: dict[str, float]) -> None:
        """Writes a line of metrics, to the trackers too."""
        if self.dry_run:
            state = {"loss_scale": self.loss_scale, "skipped": self.step - self.ema.updates}
            self.dry_run.lines.append({"step": self.step, "time": time.perf_counter(), **values, **state})
        else:
            self._logger.write(self.step, values)

    def _power(self) -> float | None:
        """The watts of all GPUs, as if each drew what the first one does."""
        watts = gpu_power(self.accelerator.device)
        return watts and watts * self.accelerator.num_processes

    def checkpoint_if_due(self) -> None:
        """After a step: writes a checkpoint every `checkpoint_every` steps, at the end, and when a signal asks."""
        t = self.training
        if self.dry_run or not self.accelerator.sync_gradients:
            return
        signalled = bool(self._stop or self._save)
        if signalled or self.step % t.checkpoint_every == 0 or self.step in (self._pause, t.steps):
            self.save()
        elif self.ema.due(self.step):
            self._writer.start(self.ema.state(), self.ema.snapshot_writer(self.folder / "ema", self.step))
        if signalled:
            self._writer.wait()
        if self._save:
            self._signals.save = False
        if signalled and self.is_main and self._progress:
            stopped = "stopped and saved at step {}; the same command continues."
            self._progress.write(f"{self.stage}: {(stopped if self._stop else 'saved at step {}.').format(self.step)}")

    def due(self, every: int, last: bool = False) -> bool:
        """Whether a step was done whose number is a multiple of `every`; the last one only with `last`.

        Before the first batch of a resumed run, the same for what its last step may not have finished.
        """
        at_end = self.step == self.training.steps
        if self.dry_run:
            return self.dry_run.evaluate and at_end and self.accelerator.sync_gradients
        ends_here = self._stop or (self.step == self._pause and not at_end)
        return self.accelerator.sync_gradients and not ends_here and (last if at_end else self.step % every == 0)

    @contextmanager
    def ema_weights(self, activity: str) -> Iterator[None]:
        """Within it, the model has its EMA weights, is in evaluation mode, and runs eagerly where it was compiled.

        `activity` tells a dry run what for, should memory run out.
        """
        before = self._begin(activity)
        compiled = any(module._compiled_call_impl for module in self.module.modules())
        eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
        with eager, nullcontext() if self._exported else self.ema.swapped(self.module):
            yield
        self._begin(before)  # not after an error, which tells of it

    def _begin(self, activity: str) -> str:
        """Tells a dry run what memory and time are needed for from now on; returns what for before."""
        return self.dry_run.begin(activity) if self.dry_run else ""

    def export_ema(self) -> Any:
        """Ends the training: the model with its EMA weights, unsharded, as it was built, without autocast."""
        self._exported = True
        return self._engine.export_ema(self.ema.tensors(self.ema.main))

    def close(self) -> None:
        """Ends the trackers' runs, and waits for a checkpoint being written: last, after the last sample grid."""
        self._writer.close(abandon=self._signals.at_once)
        self._logger.close()

    @property
    def loss_scale(self) -> float:
        """What fp16 multiplies losses by; 1 in other precisions."""
        scaler = self.accelerator.scaler
        return float(scaler.get_scale()) if scaler else 1.0

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over processes, on the tensor's device."""
        return self.accelerator.reduce(tensor.to(self.device), "sum").to(tensor.device)  # type: ignore[no-any-return]

    # ------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Copies the state; a thread writes it as `checkpoints/step-000500`, atomically, and then removes older ones.

        UserError, on all processes, where the write before this one has failed.
        """
        step, snapshot = self.step, None
        parts, state = self._state()
        if self.ema.due(step):
            snapshot = self.ema.snapshot_writer(self.folder / "ema", step)

        def write(copies: Copies) -> None:
            if snapshot:  # before the checkpoint, from which a killed run continues
                snapshot(copies)
            self._logger.sync()  # at least so far as the checkpoint has it
            self._checkpoints.write(step, copies, state)

        self._writer.start(parts, write)

    def _state(self) -> tuple[Parts, dict[str, Any]]:
        """A checkpoint's tensors, which train on, and a copy of all else. All processes call it."""
        state: dict[str, Any] = {"step": self.step, "ema_step": self.ema.updates, "groups": {}}
        parts, lanes = self.ema.state(), dict[str, Any]()
        for positions in gather_object([self._stream_positions]):  # others know a lane's only from an earlier start
            lanes.update({lane: max(tuple(at), tuple(lanes.get(lane, at))) for lane, at in positions.items()})
        for engine, (model, optimizer) in zip(self._engines, PARTS, strict=False):
            parts[model], parts[optimizer], state["groups"][optimizer] = engine.state()
        scaler = self.accelerator.scaler
        state |= {
            "scaler": scaler.state_dict() if scaler else None,
            **self._logger.state(),
            **self.nonfinite.state(),
            "places": lanes,
            "order": ORDER,
            "fingerprint": self.fingerprint,
            "metrics_bytes": self._logger.size(),
        }
        return parts, copy.deepcopy(state)

    def _resume(self) -> None:
        """Continues from the newest sound checkpoint; a damaged one is named, set aside and passed over."""
        metrics_bytes: int | None = 0
        if newest := self._checkpoints.read_newest(self._print):
            folder, parts, state = newest
            check_same(folder, state["fingerprint"], self.fingerprint)
            for engine, (model, optimizer) in zip(self._engines, PARTS, strict=False):
                engine.load(parts[model], parts[optimizer], state["groups"][optimizer])
            self.ema.load(parts, state["ema_step"])
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step, metrics_bytes = state["step"], state.get("metrics_bytes")  # none of an older version's
            self._logger.load(state)
            self.nonfinite.load(state)
            self._stream_positions = state["places"]
            if self.step < self.training.steps:
                self._print(f"{self.stage}: continuing from step {self.step} of {self.training.steps}.")
                if order := order_changed(state):
                    self._print(f"{self.stage}: {order}")
        self.accelerator.wait_for_everyone()  # all have read it
        if self.is_main:
            self._checkpoints.tidy_up()
            if metrics_bytes is not None:
                self._logger.truncate(metrics_bytes)
            remove_later_outputs(self.folder, self.step)
        self.accelerator.wait_for_everyone()

    def _print(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)
