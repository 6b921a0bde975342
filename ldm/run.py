"""`Run`: the bookkeeping of a training run, so that a loop can show nothing but its idea.

Processes and precision (accelerate), learning rate, EMA, progress, metrics, atomic checkpoints, exact resume, signals.
Random numbers are not kept here: they follow from the position in the run (`ldm.data.order`).
"""

from __future__ import annotations

import json
import math
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import gather_object, send_to_device
from diffusers.training_utils import EMAModel
from torch import nn
from tqdm import tqdm

from ldm.config import differences
from ldm.data.order import Positions
from ldm.data.stream import Stream
from ldm.errors import UserError
from ldm.files import flatten_optimizer, read_checkpoint, unflatten_optimizer, whole_file, write_checkpoint
from ldm.processes import accelerator, local_batch, say_idle_cores
from ldm.schema import RunConfig, Training


class Interrupted(SystemExit):
    """Raised after the checkpoint of a run that was asked to stop; its code is the shell's 128 + signal."""


def learning_rate(step: int, training: Training) -> float:
    """Learning rate of the optimiser step `step`, counted from 0: linear warm-up, then constant or half a cosine."""
    rise = min(1.0, (step + 1) / max(1, training.warmup))
    if training.decay == "constant":
        return training.lr * rise
    progress = max(0, step - training.warmup) / max(1, training.steps - training.warmup)
    return training.lr * rise * 0.5 * (1 + math.cos(math.pi * progress))


