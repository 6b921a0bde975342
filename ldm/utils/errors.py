"""Errors of commands, reported in one line."""

from __future__ import annotations

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import diffusers.utils.logging
import torch
import transformers.utils.logging
from safetensors import SafetensorError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
FORBIDDEN = (errno.EROFS, errno.EACCES, errno.EPERM)


class UserError(ValueError):
    """A mistake that the user can mend: the message names the key or file, the value and the fix, in one line."""


def cant_write(error: BaseException) -> str:
    """The reason and remedy of an error of writing; empty for other errors."""
    number = getattr(error, "errno", None)
    if isinstance(error, SafetensorError) and (match := re.search(r"os error (\d+)", str(error))):
        number = int(match[1])  # safetensors has it in the text only
    if number in FULL:
        return f"{os.strerror(number)}; make room, and the same command continues"
    return f"{os.strerror(number)}; give a folder that you may write to" if number in FORBIDDEN else ""


def lost_process(error: BaseException | None) -> bool:
    """Whether the error, or one that caused it, means that another process no longer responds."""
    while error:
        if isinstance(error, torch.distributed.DistError) or "gloo/transport" in str(error):  # gloo has no error class
            return True
        error = error.__cause__ or error.__context__
    return False


class Parser(argparse.ArgumentParser):
    """An argument parser that reports a wrong argument in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class Command(Protocol):
    """A program, called with its arguments, by default those of the command line; returns its exit status."""

    def __call__(self, arguments: Sequence[str] | None = None) -> int: ...


def command(main: Callable[[Sequence[str] | None], int | None]) -> Command:
    """Decorates `main(arguments)` to return an exit status: 2 after a UserError, which is printed in one line."""

    def guarded(arguments: Sequence[str] | None = None) -> int:
        diffusers.utils.logging.disable_progress_bar()  # of loading a file, which would interrupt our own
        transformers.utils.logging.disable_progress_bar()
        try:
            return main(arguments) or 0
        except UserError as error:
            # A loader's worker passes it on as a traceback.
            text = str(error).rpartition("ldm.utils.errors.UserError: ")[2]
            print(f"error: {' '.join(text.split())}", file=sys.stderr)
            return 2
        except torch.OutOfMemoryError as error:
            print(
                f"error: the GPU's memory is full ({str(error).split('. ')[0]}); compute fewer images at once "
                "(device_batch, --batch), or set gradient_checkpointing=true; the same command continues",
                file=sys.stderr,
            )
            return 2
        except RuntimeError as error:
            if not lost_process(error):
                raise
            print(
                "error: another process of this run has ended, and may have said why; the last checkpoint stands, and "
                "the same command continues.",
                file=sys.stderr,
            )
            return 2
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) in FORBIDDEN or not (reason := cant_write(error)):  # may be of reading
                raise
            print(f"error: can't write {getattr(error, 'filename', None) or 'a file'}: {reason}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command continues.", file=sys.stderr)
            return 130

    return guarded
