"""The notebook runs, in one kernel, and what its cells claim holds."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import fork_server
import nbformat
import pytest

from scripts import notebook as command

TESTS = Path(__file__).parent
REPORT = """
import json
facts = dict(results=results, errors=errors, likelihood_error=likelihood_error, last_alpha_bar=last_alpha_bar,
             distance=distance, psnr=psnr, latents=list(latents.shape[1:]), N=N, S=S, M=M,
             width=WIDTH, held_out=held_out, images=len(images), sheets=len(sheets))
print(json.dumps(facts))
"""


def run(folder: Path, fast: str) -> tuple[list[Any], dict[str, Any]]:
    """The executed code cells, and the facts that they computed.

    The kernel is a fork, which has imported everything already: matplotlib too, so that its backend is set.
    """
    argv = [sys.executable, TESTS / "forked_python.py", folder / "kernel.txt"]
    argv += ["-m", "ipykernel_launcher", "-f", "{connection_file}", "--matplotlib=inline"]
    spec = folder / "jupyter/kernels/python3/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": [*map(str, argv)], "display_name": "forked", "language": "python"}))
    fork_server.start()
    notebook = command.from_source()
    notebook.cells.append(nbformat.v4.new_code_cell(REPORT))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JUPYTER_PATH", str(folder / "jupyter"))
        command.execute(notebook, folder, {**os.environ, "FAST": fast, "OMP_NUM_THREADS": "1"})
    *cells, report = (cell for cell in notebook.cells if cell.cell_type == "code")
    return cells, json.loads(report.outputs[0].text)


@pytest.fixture(scope="module")
def executed(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], dict[str, Any]]:
    return run(tmp_path_factory.mktemp("notebook"), "1")


def check_exact(facts: dict[str, Any]) -> None:
    """What does not depend on a training."""
    for mean, deviation in facts["results"].values():  # within four standard errors, and the solver's own error
        assert abs(mean - facts["M"]) < 4 * facts["S"] / facts["N"] ** 0.5 + 0.01
        assert abs(deviation - facts["S"]) < 4 * facts["S"] / (2 * facts["N"]) ** 0.5 + 0.01
    for by_steps in facts["errors"].values():
        assert by_steps[-1] < by_steps[0] / 3
    assert facts["errors"]["dpm++"][2] < facts["errors"]["ddim"][2]
    assert facts["likelihood_error"] < 0.12  # the last x_t is not quite N(0, 1): 4 deviations from m, αm = 0.02 tells
    assert facts["last_alpha_bar"] == 0
    assert facts["distance"] == pytest.approx(facts["width"] * 2**0.5, rel=0.1)
    assert facts["held_out"] and not facts["latents"][0] - 4
    assert facts["images"] == 5 + len(facts["held_out"]) and facts["sheets"] == 4


def test_the_notebook_is_the_generated_one() -> None:
    generated, stored = command.from_source(), nbformat.read(command.NOTEBOOK, 4)
    assert [(c.cell_type, c.id, c.source) for c in stored.cells] == [
        (c.cell_type, c.id, c.source) for c in generated.cells
    ]
    assert command.NOTEBOOK.stat().st_size < 1.5e6


@pytest.mark.slow
def test_what_the_cells_claim_holds(executed: tuple[list[Any], dict[str, Any]]) -> None:
    check_exact(executed[1])
    assert executed[1]["psnr"] > 5  # after twelve steps


@pytest.mark.slow
def test_every_cell_but_the_first_shows_a_picture(executed: tuple[list[Any], dict[str, Any]]) -> None:
    _, *cells = executed[0]
    for cell in cells:
        assert any("image/png" in output.get("data", {}) for output in cell.outputs), cell.source
        assert not [output for output in cell.outputs if output.get("name") == "stderr"], cell.outputs


@pytest.mark.drill
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_whole_notebook_reconstructs_images(tmp_path: Path) -> None:
    _, facts = run(tmp_path, "0")
    check_exact(facts)
    assert facts["psnr"] > 25
