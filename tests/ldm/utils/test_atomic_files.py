"""Files and folders that stand whole or not at all."""

from pathlib import Path

import pytest
import torch

from ldm.utils.atomic_files import (
    flatten_optimizer,
    read_checkpoint,
    tensors_sha256,
    unflatten_optimizer,
    whole_file,
    whole_folder,
    write_checkpoint,
)


def test_an_error_while_writing_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyError), whole_file(tmp_path / "a.txt") as beside:
        beside.write_text("half")
        raise KeyError
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_an_error_while_writing_leaves_the_old_folder(tmp_path: Path) -> None:
    for text in ("old", "new"):
        with whole_folder(tmp_path / "a") as beside:
            (beside / "x").write_text(text)
    assert (tmp_path / "a/x").read_text() == "new"
    with pytest.raises(KeyError), whole_folder(tmp_path / "a") as beside:
        (beside / "x").write_text("half")
        raise KeyError
    assert (tmp_path / "a/x").read_text() == "new"


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_checkpoint_comes_back_whole_or_is_named_damaged(tmp_path: Path, damage) -> None:
    parts = {"model": {"a": torch.arange(3.0)}, "ema": {"0": torch.ones(2, 2)}}
    write_checkpoint(tmp_path / "c", parts, {"step": 7})
    back, state = read_checkpoint(tmp_path / "c")
    assert state["step"] == 7
    assert torch.equal(back["model"]["a"], parts["model"]["a"])
    damage(tmp_path / "c/ema.safetensors")
    with pytest.raises((ValueError, OSError), match="ema"):
        read_checkpoint(tmp_path / "c")


def test_an_optimizer_goes_through_named_tensors() -> None:
    layer = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = optimizer.state_dict()
    after = unflatten_optimizer(*flatten_optimizer(before))
    assert after["param_groups"] == before["param_groups"]
    for i, entry in before["state"].items():
        assert all(torch.equal(entry[name], after["state"][i][name]) for name in entry)


def test_a_sum_tells_names_values_and_extras_apart() -> None:
    a, b = {"x": torch.zeros(2)}, {"y": torch.zeros(2)}
    sums = {tensors_sha256(a), tensors_sha256(b), tensors_sha256({"x": torch.ones(2)}), tensors_sha256(a, 1)}
    assert len(sums) == 4
    assert tensors_sha256(a) == tensors_sha256({"x": torch.zeros(2)})
