"""How a command speaks to the person who typed it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import diffusers.utils.logging
import transformers.utils.logging


class UserError(ValueError):
    """A mistake that its reader can mend: the message names the key or file, the value and the fix, in one line."""


class Parser(argparse.ArgumentParser):
    """argparse, except that a wrong argument is one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[[Sequence[str] | None], int]:
    """Turns `main(arguments)` into one that returns an exit status: 2 after a UserError, which is shown as one line."""

    def guarded(arguments: Sequence[str] | None = None) -> int:
        diffusers.utils.logging.disable_progress_bar()  # theirs, over reading a file, would hide ours
        transformers.utils.logging.disable_progress_bar()
        try:
            return main(arguments) or 0
        except UserError as error:
            text = str(error).rpartition("ldm.errors.UserError: ")[2]  # from a loader's process it comes as a traceback
            print(f"error: {' '.join(text.split())}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted; the same command continues.", file=sys.stderr)
            return 130

    return guarded
