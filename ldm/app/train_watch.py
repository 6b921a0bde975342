"""A training on the page *Train*: its progress, curves and samples, which refresh by themselves; stop, continue."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import streamlit as st

from ldm.app import processes
from ldm.app.inputs import plain, sentences
from ldm.app.menu import menu_page
from ldm.app.results import Result
from ldm.app.roots import short
from ldm.app.train_settings import configuration
from ldm.evaluation.report.collect import Metrics
from ldm.training.resource_estimate import format_time

EVERY = 2.0  # seconds between two looks
MAX_LINE = 160  # characters of a printed line that are shown
STAGES = {"stage1": "Autoencoder", "stage2": "U-Net"}
CURVES = {
    "stage1": {"loss": "loss"},
    "stage2": {"loss": "loss", "held_out_loss": "held out", "trained_on_loss": "trained on"},
}
COLOURS = ["#0072b2", "#e69f00", "#009e73"]


def watch(run: Path, running: bool, resume: Callable[[Path], None]) -> None:
    """Draws the training in a folder, again and again while it is `running`; `resume` continues it."""
    st.fragment(_draw, run_every=EVERY if running else None)(run, running, resume)


def _draw(run: Path, was_running: bool, resume: Callable[[Path], None]) -> None:
    running, values = processes.is_running(run), configuration(run)
    if running != was_running:
        st.rerun()  # the whole page, which then refreshes by itself no longer
    finished = None if running else Result.of(run)
    metrics = {name: Metrics.read(run / name / "metrics.jsonl") for name in STAGES}
    _state(run, running, finished, resume)
    for stage in () if finished else _stages(values):
        _progress(run, stage, values, metrics[stage])
    current = "stage2" if metrics["stage2"].lines or not metrics["stage1"].lines else "stage1"
    if any(metric.lines for metric in metrics.values()):
        if running:
            _numbers(current, values, metrics[current])
        _pictures(run, metrics)
    with st.expander("Log"):
        st.code("\n".join(processes.lines(run)[-40:]) or "Nothing yet.", None, wrap_lines=True)


def _state(run: Path, running: bool, finished: Result | None, resume: Callable[[Path], None]) -> None:
    """A sentence on how it stands, and the button that goes with it."""
    if finished:
        _finished(finished)
        return
    text, button = st.columns([4, 1], vertical_alignment="center")
    record = processes.Record.read(run)
    if running and not processes.is_ours(run):
        text.markdown("**Training**, started elsewhere, where it can be stopped too.")
        return
    if running:
        ending = bool(record and record.asked_to_end)
        text.markdown("**Stopping**, once it has saved." if ending else f"**Training.** {plain(_activity(run))}")
        label = "Stop at once" if ending else "Stop"
        if button.button(label, help="It saves first; the same run can go on.", width="stretch"):
            processes.stop(run)
            st.rerun(scope="fragment")
        return
    if why := processes.why_ended(run):
        text.error(plain(why))
    else:
        text.info("Stopped." if record else "Not finished.")
    if button.button("Continue", type="primary", help="From the last step that was saved.", width="stretch"):
        with sentences():
            resume(run)
        st.rerun()


def _finished(result: Result) -> None:
    """Where it is, and the pages that go on with it."""
    text, links = st.columns([3, 2], vertical_alignment="center")
    text.success(f"Finished: `{short(result.folder)}`")
    with links.container(horizontal=True):
        address = result.address
        st.page_link(menu_page("generate"), label="Draw with it", icon=":material/brush:", query_params=address)
        if not result.word:
            st.page_link(menu_page("export"), label="Export", icon=":material/save:", query_params=address)


def _activity(run: Path) -> str:
    """What a training does now, by what it printed last; nothing of its steps, which have bars."""
    last = next(reversed(processes.lines(run)), "It starts, which takes some seconds.")
    if bar := re.match(r"(\w+): +(\d+)%\|", last):
        return "" if bar[1] in STAGES else f"{bar[1].capitalize()}: {bar[2]} %"
    return last if len(last) <= MAX_LINE else f"{last[:MAX_LINE]} …"


def _stages(values: Mapping[str, Any]) -> list[str]:
    """The stages that a run trains; none before its configuration is written."""
    stage1 = values.get("stage1", {})
    if not values:
        return []
    return ["stage2"] if stage1.get("pretrained") or stage1.get("model") == "identity" else ["stage1", "stage2"]


def _progress(run: Path, stage: str, values: Mapping[str, Any], metrics: Metrics) -> None:
    steps = int(values.get(stage, {}).get("steps", 1))
    done = steps if stage == "stage1" and (run / "autoencoder").exists() else metrics.step
    st.progress(min(1.0, done / steps), f"{STAGES[stage]}: step {done:,} of {steps:,}")


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
    """The newest samples, and the curves below them."""
    sheets = [path for stage in reversed(STAGES) for path in sorted((run / stage / "samples").glob("step-*.png"))[-1:]]
    if sheets:
        step = int(sheets[0].stem.removeprefix("step-"))
        kind = "Samples" if sheets[0].parents[1].name == "stage2" else "Reconstructions"
        st.markdown(f"**{kind}** at step {step:,}")
        st.image(sheets[0].read_bytes(), width="content")
    else:
        st.info("The first samples appear here.")
    tables = {stage: _table(metrics[stage], CURVES[stage]) for stage in reversed(STAGES)}
    drawn = {stage: table for stage, table in tables.items() if not table.empty}
    for place, (stage, table) in zip(st.columns(len(drawn) or 1, gap="large"), drawn.items(), strict=False):
        place.markdown(f"**{STAGES[stage]}**, loss")
        place.line_chart(table, x_label="step", color=[*COLOURS[: len(table.columns)]], height=220)


def _table(metrics: Metrics, names: Mapping[str, str]) -> pd.DataFrame:
    """Metrics over steps, a column each; straight lines between the values of one that is measured less often."""
    columns = {shown: dict(points) for name, shown in names.items() if len(points := metrics.points(name)) > 1}
    table = pd.DataFrame(columns).sort_index()
    return table.set_index(table.index.astype(int)).interpolate("index", limit_area="inside")
