"""Writes notebooks/latent_diffusion.ipynb from the .py of the same name, which is what people edit.

    python scripts/notebook.py              keeps the outputs of cells that did not change
    python scripts/notebook.py --execute    runs it, which takes minutes, and stores the outputs

Needs the extra `notebook`.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "notebooks/latent_diffusion.py"
NOTEBOOK = SOURCE.with_suffix(".ipynb")


def from_source() -> nbformat.NotebookNode:
    """The notebook without outputs; a cell's id is its position, so that the same source gives the same file."""
    notebook = jupytext.read(SOURCE)
    notebook.metadata.pop("jupytext", None)
    for number, cell in enumerate(notebook.cells):
        cell.id = f"cell-{number}"
        cell.metadata = nbformat.NotebookNode()
    return notebook


def execute(notebook: nbformat.NotebookNode, folder: Path, environment: Mapping[str, str] = os.environ) -> None:
    """Runs all cells in one kernel whose working folder is `folder`; CellExecutionError for one that fails."""
    paths = os.pathsep.join(filter(None, (str(ROOT), environment.get("PYTHONPATH"))))
    client = NotebookClient(
        notebook,
        timeout=3600,
        startup_timeout=600,  # on a busy machine
        kernel_name="python3",
        resources={"metadata": {"path": str(folder)}},
    )
    own = {name: value for name, value in environment.items() if name != "MPLBACKEND"}  # another would show no plot
    client.execute(env={**own, "PYTHONPATH": paths})
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # the clock times of each cell


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--execute", action="store_true", help="run the cells and store their outputs")
    parser.add_argument("--dir", type=Path, help="working folder of the kernel; default: a new one")
    args = parser.parse_args(arguments)
    notebook = from_source()
    if args.execute:
        with tempfile.TemporaryDirectory() as fresh:
            execute(notebook, args.dir or Path(fresh))
    elif NOTEBOOK.exists():
        stored = {cell.source: cell for cell in nbformat.read(NOTEBOOK, 4).cells if cell.cell_type == "code"}
        for cell in notebook.cells:
            if cell.cell_type == "code" and cell.source in stored:
                cell.outputs = stored[cell.source].outputs
                cell.execution_count = stored[cell.source].execution_count
    nbformat.write(notebook, NOTEBOOK)


if __name__ == "__main__":
    main()
