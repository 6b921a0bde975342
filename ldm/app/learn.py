"""The page *Learn*: what noise does to an image, and how a network takes it away."""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd
import streamlit as st
from PIL import Image

from ldm.app import learn_guidance, learn_model
from ldm.app.forward import FORMULAS, LEARNED, PROCESSES, coefficients, curves, learned, noised
from ldm.app.inputs import IMAGE_TYPES, decoded, initial, plain, sample, sentences
from ldm.app.launch import MAX_UPLOAD_MB
from ldm.app.learn_parts import formula, row
from ldm.app.roots import allowed, learned_runs, short
from ldm.data.crops import crop_resize
from ldm.diffusion.process import DiffusionProcess

SIDE = 192  # pixels of the pictures
COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#666666", "#56b4e9"]  # told apart by all eyes
STRIP = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
TITLES = {
    "Forward": "How an image becomes noise",
    "Schedules": "Noise schedules side by side",
    "Network": "What the network predicts",
    "Reverse": "How noise becomes an image",
    "Steps": "How many steps it takes",
    "Guidance": "What guidance does",
}


def page() -> None:
    """Draws the page: one view of several, so that each is quick."""
    asked = st.query_params.get("view")
    key = initial("learn-view", asked if asked in TITLES else "Forward")
    view = st.segmented_control("View", list(TITLES), key=key, required=True, label_visibility="collapsed")
    assert view, "a view is required"
    st.title(TITLES[view])
    with sentences():
        if view == "Forward":
            _forward(_image(), _processes())
        elif view == "Schedules":
            _schedules(_image(), _processes())
        elif view == "Network":
            learn_model.network(_image())
        else:
            {"Reverse": learn_model.reverse, "Steps": learn_model.steps, "Guidance": learn_guidance.guidance}[view]()


def _image() -> Image.Image:
    """The visitor's image, or a sample."""
    with st.popover("Your image"):
        upload = st.file_uploader(
            "Image", IMAGE_TYPES, max_upload_size=MAX_UPLOAD_MB, help="Without one, a drawing is used."
        )
        if not upload:
            image, source = sample()
            st.caption(plain(source))
            return crop_resize(image, (SIDE, SIDE))[0]
        return crop_resize(decoded(upload.getvalue()), (SIDE, SIDE))[0]


@st.cache_data(max_entries=4)
def _learned(run: str, changed: float) -> DiffusionProcess:
    """The schedule that a run has learned, read anew where its checkpoints have `changed`."""
    return learned(Path(run))


def _processes() -> dict[str, DiffusionProcess]:
    """The schedules, and one that a run has learned, where there is such a run."""
    if not (runs := [str(run) for run in learned_runs()]):
        return PROCESSES
    run = st.selectbox("Learned schedule of", runs, format_func=lambda name: short(Path(name)))
    changed = allowed(f"{run}/stage2/checkpoints").stat().st_mtime
    return {**PROCESSES, LEARNED: _learned(run, changed)}


@st.fragment
def _forward(image: Image.Image, processes: dict[str, DiffusionProcess]) -> None:
    st.markdown(
        "Training shows the network images with noise of every strength. Move the slider: $t$ goes from image to noise."
    )
    left, right = st.columns(2)
    name = left.selectbox("Noise schedule", list(processes), index=2)
    share = right.slider("t / T", 0.0, 1.0, 0.4, 0.01)
    alpha, sigma, log_snr = coefficients(processes[name], share)
    pictures, text = st.columns(2, gap="large")
    with pictures:
        row([image, noised(image, processes[name], [share])[0]], ["x₀, the image", f"x_t at t/T = {share:.2f}"])
    with text:
        formula(
            r"x_t = \alpha(t)\,x_0 + \sigma(t)\,\varepsilon,\qquad \varepsilon \sim \mathcal{N}(0, 1)",
            "DDPM, arXiv 2006.11239, eq. 4",
        )
        formula(*FORMULAS[name])
        for column, label, value in zip(st.columns(3), ("α", "σ", "log-SNR"), (alpha, sigma, log_snr), strict=True):
            column.metric(label, f"{value:.3f}")


def _schedules(image: Image.Image, processes: dict[str, DiffusionProcess]) -> None:
    alpha_bar, log_snr = curves(processes)
    left, right = st.columns(2)
    left.markdown("**Signal left**, $\\bar\\alpha = \\alpha^2 / (\\alpha^2 + \\sigma^2)$")
    left.altair_chart(_chart(alpha_bar))
    right.markdown("**Log-SNR**, $\\log(\\alpha^2 / \\sigma^2)$, within ±20")
    right.altair_chart(_chart(log_snr))
    st.markdown("The same image and noise at equal $t / T$:")
    for i, (name, process) in enumerate(processes.items()):
        label, strip = st.columns([2, 5], vertical_alignment="center")
        with label:
            st.markdown(f"**{name}**")
            formula(*FORMULAS[name])
        with strip:
            row(noised(image, process, STRIP), [] if i else [f"{share:.1f}" for share in STRIP])


def _chart(table: pd.DataFrame) -> alt.Chart:
    """A line a column, with a legend below, where narrow screens don't cut it."""
    long = table.reset_index().melt(table.index.name, var_name="schedule", value_name="value")
    scale = alt.Scale(domain=list(table), range=COLOURS[: len(table.columns)])
    legend = alt.Legend(orient="bottom", columns=3, title=None, labelLimit=100)
    return (
        alt.Chart(long)
        .mark_line()
        .encode(
            x=alt.X(f"{table.index.name}:Q"),
            y=alt.Y("value:Q", title=None),
            color=alt.Color("schedule:N", scale=scale, legend=legend),
            tooltip=[
                "schedule",
                alt.Tooltip(f"{table.index.name}:Q", format=".2f"),
                alt.Tooltip("value:Q", format=".3f"),
            ],
        )
        .properties(height=330)
    )
