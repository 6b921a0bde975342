"""The base class of the configuration's sections, and the types of their paths."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict

AnyPath = TypeVar("AnyPath", str, Path)


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


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


LocalPath = Annotated[Path, AfterValidator(expand)]
PathOrId = Annotated[str, AfterValidator(expand)]
"""A local path, or an id of the Hub, which has neither `~` nor `$`."""
