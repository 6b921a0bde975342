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
from ldm.app.roots import allowed, loras, pipelines, short
from ldm.cli.compare import size_of
from ldm.cli.export import check_out, write_and_compare
from ldm.cli.export_lora import export_lora
from ldm.sampling import pipeline_io
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError
from ldm.utils.paths import expand
from ldm.utils.precision import DTYPES

TARGETS = {
    "Single file": ("single-file", "For ComfyUI and A1111: Stable Diffusion's original layout."),
    "Diffusers folder": ("diffusers", "For diffusers, and programs that read its folders."),
    "LoRA": ("lora", "An adapter in the layout of diffusers, or of kohya for ComfyUI and A1111."),
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
    st.session_state.setdefault(TARGET, next(iter(TARGETS)))
    target = st.segmented_control("As", [*TARGETS], key=TARGET, required=True)
    assert target, "a target is required"
    to, purpose = TARGETS[target]
    st.caption(purpose)
    job = _job(to, folders)
    if job and st.button("Export", type="primary"):
        st.session_state.pop("exported", None)
        with sentences(), st.spinner("Writing, reading again, comparing …"):
            st.session_state["exported"] = run(job)
    if exported := st.session_state.get("exported"):
        _show(*exported)


def _open_result() -> None:
    """Chooses what the page was opened with: a run's model, or its adapter."""
    if result := opened():
        st.session_state[TARGET] = "LoRA" if result.lora else next(iter(TARGETS))
        st.session_state[MODEL] = st.session_state[BASE] = result.model
        if result.lora:
            st.session_state[ADAPTER] = result.lora


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
        layout = left.selectbox("Layout", ["kohya", "diffusers"])
    else:
        model = left.selectbox("Model", folders, key=MODEL, format_func=name)
    precision = right.selectbox("Weights", [*PRECISIONS], format_func=PRECISIONS.__getitem__)
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
