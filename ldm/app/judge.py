"""The page *Judge*: the reports of runs, one or side by side, and comparisons with a GAN and a VAE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import streamlit as st

from ldm.app.inputs import sentences
from ldm.app.menu import no_model
from ldm.app.roots import allowed, families, runs, short
from ldm.evaluation.report import REPORT
from ldm.evaluation.report.collect import collect
from ldm.evaluation.report.comparison import comparison
from ldm.evaluation.report.page import page as report_page

REPORTS, FAMILIES = "Reports", "GAN, VAE, diffusion"
HEIGHT = 900  # pixels of the report's frame
POLICY = (
    '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:; '
    "style-src 'unsafe-inline'; script-src 'unsafe-inline'\">"
)
"""The report needs nothing from the network, so its frame may fetch nothing."""


@st.cache_data(max_entries=8, show_spinner="Reading the runs …")
def _report(folders: tuple[str, ...], changed: float) -> str:
    """The report on runs, made anew where one has `changed`: what `ldm-report` writes."""
    found = [collect(Path(folder)) for folder in folders]
    return report_page(found[0]) if len(found) == 1 else comparison(found)


def report(folders: Sequence[Path]) -> str:
    """The HTML of the runs' report; UserError where a folder is no run, or has nothing to show."""
    files = [file for run in folders for file in (*run.glob("*"), *run.glob("stage*/metrics.jsonl"))]
    return _report(tuple(map(str, folders)), max((file.stat().st_mtime for file in files), default=0.0))


def _last_trained(run: Path) -> float:
    """When a run wrote its last metrics, in seconds since the epoch; 0 where it has none."""
    return max((file.stat().st_mtime for file in run.glob("stage[12]/metrics.jsonl")), default=0.0)


def page() -> None:
    """Draws the page."""
    st.title("Judge")
    compared = families()
    if not (folders := [str(run) for run in sorted(runs(), key=_last_trained, reverse=True)]) and not compared:
        no_model("run")
        return
    views = [REPORTS] * bool(folders) + [FAMILIES] * bool(compared)
    if len(views) > 1:
        view = st.segmented_control("View", views, default=views[0], required=True, label_visibility="collapsed")
    else:
        view = views[0]
    with sentences():
        if view == REPORTS:
            _reports(folders)
        else:
            _families(compared)


def _reports(folders: list[str]) -> None:
    left, right = st.columns([3, 1], vertical_alignment="bottom")
    chosen = left.multiselect(
        "Runs, several side by side", folders, default=folders[:1], format_func=lambda name: short(Path(name))
    )
    if not chosen:
        st.info("Choose a run; of several, the report is about what differs and which is better.")
        return
    html = report([allowed(name) for name in chosen])
    right.download_button("Download", html, REPORT, "text/html", width="stretch")
    st.iframe(html.replace("<head>", f"<head>{POLICY}", 1), height=HEIGHT)


def _families(folders: list[Path]) -> None:
    """What `scripts/compare_families.py` wrote: who wins what, and a picture of each."""
    folder = st.selectbox("Comparison", folders, format_func=short)
    st.markdown((folder / "families.md").read_text("utf-8"))
    if (picture := folder / "families.png").is_file():
        st.image(str(picture))
