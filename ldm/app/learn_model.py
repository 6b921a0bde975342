"""Views of *Learn* that need a model: its predictions, the reverse process, and the number of steps."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import streamlit as st
from PIL import Image

from ldm.app.drawing import Loaded, Settings
from ldm.app.learn_parts import asked, formula, model, remembered, row, subject, waits
from ldm.app.reverse import SOLVERS, X0_FORMULAS, Film, Looks, film, looks, timed
from ldm.sampling.options import Sampling

SHARES = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
STEPS = (5, 10, 25, 50)


def network(image: Image.Image) -> None:
    """What the network sees and predicts at each t."""
    if not (chosen := model()):
        return
    folder, loaded = chosen
    with st.form("network"):
        settings, pressed, _ = subject(loaded, folder, "Predict", prompt="thumbs up")  # as the sample shows
        settings = replace(settings, options=Sampling(guidance_scale=1.0))
    if not (requested := asked("network", loaded, (folder,), settings, pressed)):
        waits()
        return
    with st.spinner("Predicting at 20 noise levels …"):
        key = ("network", loaded.weights, requested, hash(image.tobytes()))
        found = remembered(key, lambda: looks(loaded, requested, image))
    _looks(found, loaded.model.prediction_type)


@st.fragment
def _looks(found: Looks, prediction_type: str) -> None:
    count = len(found.at)
    number = st.slider("Noise level", 1, count, count // 2, help="1 is almost the image, the last is almost noise.")
    look = found.at[number - 1]
    st.markdown(
        f"The network sees $x_t$ at $t / T = {look.level.noise:.2f}$, "
        f"with $\\alpha = {look.level.alpha:.3f}$ and $\\sigma = {look.level.sigma:.3f}$:"
    )
    row(
        [found.x0, look.x_t, look.x0, found.eps, look.eps],
        ["x₀", "x_t", "x̂₀, predicted", "ε", "ε̂, predicted"],
    )
    st.caption("x₀, x_t and x̂₀ are latents that the autoencoder decoded; it never learned noisy ones. "
               "ε and ε̂ are latents: up to three channels as colours.")  # fmt: skip
    text, numbers = st.columns([2, 1], gap="large")
    with text:
        formula(r"x_t = \alpha\,x_0 + \sigma\,\varepsilon", "DDPM, arXiv 2006.11239, eq. 4")
        formula(*X0_FORMULAS[prediction_type])
    with numbers:
        st.metric("Mean squared error of x̂₀, in latents", f"{look.x0_error:.4f}")
        st.metric("Mean squared error of ε̂", f"{look.eps_error:.4f}")


def reverse() -> None:
    """The reverse process as a film, a solver a row."""
    if not (chosen := model()):
        return
    folder, loaded = chosen
    with st.form("reverse"):
        settings, pressed, (left, right) = subject(loaded, folder, "Film", 2)
        number = left.slider("Steps", 4, 100, 20)
        options = Sampling(num_inference_steps=number, guidance_scale=_scale(loaded, right))
    if not (requested := asked("reverse", loaded, (folder,), replace(settings, options=options), pressed)):
        waits()
        return
    films = {}
    for solver, (name, _, _) in SOLVERS.items():
        one = replace(requested, options=replace(requested.options, solver=solver))
        with st.spinner(f"Filming {name} …"):
            films[solver] = remembered(("film", loaded.weights, one), partial(_film, loaded, one))
    _films(films)


def _film(loaded: Loaded, settings: Settings) -> Film:
    bar = st.progress(0.0)
    try:
        return film(loaded, settings, bar.progress)
    finally:
        bar.empty()


def _scale(loaded: Loaded, place: st.delta_generator.DeltaGenerator) -> float | None:
    """The guidance that the visitor chooses; None where the model has no condition to guide to."""
    if not (loaded.model.text or loaded.model.classes):
        return None
    return place.slider("Guidance", 1.0, 20.0, float(min(max(loaded.model.guidance, 1), 20)), 0.5, help="1 is none.")


@st.fragment
def _films(films: dict[str, Film]) -> None:
    steps = max(len(shown.x_t) for shown in films.values()) - 1
    left, right = st.columns([1, 2], vertical_alignment="bottom")
    kinds = {"x_t": "x_t, as it is", "x0": "x̂₀, predicted from it"}
    kind = left.segmented_control("Show", list(kinds), default="x_t", required=True, format_func=kinds.__getitem__)
    step = right.slider("Step", 0, steps, steps // 2)
    for i, (solver, shown) in enumerate(films.items()):
        name, text, source = SOLVERS[solver]
        frames = shown.x_t if kind == "x_t" else shown.x0
        label, strip = st.columns([3, 7], vertical_alignment="center")
        with label:
            st.markdown(f"**{name}**, {shown.seconds:.1f} s")
            formula(text, source)
        with strip:
            shares = [step / steps, *SHARES]
            labels = [f"step {step}", *(f"{share:.0%}" for share in SHARES)]
            row([frames[shown.frame(share)] for share in shares], [] if i else labels)
    st.caption("All from the same noise; the shares are of the steps. Latents, decoded: noisy ones look odd.")


def steps() -> None:
    """The same noise in few and many steps."""
    if not (chosen := model()):
        return
    folder, loaded = chosen
    with st.form("steps"):
        settings, pressed, (left, right) = subject(loaded, folder, "Compare", 2)
        solver = left.selectbox("Solver", list(SOLVERS), index=2, format_func=lambda name: SOLVERS[name][0])
        options = Sampling(solver=solver, guidance_scale=_scale(loaded, right))
    if not (requested := asked("steps", loaded, (folder,), replace(settings, options=options), pressed)):
        waits()
        return
    pictures, labels = [], []
    for number in STEPS:
        one = replace(requested, options=replace(requested.options, num_inference_steps=number))
        with st.spinner(f"{number} steps …"):
            picture, seconds = remembered(("steps", loaded.weights, one), partial(timed, loaded, one))
        pictures.append(picture)
        labels.append(f"{number} steps, {seconds:.2f} s")
    row(pictures, labels)
    st.markdown("Each step jumps from $t$ to an earlier $s$; fewer steps are longer jumps, with larger errors:")
    _, text, source = SOLVERS[str(requested.options.solver)]
    formula(text, source)
