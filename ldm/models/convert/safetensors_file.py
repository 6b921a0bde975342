"""Reading and writing a model's tensors in a single `.safetensors` file: what the converters share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ldm.models.weight_files import PICKLES, pickle_error
from ldm.utils.errors import UserError, first_line

Shapes = dict[str, tuple[int, ...]]
"""The shapes of tensors, by name."""


@contextmanager
def opened(path: Path) -> Iterator[Any]:
    """Opens a `.safetensors` file to read tensors; UserError if it is missing, damaged, or a pickle."""
    if path.suffix in PICKLES and path.exists():
        raise UserError(pickle_error(path))
    try:
        with safe_open(path, "pt") as file:
            yield file
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give a model's or a whole checkpoint's .safetensors") from None
    except (OSError, SafetensorError) as error:
        reason = first_line(error)
        raise UserError(
            f"{path}: can't be read as safetensors ({reason}); copy or download it again, or convert a .ckpt first"
        ) from None


def write(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Writes a `.safetensors`; the same content gives the same bytes."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, dict(metadata))
    sort_metadata(path)


def sort_metadata(path: Path) -> None:
    """Sorts a file's metadata in place, which safetensors writes in an order of chance."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= size, "the same JSON as compact as before"
        file.seek(8)
        file.write(text.ljust(size))  # padded with spaces, as the format has it


def check_names(path: Path, expected: set[str], actual: set[str], kind: str) -> None:
    """UserError for tensors that are missing or left over in a file of a model of class `kind`."""
    for names, complaint in ((expected - actual, "lacks"), (actual - expected, "has, and no such model has,")):
        if names:
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            raise UserError(
                f"{path}: as {kind} it {complaint} tensor {min(names)}{more}; is the file whole and unaltered?"
            )
