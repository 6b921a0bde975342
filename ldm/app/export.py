"""The page *Export*: a model as one file or a diffusers folder, an adapter in another layout; all read again."""

from __future__ import annotations

import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import streamlit as st

from ldm.app.inputs import plain, sentences
from ldm.app.menu import no_model
from ldm.app.results import opened
from ldm.app.roots import INDEX, allowed, loras, pipelines, short
from ldm.cli.compare import size_of
from ldm.cli.export import check_out, has_published_widths, single_file_layout, write_and_compare
from ldm.cli.export_lora import export_lora
from ldm.sampling import pipeline_io
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError
from ldm.utils.paths import expand
from ldm.utils.precision import DTYPES

TARGETS = {
    "Single file": "single-file",
    "Diffusers folder": "diffusers",
    "LoRA": "lora",
}
FILE, FOLDER, ADAPTER_FILE = TARGETS
PURPOSES = {
    "single-file": "Stable Diffusion's original layout",
    "diffusers": "For diffusers, and programs that read its folders.",
    "lora": "An adapter in the layout of diffusers or of kohya",
}
PRECISIONS = {"fp16": "16 bits (fp16)", "bf16": "16 bits (bf16)", "no": "32 bits"}
MAX_DOWNLOAD_MB = 500
TARGET, MODEL, ADAPTER, BASE = "export-target", "export-model", "export-adapter", "export-base"
"""Keys of the widgets that a run's result fills in."""


@dataclass(frozen=True)
class Job:
    """What is to be written, and where."""

    to: str
    model: str
    precision: str
    out: str
    base: str | None = None
    """Of an adapter: the model that it was trained on."""
    layout: str | None = None


@dataclass(frozen=True)
class Fit:
    """Where a model can go."""

    reason: str
    """Why no single file holds it; empty where one does."""
    in_programs: bool
    """Whether ComfyUI and A1111 open it."""

    @classmethod
    def of(cls, folder: Path) -> Fit:
        """By the configurations in a pipeline's folder. A damaged folder fits: the export says what is wrong."""
        try:
            model = LatentDiffusion(**pipeline_io.read_outline(folder))
        except (OSError, ValueError, KeyError, AttributeError, TypeError):
            return cls("", True)
        try:
            return cls("", has_published_widths(model, single_file_layout(model)))
        except ValueError as error:
            return cls(str(error), False)


def run(job: Job) -> tuple[Path, list[str]]:
    """Writes an export and reads it again; the path, and what was found. UserError where something differs."""
    out, lines = output(job.out), list[str]()
    source = str(allowed(job.model))
    with _without_flags():
        check_out(out, job.to)
        if job.to == "lora":
            base = str(allowed(job.base)) if job.base else None
            export_lora(source, base, job.layout, DTYPES[job.precision], out, lines.append)
        else:
            model = LatentDiffusion(**pipeline_io.read(source, "model"))
            write_and_compare(model, source, job.to, job.precision, out, lines.append)
    return out, lines


def output(text: str) -> Path:
    """The path of a file to write, in a folder inside the roots; UserError where it is not."""
    path = Path(expand(text.strip()))
    return allowed(str(path.parent)) / path.name


@contextmanager
def _without_flags() -> Iterator[None]:
    """Errors of the command, whose flags the page shows by name."""
    try:
        yield
    except UserError as error:
        raise UserError(re.sub(r"(?<!\S)--(?=[a-z])", "", str(error))) from None


def zipped(folder: Path) -> bytes:
    """A folder as an archive; its tensors would not get smaller, so nothing is compressed."""
    with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder.parent))
    return buffer.getvalue()


