"""Checkpoints are read as written, or refused as damaged."""

from pathlib import Path

import pytest
import torch

from ldm.training.checkpoint import read_checkpoint, write_checkpoint
from ldm.training.fingerprint import check_finished
from ldm.utils.errors import UserError


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_bytes(path.read_bytes()[:-1])])
def test_a_checkpoint_is_read_as_written_and_damage_names_its_file(tmp_path: Path, damage) -> None:
    parts = {"model": {"a": torch.arange(3.0)}, "ema": {"0": torch.ones(2, 2)}}
    write_checkpoint(tmp_path / "c", parts, {"step": 7})
    loaded, state = read_checkpoint(tmp_path / "c")
    assert state["step"] == 7
    assert torch.equal(loaded["model"]["a"], parts["model"]["a"])
    damage(tmp_path / "c/ema.safetensors")
    with pytest.raises((ValueError, OSError), match="ema"):
        read_checkpoint(tmp_path / "c")


def test_a_checkpoint_from_before_0_1_0_loads_under_the_new_names(tmp_path: Path) -> None:
    tensors = {"0.exp_avg": torch.ones(1)}
    parts = {"model": tensors, "adversary": tensors, "adversary_optimizer": tensors}
    old = {"step": 7, "contract": {"data": "a"}, "groups": {"optimizer": [], "adversary_optimizer": [{"lr": 1.0}]}}
    write_checkpoint(tmp_path / "c", parts, old)
    loaded, state = read_checkpoint(tmp_path / "c")
    assert loaded.keys() == {"model", "discriminator", "discriminator_optimizer"}
    assert state["fingerprint"] == {"data": "a"} and "contract" not in state
    assert state["groups"] == {"optimizer": [], "discriminator_optimizer": [{"lr": 1.0}]}


@pytest.mark.parametrize("state", ["", "{", '{"step": 7}'])
def test_a_damaged_last_checkpoint_of_a_finished_stage_is_one_line(tmp_path: Path, state: str) -> None:
    folder = tmp_path / "stage2/checkpoints/step-000007"
    check_finished(tmp_path / "stage2", {"data": "a"})  # without a checkpoint there is nothing to compare
    write_checkpoint(folder, {"model": {"a": torch.arange(3.0)}}, {"step": 7, "fingerprint": {"data": "a"}})
    check_finished(tmp_path / "stage2", {"data": "a"})
    (folder / "state.json").write_text(state)
    with pytest.raises(
        UserError, match=r"step-000007 is damaged \(.*\); restore it from a copy, or remove it"
    ) as caught:
        check_finished(tmp_path / "stage2", {"data": "a"})
    assert "\n" not in str(caught.value)
