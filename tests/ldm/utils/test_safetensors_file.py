"""Files written tensor by tensor are those of safetensors, and their hash is that of the file."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm.utils.atomic_files import file_sha256
from ldm.utils.safetensors_file import CHUNK, DTYPES, write_safetensors


@pytest.mark.parametrize("metadata", [None, {"average": '{"width": 0.1}'}])
def test_a_file_has_the_bytes_of_safetensors_and_its_hash_is_returned(tmp_path: Path, metadata) -> None:
    bits = (torch.arange(48) % 2).to(torch.uint8)
    tensors = {f"{i}.{dtype}": bits.view(dtype).clone() for dtype in DTYPES for i in (10, 9)}
    tensors |= {
        'a name\n\t"é\x01': torch.randn(3, 4),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "longer than a chunk": torch.randn(CHUNK // 4 + 5),
    }
    save_file(tensors, tmp_path / "theirs.safetensors", metadata)
    sha256 = write_safetensors(tmp_path / "ours.safetensors", tensors, metadata)
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()
    assert sha256 == file_sha256(tmp_path / "ours.safetensors")


def test_parameters_and_strided_tensors_are_written_with_their_values(tmp_path: Path) -> None:
    tensors = {
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).T,
        "parameter": torch.nn.Parameter(torch.randn(3)),
    }
    write_safetensors(tmp_path / "a.safetensors", tensors)
    loaded = load_file(tmp_path / "a.safetensors")
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())