def page() -> None:
    """Draws the page."""
    st.title("Export")
    _open_result()
    folders = [str(path) for path in pipelines()]
    if not folders:
        no_model()
        return
    first = chosen if (chosen := st.session_state.get(MODEL)) in folders else folders[0]
    st.session_state.setdefault(TARGET, FOLDER if _fit(first).reason else FILE)
    target = st.segmented_control("As", [*TARGETS], key=TARGET, required=True)
    assert target, "a target is required"
    if job := _job(TARGETS[target], folders):
        fit = _fit(job.base or job.model)
        _purpose(job.to, fit)
        reason = fit.reason if job.to == "single-file" else ""
        if st.button("Export", type="primary", disabled=bool(reason), help=plain(reason) or None):
            st.session_state.pop("exported", None)
            with sentences(), st.spinner("Writing, reading again, comparing …"):
                st.session_state["exported"] = run(job)
    if exported := st.session_state.get("exported"):
        _show(*exported)


@st.cache_data(max_entries=64, show_spinner=False)
def _fit_of(folder: str, changed: float) -> Fit:
    """Where the model of a folder can go, found anew where the folder has `changed`."""
    return Fit.of(Path(folder))


def _fit(folder: str) -> Fit:
    return _fit_of(folder, (Path(folder) / INDEX).stat().st_mtime)


def _purpose(to: str, fit: Fit) -> None:
    """What the export is for, or, of a single file, why it can't be."""
    if to == "single-file" and fit.reason:
        st.info(f"This model has parts that the single-file layout lacks; take *{FOLDER}*.")
    elif to == "diffusers":
        st.caption(PURPOSES[to])
    elif fit.in_programs:
        st.caption(f"{PURPOSES[to]}, for ComfyUI and A1111.")
    else:
        st.caption(f"{PURPOSES[to]}. ComfyUI and A1111 can't open this model: its U-Net isn't Stable Diffusion's.")


def _open_result() -> None:
    """Chooses what the page was opened with: a run's model, or its adapter."""
    if result := opened():
        st.session_state[MODEL] = st.session_state[BASE] = result.model
        st.session_state.pop(TARGET, None)
        if result.lora:
            st.session_state[TARGET], st.session_state[ADAPTER] = ADAPTER_FILE, result.lora


def _job(to: str, folders: list[str]) -> Job | None:
    """What the visitor chooses; None without an adapter."""

    def name(path: str) -> str:
        return short(Path(path))

    left, right = st.columns(2)
    base = layout = None
    if to == "lora":
        if not (files := [str(path) for path in loras()]):
            st.info("No adapter in `RUN/lora` of a run; a fine-tuning with `finetune.kind=lora` trains one.")
            return None
        model = left.selectbox("Adapter", files, key=ADAPTER, format_func=name)
        base = right.selectbox("Trained on", folders, key=BASE, format_func=name)
        layout = left.selectbox("Layout", ["kohya", "diffusers"], key="export-layout")
    else:
        model = left.selectbox("Model", folders, key=MODEL, format_func=name)
    precision = right.selectbox("Weights", [*PRECISIONS], key="export-precision", format_func=PRECISIONS.__getitem__)
    kind = f"-{layout}" if layout else "" if to == "single-file" else "-diffusers"
    suffix = "" if to == "diffusers" else ".safetensors"
    run_dir = Path(model).parent
    proposed = run_dir / f"{run_dir.parent.name if to == 'lora' else run_dir.name}{kind}-{precision}{suffix}"
    out = st.text_input("Write to", str(proposed), key=f"out-{to}-{model}-{layout}-{precision}")
    return Job(to, model, precision, out, base, layout)


def _show(path: Path, lines: list[str]) -> None:
    """What was found, and the export itself where it is small enough for a browser."""
    st.success(plain(f"Wrote {path}; read again, everything is equal."))
    st.code("\n".join(lines), language=None, wrap_lines=True)
    if not path.exists():
        return
    size = size_of(path) / 2**20
    if size > MAX_DOWNLOAD_MB:
        st.caption(f"{size:,.0f} MB are too many to download here; copy it from the folder.")
    elif path.is_dir():
        st.download_button(f"Download, {size:,.1f} MB", lambda: zipped(path), f"{path.name}.zip", "application/zip")
    else:
        st.download_button(f"Download, {size:,.1f} MB", path.read_bytes, path.name, "application/octet-stream")
