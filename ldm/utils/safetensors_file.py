"""safetensors files that are written tensor by tensor, with the SHA-256 of what is written."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping
from pathlib import Path

import torch

# The format's types in the order in which the library writes them, so that each tensor is aligned.
DTYPES = {
    torch.uint64: "U64",
    torch.int64: "I64",
    torch.float64: "F64",
    torch.complex64: "C64",
    torch.float32: "F32",
    torch.uint32: "U32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.uint16: "U16",
    torch.int16: "I16",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
ORDER = {dtype: i for i, dtype in enumerate(DTYPES)}
CHUNK = 16 << 20  # bytes: few enough calls that a thread which writes hardly waits for the interpreter


def write_safetensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None = None) -> str:
    """Writes the bytes that safetensors' `save_file` writes, and returns their SHA-256.

    Tensors of other devices, and strided ones, are copied one at a time.
    """
    names = sorted(tensors, key=lambda name: (ORDER[tensors[name].dtype], name))
    ordered = {name: tensors[name] for name in names}
    digest = hashlib.sha256()
    with path.open("wb") as file:
        for data in itertools.chain([memoryview(_header(ordered, metadata))], map(_bytes, ordered.values())):
            for start in range(0, len(data), CHUNK):
                chunk = data[start : start + CHUNK]
                digest.update(chunk)
                file.write(chunk)
    return digest.hexdigest()


def _header(tensors: Mapping[str, torch.Tensor], metadata: dict[str, str] | None) -> bytes:
    """Names, types, shapes and places of the tensors, in their order, with the length before it."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
