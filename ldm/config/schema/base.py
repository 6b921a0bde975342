"""The base class of the configuration's sections, and the types of their paths."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from ldm.utils.paths import expand


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


LocalPath = Annotated[Path, AfterValidator(expand)]
PathOrId = Annotated[str, AfterValidator(expand)]
"""A local path, or an id of the Hub, which has neither `~` nor `$`."""
