"""Signals to a run while it trains: SIGUSR1 saves, SIGINT and SIGTERM save and end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator

ECHO = 3.0  # seconds within which a second signal is a launcher's echo of the first


class Interrupted(SystemExit):
    """Raised after the checkpoint of a run that was asked to end; its code is the shell's 128 + signal."""


class SignalHandler:
    """`end` is the signal that ends the run, SIGINT or SIGTERM, or 0; `save`: SIGUSR1 asked for a checkpoint.

    `at_once`: a second signal has ended the run.
    """

    def __init__(self) -> None:
        self.end, self.save, self.at_once = 0, False, False
        self._ended_at = 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it signals set `end` and `save` instead of ending the process."""
        handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._on_end)
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._on_save
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _on_end(self, number: int, _frame: FrameType | None) -> None:
        if not self.end:
            self.end, self._ended_at = number, time.monotonic()
        elif time.monotonic() - self._ended_at > ECHO:  # a second one: now
            self.at_once = True
            raise Interrupted(128 + number)

    def _on_save(self, _number: int, _frame: FrameType | None) -> None:
        self.save = True

    def agree(self, finite: torch.Tensor, accelerator: Accelerator) -> tuple[bool, int, bool]:
        """Over all processes, which all call it: is a step `finite`, which signal asks to end, does one ask to save?

        To learn it waits for the step's losses and gradients.
        """
        if accelerator.num_processes == 1:
            return bool(finite), self.end, self.save
        # Filled on the device: a tensor of the host's numbers would be copied, and the copy waited for.
        asked = (torch.full_like(finite, flag, dtype=torch.int64) for flag in (self.end, self.save))
        flags = torch.stack([~finite, *asked])
        nonfinite, end, save = accelerator.gather(flags[None]).amax(0).tolist()
        return not nonfinite, end, bool(save)
