"""Ctrl-C while a command still imports its libraries, which takes seconds: one line, and status 130."""

from __future__ import annotations

import os
import sys
from types import TracebackType

MESSAGE = "interrupted"
STATUS = 130  # a shell's, of a program that SIGINT ended


def install_hook() -> None:
    """Replaces the traceback of an uncaught KeyboardInterrupt; other errors keep theirs."""
    previous = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if not was_interrupted(error):
            return previous(kind, error, traceback)
        print(MESSAGE, file=sys.stderr, flush=True)
        os._exit(STATUS)  # nothing has begun

    sys.excepthook = hook


def was_interrupted(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, is a KeyboardInterrupt: some libraries pass it on as an ImportError."""
    while error:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False
