"""Gradients cross the network once an optimizer step, however many accumulation steps it has."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from forked import ScriptProcess, of_accelerate


@pytest.mark.slow
def test_gradients_are_reduced_in_the_last_accumulation_step_alone_under_ddp_and_fsdp(
    launch: Callable[..., ScriptProcess], finish: Callable[[ScriptProcess], str], root: Path, tmp_path: Path
) -> None:
    """DDP has a bucket. FSDP has a block, what is outside of it, and a parameter that is not sharded."""
    fsdp = of_accelerate(root / "configs/accelerate/fsdp.yaml")
    finish(launch("tests/ldm/distributed/count_reductions.py", tmp_path, processes=2, more=fsdp))
    assert json.loads((tmp_path / "counts.json").read_text()) == {"ddp": [0, 0, 0, 1], "fsdp": [0, 0, 0, 3]}