class Run:
    """One stage's training run: wraps model and optimiser, resumes, and keeps the books.

    The loop is the caller's:

        for batch in run.batches(dataset):
            with run.accumulate():
                loss = …
                run.backward(loss)
                run.update(loss=loss)

    `contract` is stored in each checkpoint; resuming under another is refused.
    """

    def __init__(
        self,
        config: RunConfig,
        training: Training,
        stage: str,
        model: nn.Module,
        contract: dict[str, Any] | None = None,
    ):
        self.config, self.training, self.stage = config, training, stage
        self.contract = json.loads(json.dumps(contract or {}))
        self.folder = config.dir / stage
        self.accelerator = accelerator(config, training.micro_batches)
        self.device = self.accelerator.device
        local_batch(stage, training, self.accelerator.num_processes)
        if self.is_main and self.device.type == "cpu":
            say_idle_cores(self.accelerator.num_processes)
        self.bare = model.to(self.device)
        trainable = [p for p in model.parameters() if p.requires_grad]
        fused = torch.optim.AdamW(
            trainable, training.lr, betas=training.betas, weight_decay=training.weight_decay, fused=True
        )
        self.model, self.optimizer = self.accelerator.prepare(model, fused)
        self.ema = EMAModel(trainable, decay=training.ema, foreach=True)
        self.parameters = trainable
        self.step = 0  # optimiser steps done
        self._sums: dict[str, torch.Tensor] = {}  # of each metric since the last line of metrics
        self._counts: dict[str, int] = {}
        self._places: dict[str, Any] = {}  # of a stream: how far this process's lanes have been read
        self._bar: tqdm | None = None
        self._stop: int | None = None  # the signal that asks for the end
        self._asked = 0.0
        self._stopped = 0  # the one that was heeded
        self._resume()

    # ------------------------------------------------------------------------------------------------ the loop's side

    def batches(self, dataset: torch.utils.data.Dataset[Any] | Stream, workers: int = 0) -> Iterator[Any]:
        """Micro-batches of this process from where the run stands to its end, on its device but for `position`."""
        t, a = self.training, self.accelerator
        loader: Iterable[Any]
        if isinstance(dataset, Stream):
            loader = dataset.batches(t, self.step, a.process_index, a.num_processes, workers, self._places)
        else:
            positions = Positions(self.step, t.steps, t.batch, t.micro_batches, a.process_index, a.num_processes)
            loader = torch.utils.data.DataLoader(
                dataset, batch_sampler=positions, num_workers=workers, pin_memory=a.device.type == "cuda"
            )
        before = {number: signal.signal(number, self._asked_to_stop) for number in (signal.SIGINT, signal.SIGTERM)}
        if a.log_with:
            a.init_trackers(self.stage)
        self._bar = tqdm(
            total=t.steps * t.batch, initial=self.step * t.batch, unit=" img", desc=self.stage, smoothing=0.1,
            disable=not a.is_main_process, dynamic_ncols=True, mininterval=1 if sys.stderr.isatty() else 30,
        )  # fmt: skip
        self.model.train()
        try:
            for batch in loader:
                position = batch.pop("position")
                self._places.update(batch.pop("places", {}))
                yield {"position": position, **send_to_device(batch, self.device, non_blocking=True)}
                if self._stopped:
                    raise Interrupted(128 + self._stopped)
            if self._stop and a.num_processes == 1:  # it came after the last step was saved
                raise Interrupted(128 + self._stop)
        finally:
            self._bar.close()
            for number, handler in before.items():
                signal.signal(number, handler)
            for tracker in a.trackers:
                tracker.finish()

    def accumulate(self) -> AbstractContextManager[Any]:
        """Gradients are added up, and synchronised over processes, over the micro-batches of one step."""
        return self.accelerator.accumulate(self.model)

    def backward(self, loss: torch.Tensor) -> None:
        if self.accelerator.sync_gradients:  # the last micro-batch of a step
            rate = learning_rate(self.step, self.training)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
        self.accelerator.backward(loss)

    def update(self, **metrics: torch.Tensor) -> None:
        """After a step's last micro-batch: clips, steps, averages, logs, saves. Metrics are scalars; logs means."""
        a = self.accelerator
        if a.sync_gradients:
            norm = a.clip_grad_norm_(self.parameters, self.training.clip)
        self.optimizer.step()
        skipped = a.optimizer_step_was_skipped  # fp16: the loss scale was too high and has been lowered
        if a.sync_gradients and not skipped:
            metrics["gradient_norm"] = norm
            self.ema.step(self.parameters)
        self.optimizer.zero_grad(set_to_none=True)
        for name, value in metrics.items():
            self._sums[name] = self._sums.get(name, 0) + value.detach().float()
            self._counts[name] = self._counts.get(name, 0) + 1
        if a.sync_gradients:
            self.step += 1
            self._after_step()

    def due(self, every: int) -> bool:
        """After each step but the last whose number is a multiple of `every`; a checkpoint of it stands by then."""
        between = self.step % every == 0 and self.step < self.training.steps
        return self.accelerator.sync_gradients and between and not self._stopped

    def averaged(self) -> AbstractContextManager[None]:
        """Within it, the model has its EMA weights."""
        return _Averaged(self)

    def release(self) -> None:
        """Ends mixed precision: from here on the model computes as it was built, as whoever loads it will."""
        self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    # ------------------------------------------------------------------------------------------------------ the books

    def _after_step(self) -> None:
        t, bar = self.training, self._bar
        assert bar is not None  # steps are taken within `batches`
        bar.update(t.batch)
        if self.step % self.config.log_every == 0 or self.step == t.steps:
            self._log(bar)
        stop = self._agreed_stop()
        if stop or self.step % t.checkpoint_every == 0 or self.step == t.steps:
            self.save()
        if stop:
            if self.is_main:
                bar.write(f"{self.stage}: stopped and saved at step {self.step}; the same command continues.")
            self._stopped = stop

    def _totals(self) -> dict[str, float]:
        """The sums of the metrics, mean over processes; UserError where one is not finite."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        totals = torch.stack([self._sums[name].to(self.device) for name in names])
        values = dict(zip(names, self.accelerator.reduce(totals, "mean").tolist(), strict=True))
        if not all(map(math.isfinite, values.values())):
            raise UserError(
                f"{self.stage}: a loss or gradient is not finite at step {self.step} ({values}); checkpoints "
                f"from before it stay in {self.folder / 'checkpoints'}. Start with --fresh and a lower {self.stage}.lr"
            )
        return values

    def _log(self, bar: tqdm) -> None:
        values = {name: total / self._counts[name] for name, total in self._totals().items()}
        self._sums, self._counts = {}, {}
        values["lr"] = learning_rate(self.step - 1, self.training)
        self.accelerator.log(values, step=self.step)
        bar.set_postfix(step=f"{self.step}/{self.training.steps}", loss=f"{values['loss']:.4f}", refresh=False)
        if self.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            line = {"step": self.step, **values, "time": round(time.time(), 3)}
            with (self.folder / "metrics.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")

    def _asked_to_stop(self, number: int, _frame: FrameType | None) -> None:
        if not self._stop:
            self._stop, self._asked = number, time.monotonic()
        elif time.monotonic() - self._asked > 3:  # asked again: now; sooner, it is a launcher's echo of the same wish
            raise Interrupted(128 + number)

    def _agreed_stop(self) -> int:
        """The signal that any process got, known to all, so that they stop at the same step: one that is logged."""
        if self.accelerator.num_processes == 1:
            return self._stop or 0
        if self.step % self.config.log_every and self.step < self.training.steps:
            return 0
        flag = torch.tensor(self._stop or 0, device=self.device)
        return int(self.accelerator.gather(flag[None]).max())

    # ---------------------------------------------------------------------------------------------------- checkpoints

    def save(self) -> None:
        """Writes `checkpoints/step-000500` whole or not at all; older ones go only after it stands."""
        totals = self._totals()  # nothing is saved after a step that was not finite
        places: dict[str, Any] = {}
        for each in gather_object([self._places]):  # the others know a lane's place only from an earlier start
            places.update({lane: max(place, places.get(lane, place)) for lane, place in each.items()})
        if self.is_main:
            tensors, groups = flatten_optimizer(self.optimizer.state_dict())
            parts = {
                "model": self.bare.state_dict(),
                "ema": {str(i): p for i, p in enumerate(self.ema.shadow_params)},
                "optimizer": tensors,
            }
            state = {
                "step": self.step,
                "ema_step": self.ema.optimization_step,
                "optimizer": groups,
                "scaler": self.accelerator.scaler.state_dict() if self.accelerator.scaler else None,
                "totals": totals,
                "counts": self._counts,
                "places": places,
                "contract": self.contract,
            }
            write_checkpoint(self.folder / "checkpoints" / f"step-{self.step:06d}", parts, state)
            for old in _checkpoints(self.folder)[: -self.config.keep]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def _resume(self) -> None:
        """Continues from the newest sound checkpoint; a damaged one is named, set aside and passed over."""
        damaged = []
        for folder in reversed(_checkpoints(self.folder)):
            try:
                parts, state = read_checkpoint(folder)
            except (OSError, ValueError, KeyError) as error:
                self._say(f"{folder} is damaged ({error}); going back to the checkpoint before it, or else to step 0.")
                damaged.append(folder)
                continue
            if state["contract"] != self.contract:
                changed = "; ".join(differences(state["contract"], self.contract))
                raise UserError(
                    f"{folder}: its pictures, captions or latents were others ({changed}); "
                    "give back those that it was trained with, or start with --fresh"
                )
            self.bare.load_state_dict(parts["model"])
            self.optimizer.load_state_dict(unflatten_optimizer(parts["optimizer"], state["optimizer"]))
            with torch.no_grad():
                for i, shadow in enumerate(self.ema.shadow_params):
                    shadow.copy_(parts["ema"][str(i)])
            self.ema.optimization_step = state["ema_step"]
            if self.accelerator.scaler and state["scaler"]:
                self.accelerator.scaler.load_state_dict(state["scaler"])
            self.step = state["step"]
            self._sums = {name: torch.tensor(total, device=self.device) for name, total in state["totals"].items()}
            self._counts = state["counts"]
            self._places = state["places"]
            if self.step < self.training.steps:
                self._say(f"{self.stage}: continuing from step {self.step} of {self.training.steps}.")
            break
        self.accelerator.wait_for_everyone()
        if self.is_main:
            for folder in damaged:
                folder.replace(folder.with_name(f"damaged-{folder.name}-{time.time_ns()}"))
            _cut_metrics(self.folder / "metrics.jsonl", self.step)
        self.accelerator.wait_for_everyone()

    def _say(self, text: str) -> None:
        if self.is_main:
            print(text, file=sys.stderr, flush=True)


class _Averaged(AbstractContextManager[None]):
    def __init__(self, run: Run):
        self.run = run

    def __enter__(self) -> None:
        self.run.ema.store(self.run.parameters)
        self.run.ema.copy_to(self.run.parameters)
        self.run.bare.eval()

    def __exit__(self, *_: object) -> None:
        self.run.ema.restore(self.run.parameters)
        self.run.bare.train()


def check_finished(folder: Path, contract: dict[str, Any]) -> None:
    """UserError where the finished stage in `folder` was trained under another contract, on other pictures for one."""
    for checkpoint in _checkpoints(folder)[-1:]:
        before = json.loads((checkpoint / "state.json").read_text())["contract"]
        changed = [name for name, value in contract.items() if before.get(name) != value]
        if changed:
            raise UserError(
                f"{folder.parent} is finished, but its {' and '.join(changed)} changed since; "
                "give another run.dir, or --fresh to train beside it"
            )


def _checkpoints(folder: Path) -> list[Path]:
    """Oldest first."""
    numbered = {path.name.removeprefix("step-"): path for path in (folder / "checkpoints").glob("step-*")}
    return [numbered[name] for name in sorted(filter(str.isdigit, numbered), key=int)]


def _cut_metrics(path: Path, step: int) -> None:
    """Drops lines after `step`, which will be written again."""
    if not path.exists():
        return
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    if kept != lines:
        with whole_file(path) as beside:
            beside.write_text("".join(kept))
