"""`DryRun`: a stage's training that is measured and leaves nothing.

    with DryRun() as dry_run:
        train(config, data)
    first, second = dry_run.step_ends

Stages need no code for it: the `Trainer` asks `current()` once, when it is built.
"""

from __future__ import annotations

import time
from collections import defaultdict
from contextvars import ContextVar, Token
from types import TracebackType

import torch

from ldm.sampling.loop import Step


class Finished(Exception):  # noqa: N818 it is no error
    """Raised after the last step, before the export; the `with` block ends there."""


class DryRun:
    """Within its `with` block a `Trainer` takes its steps, saves and exports nothing, and handles no signals.

    With `evaluate`, a validation, a sample grid and an evaluation follow the last step. Only numbers are kept, neither
    the run nor any of its tensors, so that all memory is free after the block.
    """

    def __init__(self, evaluate: bool = True, progress: bool = False):
        self.evaluate, self.progress = evaluate, progress
        self.activity = "the model"  # what memory and time are needed for at present
        self.seconds: defaultdict[str, float] = defaultdict(float)  # of each activity
        self.step_ends: list[float] = []  # on the clock of time.perf_counter
        # Seconds of an activity's evaluations of the U-Net as a solver, but for the first one of each batch
        self.denoising: defaultdict[str, float] = defaultdict(float)
        self.lines: list[dict[str, float]] = []  # of metrics
        self.weight_bytes = self.frozen_bytes = 0  # of what is trained, and of the rest of its network
        self.checkpoint_bytes = 0
        self._since = self._evaluated = 0.0
        self._token: Token[DryRun | None] | None = None

    def __enter__(self) -> DryRun:
        self._token, self._since = _current.set(self), _now()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        assert self._token
        _current.reset(self._token)
        assert kind, "a training ends its dry run in `Trainer.batches`"
        if kind is not Finished:  # the activity tells what failed
            return False
        self.begin(self.activity)
        return True

    def begin(self, activity: str) -> str:
        """Time counts for another activity from now on; returns the one before."""
        before, now = self.activity, _now()
        self.seconds[before] += now - self._since
        self.activity, self._since = activity, now
        return before

    def end_step(self) -> None:
        # On a GPU a step ends when its optimizer is queued, so that the queue stays as full as in a training. From one
        # such end to the next it is a whole step, as each waits for its gradients.
        self.step_ends.append(time.perf_counter())

    def evaluated(self, step: Step) -> None:
        """Callback of a solver; a batch's first step, which also chooses convolutions, isn't counted."""
        now = _now()
        if step.number > 1:
            self.denoising[self.activity] += now - self._evaluated
        self._evaluated = now


_current: ContextVar[DryRun | None] = ContextVar("dry_run", default=None)


def current() -> DryRun | None:
    """The dry run in whose block this is called."""
    return _current.get()


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()
