"""Files and folders are written completely or not at all."""

from pathlib import Path

import pytest
import torch

from ldm.utils.atomic_files import atomic_file, atomic_folder, tensors_sha256


def test_an_error_while_writing_leaves_only_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError), atomic_file(tmp_path / "a.txt") as partial:
        partial.write_text("half")
        raise KeyError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with atomic_folder(tmp_path / "a") as partial:
            (partial / "x").write_text(text)
    assert (tmp_path / "a/x").read_text() == "new"
    with pytest.raises(KeyError), atomic_folder(tmp_path / "a") as partial:
        (partial / "x").write_text("half")
        raise KeyError
    assert (tmp_path / "a/x").read_text() == "new"


def test_the_hash_depends_on_names_values_and_extras() -> None:
    a, b = {"x": torch.zeros(2)}, {"y": torch.zeros(2)}
    hashes = {tensors_sha256(a), tensors_sha256(b), tensors_sha256({"x": torch.ones(2)}), tensors_sha256(a, 1)}
    assert len(hashes) == 4
    assert tensors_sha256(a) == tensors_sha256({"x": torch.zeros(2)})
