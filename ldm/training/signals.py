"""What a run is asked for by signals while it trains: to save, or to save and end."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

ECHO = 3.0  # seconds within which a second signal is a launcher's echo of the first


class Interrupted(SystemExit):
    """Raised after the checkpoint of a run that was asked to end; its code is the shell's 128 + signal."""


class SignalHandler:
    """`end` is the signal that asks for the end, SIGINT or SIGTERM, or 0; `save` is SIGUSR1's wish for a checkpoint."""

    def __init__(self) -> None:
        self.end, self.save = 0, False
        self._asked = 0.0

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Within it signals are taken in, where else they would end the process."""
        handlers: dict[int, Any] = dict.fromkeys((signal.SIGINT, signal.SIGTERM), self._asked_to_end)
        if hasattr(signal, "SIGUSR1"):
            handlers[signal.SIGUSR1] = self._asked_to_save
        before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _asked_to_end(self, number: int, _frame: FrameType | None) -> None:
        if not self.end:
            self.end, self._asked = number, time.monotonic()
        elif time.monotonic() - self._asked > ECHO:  # asked again: now
            raise Interrupted(128 + number)

    def _asked_to_save(self, _number: int, _frame: FrameType | None) -> None:
        self.save = True
