"""Errors of commands, reported in one line."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

from safetensors import SafetensorError

from ldm.utils import interrupt
from ldm.utils.paths import local_path

DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NOT_PERMITTED = (errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(ValueError):
    """A mistake that the user can mend: the message names the key or file, the value and the fix, in one line."""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type's name where there is none."""
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


def unknown_choice(key: str, value: object, choices: Sequence[str]) -> UserError:
    """The error to raise where `value` is none of two or more `choices`."""
    return UserError(f"{key}: {value!r}; give {', '.join(choices[:-1])} or {choices[-1]}")


def cant_write(error: BaseException) -> str:
    """The reason and remedy of an error of writing; empty for other errors."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])  # safetensors has it in the text only
    if number in DISK_FULL:
        return f"{os.strerror(number)}; make room, and the same command continues"
    return f"{os.strerror(number)}; give a folder that you may write to" if number in NOT_PERMITTED else ""


def lost_process(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, means that another process no longer responds."""
    torch = sys.modules.get("torch")
    distributed: type | tuple[()] = torch.distributed.DistError if torch else ()
    while error:
        if isinstance(error, distributed) or "gloo/transport" in str(error):  # gloo has no error class
            return True
        error = error.__cause__ or error.__context__
    return False


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong argument in one line, like every other error, and expands paths."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.register("type", Path, local_path)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def disable_progress_bars() -> None:
    """Of diffusers and transformers, as far as they are imported: theirs, over reading a file, would hide ours."""
    for library in ("diffusers", "transformers"):
        if logging := sys.modules.get(f"{library}.utils.logging"):
            logging.disable_progress_bar()


def _explained(error: Exception) -> str:
    """What a person should do about it, in a line; empty where it is a defect, which needs its traceback."""
    torch = sys.modules.get("torch")
    if isinstance(error, UserError):  # from a loader's process it comes as a traceback
        return " ".join(str(error).rpartition("ldm.utils.errors.UserError: ")[2].split())
    if torch and isinstance(error, torch.OutOfMemoryError):
        return (
            f"the GPU's memory is full ({str(error).split('. ')[0]}); compute fewer images at once "
            "(device_batch, --batch), or set gradient_checkpointing=true; the same command continues"
        )
    if isinstance(error, RuntimeError) and lost_process(error):
        return (
            "another process of this run has ended, and may have printed why; the last checkpoint stands, and "
            "the same command continues."
        )
    if isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker (pid"):  # torch has no error class
        reason = str(error).split(". ")[0].rstrip(".")
        return (
            f"a loader process has ended ({reason}): memory or /dev/shm is full, or a file that it read was cut short; "
            "lower data.workers (and data.prefetch_factor, if raised), or mend the file; the same command continues"
        )
    written = isinstance(error, OSError | SafetensorError)
    permitted = getattr(error, "errno", None) not in NOT_PERMITTED  # which reading may raise too
    if written and permitted and (reason := cant_write(error)):
        return f"can't write {getattr(error, 'filename', None) or 'a file'}: {reason}"
    return ""


def _escaped(line: str) -> str:
    """The same with control characters written out: a file's name must not steer the terminal."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], line)


class Command(Protocol):
    """A program, called with its arguments, by default those of the command line; returns its exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


def command(main: Callable[[Sequence[str] | None], int | None], continues: bool = False) -> Command:
    """Decorates `main(arguments)` to return an exit status: 2 after a UserError, which is printed in one line.

    `continues`: called again after Ctrl-C, it goes on where it was.
    """

    def guarded(arguments: Sequence[str] | None = None) -> int:
        disable_progress_bars()
        try:
            return main(arguments) or 0
        except Exception as error:
            if not (line := _explained(error)):
                raise
            print(f"error: {_escaped(line)}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(interrupt.MESSAGE + "; the same command continues" * continues, file=sys.stderr)
            return interrupt.STATUS

    return guarded


def training_command(main: Callable[[Sequence[str] | None], int | None]) -> Command:
    """Decorates the `main` of a training, which the same command continues."""
    return command(main, continues=True)
