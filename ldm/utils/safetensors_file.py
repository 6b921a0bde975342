"""safetensors files that are written tensor by tensor, with the SHA-256 of what is written, and folders of shards.

A folder of shards has a file of each process. Its layout is that of torch.distributed.checkpoint's
`HuggingFaceStorageWriter`, which is read by its `HuggingFaceStorageReader` too.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

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
NAMES = {name: dtype for dtype, name in DTYPES.items()}
ORDER = {dtype: i for i, dtype in enumerate(DTYPES)}
CHUNK = 16 << 20  # bytes: few enough calls that a thread which writes hardly waits for the interpreter
SHARDING, OFFSETS = "DCP_SHARDING_INFO", "saved_offsets"  # torch's names, in the metadata of a shard's file


class _Shard(NamedTuple):
    """A block of a tensor, in an open file."""

    file: Any
    offsets: Sequence[int]
    shape: Sequence[int]


class SavedTensor:
    """A tensor of a safetensors file, or of several with a shard each, which is read when it is needed."""

    def __init__(self, name: str, shards: Sequence[_Shard]):
        self.name, self._shards = name, shards
        self.dtype = NAMES[shards[0].file.get_slice(name).get_dtype()]
        ends = zip(*([o + n for o, n in zip(shard.offsets, shard.shape, strict=True)] for shard in shards), strict=True)
        self.shape = torch.Size(map(max, ends))

    def read(self, offsets: Sequence[int] | None = None, shape: Sequence[int] | None = None) -> torch.Tensor:
        """The block of a `shape` that begins at `offsets`; without them, the full tensor.

        Only the bytes of the block are read.
        """
        if offsets is None or shape is None:
            offsets, shape = [0] * len(self.shape), self.shape
        if len(self._shards) == 1 and tuple(shape) == tuple(self._shards[0].shape):
            return self._shards[0].file.get_tensor(self.name)  # type: ignore[no-any-return]
        block, count = torch.empty(tuple(shape), dtype=self.dtype), 0
        for shard in self._shards:
            start = [max(pair) for pair in zip(offsets, shard.offsets, strict=True)]
            ends = zip(offsets, shape, shard.offsets, shard.shape, strict=True)
            end = [min(o + n, shard_o + shard_n) for o, n, shard_o, shard_n in ends]
            if any(a >= b for a, b in zip(start, end, strict=True)):
                continue
            source, target = _slices(start, end, shard.offsets), _slices(start, end, offsets)
            block[target] = shard.file.get_slice(self.name)[source]
            count += block[target].numel()
        if count != block.numel():
            raise ValueError(f"{self.name}: {block.numel() - count} elements are in no shard")
        return block


SavedTensors = Mapping[str, torch.Tensor | SavedTensor]


def _slices(start: Sequence[int], end: Sequence[int], offsets: Sequence[int]) -> tuple[slice, ...]:
    """The region from `start` to `end` within a block that begins at `offsets`."""
    return tuple(slice(a - o, b - o) for a, b, o in zip(start, end, offsets, strict=True))


def open_tensors(path: Path) -> dict[str, SavedTensor]:
    """The tensors of a file, or of a folder of shards, by name; ValueError where a shard's file is missing."""
    shards: dict[str, list[_Shard]] = {}
    for file in map(_open, _files(path)):
        offsets = json.loads((file.metadata() or {}).get(SHARDING, "{}"))
        for name in file.keys():  # noqa: SIM118  (no dict)
            shape = file.get_slice(name).get_shape()
            shards.setdefault(name, []).append(
                _Shard(file, offsets[name][OFFSETS] if name in offsets else [0] * len(shape), shape)
            )
    return {name: SavedTensor(name, blocks) for name, blocks in shards.items()}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a file, or of a folder of shards."""
    return _open(_files(path)[0]).metadata() or {}


def _open(file: Path) -> Any:
    return safe_open(file, "pt")


def _files(path: Path) -> list[Path]:
    """The file, or those of a folder of shards; ValueError where one is missing."""
    if not path.is_dir():
        return [path]
    files = sorted(path.glob("shard-*.safetensors"))
    if not files or len(files) != int(files[0].stem.rpartition("-")[2]):
        raise ValueError(f"{path} lacks files of shards")
    return files


def read_tensors(tensors: SavedTensors) -> dict[str, torch.Tensor]:
    """The tensors, in memory."""
    return {name: _read(tensor) for name, tensor in tensors.items()}


def _read(tensor: torch.Tensor | SavedTensor) -> torch.Tensor:
    return tensor.read() if isinstance(tensor, SavedTensor) else tensor


def write_shard(
    folder: Path,
    number: int,
    count: int,
    tensors: Mapping[str, torch.Tensor],
    offsets: Mapping[str, Sequence[int]],
    metadata: dict[str, str] | None = None,
) -> tuple[str, str]:
    """Writes shards of tensors, and where each begins, as file `number`, from 0, of `count` in a folder of shards.

    Returns the file's name and SHA-256.
    """
    name = f"shard-{number + 1:05d}-of-{count:05d}.safetensors"
    sharding = json.dumps({name: {OFFSETS: list(offsets[name])} for name in tensors})
    facts = {SHARDING: sharding, "DCP_VERSION": "1.0", "format": "pt", **(metadata or {})}
    return name, write_safetensors(folder / name, tensors, facts)


def write_safetensors(path: Path, tensors: SavedTensors, metadata: dict[str, str] | None = None) -> str:
    """Writes the bytes that safetensors' `save_file` writes, and returns their SHA-256.

    Tensors of other devices, strided and saved ones are copied one at a time.
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


def _header(tensors: SavedTensors, metadata: dict[str, str] | None) -> bytes:
    """Names, types, shapes and places of the tensors, in their order, with the length before it."""
    entries: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        entries[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(tensor: torch.Tensor | SavedTensor) -> memoryview:
    return _read(tensor).detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
