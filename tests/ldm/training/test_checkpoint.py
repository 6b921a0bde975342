"""Checkpoints come back as they were written, or are named damaged."""

from pathlib import Path

import pytest
import torch

from ldm.training.checkpoint import flatten_optimizer, read_checkpoint, unflatten_optimizer, write_checkpoint


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
