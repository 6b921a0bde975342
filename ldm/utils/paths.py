"""Paths as people write them: with `~` and environment variables."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import TypeVar

AnyPath = TypeVar("AnyPath", str, Path)


def expand(path: AnyPath) -> AnyPath:
    """A path with `~` and environment variables expanded; ValueError where one of them is unknown.

    What can't be expanded and exists under that name stays as it is: `$RECYCLE.BIN`, `~old`.
    """
    text = os.path.expandvars(os.path.expanduser(path))  # noqa: PTH111  (Path's would change an id)
    if not os.path.exists(text):  # noqa: PTH110  (Path's raises where a name is too long)
        if variable := re.search(r"\$(\w+|\{[^}]*\})", text):
            name = variable[1].strip("{}")
            raise ValueError(f"the environment variable {name} is not set; set it, or write the path out")
        if user := re.match(r"~([^/]*)", text):
            raise ValueError(f"there is no user {user[1]!r} whose folder ~{user[1]} could be; write the path out")
    return type(path)(text)


def path_or_id(text: str) -> str:
    """`expand` for the arguments of a command. An id of the Hub has neither `~` nor `$`."""
    try:
        return expand(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def local_path(text: str) -> Path:
    return Path(path_or_id(text))
