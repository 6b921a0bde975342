"""A training on the page *Train*: its progress, curves and samples, which refresh by themselves; stop, continue."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from ldm.app import processes
from ldm.app.generate import page as generate
from ldm.app.inputs import plain, sentences
from ldm.app.roots import short
from ldm.app.train_settings import configuration
from ldm.evaluation.report.collect import Metrics
from ldm.training.preflight import format_time

EVERY = 2.0  # seconds between two looks
MAX_LINE = 160  # characters of a printed line that are shown
STAGES = {"stage1": "Autoencoder", "stage2": "U-Net"}
CURVES = {
    "stage1": {"loss": "loss"},
    "stage2": {"loss": "loss", "held_out_loss": "held out", "trained_on_loss": "trained on"},
}
COLOURS = ["#0072b2", "#e69f00", "#009e73"]


def result(run: Path, values: Mapping[str, Any]) -> Path | None:
    """What a finished run hands over; None where it has not finished."""
    finetune = values.get("finetune", {})
    kind, merge = finetune.get("kind", "full"), finetune.get("merge", False)
    name = "pipeline" if kind == "full" or merge else "embeddings" if kind == "inversion" else "lora"
    return run / name if values and (run / name).exists() else None


def watch(run: Path, resume: Callable[[Path], None]) -> None:
    """Draws the training in a folder, again and again while it goes on; `resume` continues it."""
    running = processes.is_running(run)
    st.fragment(_draw, run_every=EVERY if running else None)(run, running, resume)


def _draw(run: Path, was_running: bool, resume: Callable[[Path], None]) -> None:
    running, values = processes.is_running(run), configuration(run)
    if running != was_running:
        st.rerun()  # the whole page, which then refreshes by itself no longer
    finished = None if running else result(run, values)
    metrics = {name: Metrics.read(run / name / "metrics.jsonl") for name in STAGES}
    _state(run, running, finished, resume)
    for stage in () if finished else _stages(values):
        _progress(run, stage, values, metrics[stage])
    current = "stage2" if metrics["stage2"].lines or not metrics["stage1"].lines else "stage1"
    if running:
        _numbers(current, values, metrics[current])
    if any(metric.lines for metric in metrics.values()):
        _pictures(run, metrics)
    with st.expander("Log"):
        st.code("\n".join(processes.lines(run)[-40:]) or "Nothing yet.", None, wrap_lines=True)


def _state(run: Path, running: bool, finished: Path | None, resume: Callable[[Path], None]) -> None:
    """A sentence on how it stands, and the button that goes with it."""
    text, button = st.columns([4, 1], vertical_alignment="center")
    record = processes.Record.read(run)
    if running:
        ending = bool(record and record.asked_to_end)
        text.markdown("**Stopping**, once it has saved." if ending else f"**Training.** {plain(_activity(run))}")
        label = "Stop at once" if ending else "Stop"
        if button.button(label, help="It saves first; the same run can go on.", width="stretch"):
            processes.stop(run)
            st.rerun(scope="fragment")
        return
    if finished:
        text.success(f"Finished: `{short(finished)}`")
        if finished.name == "pipeline":
            target = st.Page(generate, title="Generate", url_path="generate")
            button.page_link(target, label="Draw with it", icon=":material/brush:")
        return
    if why := processes.why_ended(run):
        text.error(plain(why))
    else:
        text.info("Stopped." if record else "Not finished.")
    if button.button("Continue", type="primary", help="From the last step that was saved.", width="stretch"):
        with sentences():
            resume(run)
        st.rerun()


def _activity(run: Path) -> str:
    """What a training does now, by what it printed last; nothing of its steps, which have bars."""
    last = next(reversed(processes.lines(run)), "It starts, which takes some seconds.")
    if bar := re.match(r"(\w+): +(\d+)%\|", last):
        return "" if bar[1] in STAGES else f"{bar[1].capitalize()}: {bar[2]} %"
    return last if len(last) <= MAX_LINE else f"{last[:MAX_LINE]} …"


def _stages(values: Mapping[str, Any]) -> list[str]:
    """The stages that a run trains."""
    stage1 = values.get("stage1", {})
    return ["stage2"] if stage1.get("pretrained") or stage1.get("model") == "identity" else ["stage1", "stage2"]


def _progress(run: Path, stage: str, values: Mapping[str, Any], metrics: Metrics) -> None:
    steps = int(values.get(stage, {}).get("steps", 1))
    done = steps if stage == "stage1" and (run / "autoencoder").exists() else metrics.step
    st.progress(min(1.0, done / steps), f"{STAGES[stage]}: step {done:,} of {steps:,}" if values else STAGES[stage])


def _numbers(stage: str, values: Mapping[str, Any], metrics: Metrics) -> None:
    """Speed, time left and loss of the stage that trains."""
    speed, loss = metrics.last("images_per_second"), metrics.last("loss")
    columns = st.columns(3)
    keys = values.get(stage, {})
    left = (keys.get("steps", 0) - metrics.step) * keys.get("batch", 0) / speed if speed else None
    columns[0].metric("Images a second", f"{speed:.3g}" if speed else "–")
    columns[1].metric(f"Time left, {STAGES[stage]}", format_time(left) if left is not None else "–")
    columns[2].metric("Loss", f"{loss:.3g}" if loss is not None else "–")


def _pictures(run: Path, metrics: Mapping[str, Metrics]) -> None:
    """The newest samples, and the curves beside them."""
    left, right = st.columns(2, gap="large")
    for stage in reversed(STAGES):
        table = _table(metrics[stage], CURVES[stage])
        if not table.empty:
            right.markdown(f"**{STAGES[stage]}**, loss")
            right.line_chart(table, x_label="step", color=[*COLOURS[: len(table.columns)]], height=220)
    sheets = [path for stage in reversed(STAGES) for path in sorted((run / stage / "samples").glob("step-*.png"))[-1:]]
    if sheets:
        step = int(sheets[0].stem.removeprefix("step-"))
        kind = "Samples" if sheets[0].parents[1].name == "stage2" else "Reconstructions"
        left.markdown(f"**{kind}** at step {step:,}")
        left.image(sheets[0].read_bytes(), width="stretch")
    else:
        left.info("The first samples appear here.")


def _table(metrics: Metrics, names: Mapping[str, str]) -> pd.DataFrame:
    """Metrics over steps, a column each; straight lines between the values of one that is measured less often."""
    columns = {shown: dict(points) for name, shown in names.items() if len(points := metrics.points(name)) > 1}
    table = pd.DataFrame(columns).sort_index()
    return table.set_index(table.index.astype(int)).interpolate("index", limit_area="inside")
