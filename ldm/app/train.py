"""The page *Train*: start a training, watch it, stop it, continue it. It goes on when the page is closed."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from ldm.app import processes
from ldm.app.inputs import sentences
from ldm.app.roots import allowed, pipelines, roots, short, started_runs
from ldm.app.train_estimate import estimate
from ldm.app.train_form import choose, has_own_images, show_command
from ldm.app.train_settings import TINY, Base, configuration, configurations, free_name, resolve, shares_caption, tidy
from ldm.app.train_watch import watch
from ldm.utils.errors import UserError

NEW, RUNS = VIEWS = ("New training", "Runs")


def page() -> None:
    """Draws the page."""
    st.title("Train")
    runs = [run for run in started_runs() if configuration(run) or processes.Record.read(run)]
    busy = [run for run in runs if processes.is_running(run)]
    if "train-next-view" in st.session_state:
        st.session_state["train-view"] = st.session_state.pop("train-next-view")
    st.session_state.setdefault("train-view", RUNS if busy else NEW)
    view = st.segmented_control("View", VIEWS, key="train-view", required=True, label_visibility="collapsed")
    assert view, "a view is required"
    # a place for each view, so that what another one drew goes at once
    places = {name: st.container() if name == view else st.empty() for name in VIEWS}
    with places[view]:
        if view == NEW:
            _new(busy)
        elif not runs:
            st.info(f"No training in {', '.join(f'`{root}`' for root in roots())} yet.")
        else:
            _watch(runs, busy)


def _watch(runs: list[Path], busy: list[Path]) -> None:
    names = [str(run) for run in dict.fromkeys([*busy, *runs])]
    marks = {str(run): ", in training" for run in busy}
    if st.session_state.get("train-run") not in names:
        st.session_state["train-run"] = names[0]
    key = f"train-run-{sorted(marks)}"  # another menu: Streamlit's knows its choice by the words that it shows
    if st.session_state.get(key) not in names:
        st.session_state[key] = st.session_state["train-run"]
    chosen = st.selectbox("Run", names, key=key, format_func=lambda name: short(Path(name)) + marks.get(name, ""))
    st.session_state["train-run"] = chosen
    with sentences():
        watch(allowed(chosen), chosen in marks, resume)


def resume(run: Path) -> None:
    """Continues a run as its own configuration says; UserError where it can't start."""
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"run.dir: {run} has no config.yaml, for its training ended too early; start it anew")
    resolve(Base(run.name, file), [f"run.dir={run}"])  # its paths too must be inside the roots
    _start(run, processes.command(tidy(file), [f"run.dir={tidy(run)}"], "--yes"))


def _start(run: Path, arguments: list[str]) -> None:
    processes.start(run, arguments, started_runs())
    st.session_state["train-next-view"], st.session_state["train-run"] = RUNS, str(run.resolve())
    st.session_state.pop("train-form", None)


def _new(busy: list[Path]) -> None:
    """The form, and what starts from it."""
    folder = configurations()
    offered = bool(folder and not busy and not pipelines() and not has_own_images())
    if folder and offered:
        _offer_tiny(folder / TINY)
    if not (chosen := choose()):
        return
    form, config = chosen
    captions = config is not None and shares_caption(config)
    if captions:
        captions = st.checkbox(
            "No image has a caption: take the folder's name for all",
            key="train-captions",
            help="Otherwise such a training is refused, with what to do.",
        )
    flags = ("--yes",) if captions else ()
    left, middle, right = st.columns([1, 1, 2], vertical_alignment="center")
    started = left.button(
        "Start training", type="secondary" if offered else "primary", disabled=config is None, width="stretch"
    )
    measured = middle.button("Estimate time and memory", disabled=config is None or bool(busy), width="stretch")
    show_command(form)
    with sentences():
        if started and config:
            _check_new(config.run.dir)
            _start(config.run.dir, form.command(*flags))
            st.rerun()
    estimate(form.command("--dry-run", *flags), measured, right)


def _check_new(run: Path) -> None:
    if (run / "config.yaml").exists():
        raise UserError(f"run.dir: {run} is a run already; give another name, or continue it among the runs")


def _offer_tiny(file: Path) -> None:
    with st.container(border=True):
        left, right = st.columns([3, 2], vertical_alignment="center")
        left.markdown(
            "**No model yet?** Train both stages on small drawings: it won't draw well, but shows how training goes."
        )
        if right.button("Train the tiny model (about a minute)", type="primary", width="stretch"):
            with sentences():
                run = tidy(roots()[0] / free_name("tiny"))
                _start(run, processes.command(file, [f"run.dir={run}"]))
                st.rerun()
