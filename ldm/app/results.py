"""What a finished run hands over, and the address by which the pages *Generate* and *Export* open with it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from ldm.app.inputs import sentences
from ldm.app.roots import allowed, inside, loras, pipelines, runs
from ldm.app.train_settings import configuration, tidy
from ldm.models.adapters.embedding_files import DIFFUSERS_FILE
from ldm.utils.errors import UserError

ADDRESS = "run"
"""The part of a page's address that names a run."""


@dataclass(frozen=True)
class Result:
    """What a run wrote last, the model that draws with it, and a prompt that it was trained with."""

    folder: Path
    """`RUN/pipeline`, `RUN/lora` or `RUN/embeddings`."""
    base: str
    """Of an adapter or a word: the model that it was trained on, a path or an id of the Hub."""
    prompt: str

    @classmethod
    def of(cls, run: Path) -> Result | None:
        """None where the run has not finished."""
        values = configuration(run)
        finetune = values.get("finetune", {})
        kind, merge = finetune.get("kind", "full"), finetune.get("merge", False)
        name = "pipeline" if kind == "full" or merge else "embeddings" if kind == "inversion" else "lora"
        if not (values and (run / name).exists()):
            return None
        prompts = values.get("sample", {}).get("prompts") or [""]
        return cls(run / name, str(values.get("stage2", {}).get("init_from") or ""), str(prompts[0]))

    @property
    def model(self) -> str | None:
        """The pipeline's folder, as menus have it; None where it is in none of the roots."""
        folder = (self.folder if self.folder.name == "pipeline" else Path(self.base)).resolve()
        return next((str(path) for path in pipelines() if path.resolve() == folder), None)

    @property
    def lora(self) -> str | None:
        """The adapter's file, as menus have it."""
        return _in(self.folder, loras()) if self.folder.name == "lora" else None

    @property
    def word(self) -> str | None:
        """The file of a learned word, as menus have it."""
        return _in(self.folder, words()) if self.folder.name == "embeddings" else None

    @property
    def address(self) -> dict[str, str]:
        """With which a page opens with this result."""
        return {ADDRESS: str(tidy(self.folder.parent))}


def _in(folder: Path, files: list[Path]) -> str | None:
    return next((str(file) for file in files if file.parent.resolve() == folder.resolve()), None)


def words() -> list[Path]:
    """Files of learned words, one a run; of one word in several layouts, diffusers' own."""
    of_runs = []
    for run in runs():
        files = [file for file in sorted((run / "embeddings").glob("*.safetensors")) if inside(file.resolve())]
        of_runs += [file for file in files if file.name == DIFFUSERS_FILE] or files[:1]
    return of_runs


def opened() -> Result | None:
    """The result that the page's address names, once: the address then names it no longer."""
    if not (name := st.query_params.get(ADDRESS)):
        return None
    del st.query_params[ADDRESS]
    with sentences(stop=False):
        if not (result := Result.of(run := allowed(name))):
            raise UserError(f"{run}: it has not finished; watch it on the page Train")
        if not result.model:
            where = f"its model, {result.base or result.folder}, is in none of the app's folders"
            raise UserError(f"{run}: {where}; start the app with --root of a folder that has it")
        return result
    return None
