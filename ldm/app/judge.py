"""The page *Judge*: the reports of runs."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from ldm.app.inputs import sentences
from ldm.app.roots import allowed, roots, runs, short
from ldm.evaluation.report import REPORT
from ldm.evaluation.report.collect import collect
from ldm.evaluation.report.page import page as report_page

HEIGHT = 900  # pixels of the report's frame
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
"""The report needs nothing from the network, so its frame may fetch nothing."""


@st.cache_data(max_entries=8, show_spinner="Reading the run …")
def _report(run: str, changed: float) -> str:
    """The report on a run, made anew where the run has `changed`: what `ldm-report RUN` writes."""
    return report_page(collect(Path(run)))


def report(run: Path) -> str:
    """The HTML of a run's report; UserError where the folder is no run, or has nothing to show."""
    files = (*run.glob("*"), *run.glob("stage*/metrics.jsonl"))
    return _report(str(run), max((file.stat().st_mtime for file in files), default=0.0))


def page() -> None:
    """Draws the page."""
    st.title("Judge")
    if not (folders := [str(run) for run in runs()]):
        st.info(f"No run in {', '.join(f'`{root}`' for root in roots())}. `make demo` trains one.")
        return
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    chosen = left.selectbox("Run", folders, format_func=lambda name: short(Path(name)))
    with sentences():
        html = report(allowed(chosen))
        right.download_button("Download", html, REPORT, "text/html", width="stretch")
        st.iframe(html.replace("<head>", f"<head>{POLICY}", 1), height=HEIGHT)
