"""The examples in CONTRIBUTING.md run unchanged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from ldm.sampling import solvers

PAGE = (Path(__file__).parents[1] / "CONTRIBUTING.md").read_text("utf-8")
SOLVER, WEIGHTING, SOURCE = re.findall(r"^```python\n(.*?)^```$", PAGE, flags=re.MULTILINE | re.DOTALL)


def run(block: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(compile(block, "CONTRIBUTING.md", "exec"), names)
    return names


@pytest.mark.parametrize("block", [SOLVER, WEIGHTING, SOURCE], ids=["solver", "weighting", "source"])
def test_an_example_is_short(block: str) -> None:
    assert sum(bool(line.strip()) and "import" not in line for line in block.splitlines()) < 15


def test_a_solver_is_added_and_tested(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(solvers.SCHEDULERS, "deis", None)  # undone after the test, with what the example adds
    run(SOLVER)


def test_a_loss_weighting_is_tested_against_its_paper() -> None:
    run(WEIGHTING)


def test_a_data_source_reads_captions_from_names(tmp_path: Path) -> None:
    for name in ("red-fox.png", "-.png"):
        (tmp_path / name).touch()
    bad, fox = run(SOURCE)["file_names"](tmp_path)
    assert str(bad) == "-.png: its name has no word; name it after what it shows"
    assert (fox.key, fox.captions) == ("red-fox.png", ("red fox",))
