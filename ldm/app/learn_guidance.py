"""The view *Guidance* of *Learn*: a grid of scales by prompts, classes or seeds."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import streamlit as st

from ldm.app.drawing import Loaded, Settings
from ldm.app.learn_parts import asked, formula, model, remembered, row, waits
from ldm.app.reverse import guidance_row
from ldm.app.roots import allowed, classifiers, short
from ldm.models.classifier import NoisyClassifier
from ldm.utils.errors import UserError

FREE, CLASSIFIER = "Classifier-free", "By a classifier"
SCALES = {FREE: [0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 7.5, 10.0, 15.0], CLASSIFIER: [0.0, 1.0, 2.0, 4.0, 8.0, 16.0]}
SHOWN = {FREE: [1.0, 2.0, 5.0, 10.0], CLASSIFIER: [0.0, 1.0, 4.0, 16.0]}  # before the visitor chooses
FORMULAS = {
    FREE: (
        r"\tilde\varepsilon = \varepsilon_\varnothing + s\,(\varepsilon_c - \varepsilon_\varnothing)",
        "arXiv 2207.12598, eq. 6, with s = w + 1: 0 ignores the prompt, 1 is no guidance",
    ),
    CLASSIFIER: (
        r"\tilde\varepsilon = \varepsilon - \sigma_t\,s\,\nabla_{x_t} \log p(y \mid x_t)",
        "arXiv 2105.05233, algorithm 2, with a scale s: 0 is no guidance",
    ),
}
MAX_ROWS, MAX_SCALES = 4, 6


def guidance() -> None:
    """Draws the view."""
    if not (chosen := model()):
        return
    folder, loaded = chosen
    guides = [] if loaded.model.classes else [str(path) for path in classifiers()]
    kinds = [FREE] if loaded.model.text or loaded.model.classes else []
    kinds += [CLASSIFIER] if guides else []
    if not kinds:
        raise UserError("model: it reads no prompts and no classes, and there is no classifier for it; choose another")
    kind = st.segmented_control("Guidance", kinds, default=kinds[0], required=True) if guides else FREE
    guide, classifier = _chosen_classifier(guides, loaded) if kind == CLASSIFIER else ("", None)
    with st.form("guidance"):
        rows = _rows(loaded, folder, classifier)
        scales = tuple(sorted(st.multiselect("Scales", SCALES[kind], SHOWN[kind], max_selections=MAX_SCALES)))
        pressed = st.form_submit_button("Draw", type="primary")
    if not (rows and scales):
        raise UserError("grid: it is empty; choose a scale, and a prompt or class")
    if not (requested := asked(f"guidance {kind}", loaded, (folder, guide), (rows, scales), pressed)):
        waits()
        return
    formula(*FORMULAS[kind])
    rows, scales = requested
    for i, settings in enumerate(rows):
        label, strip = st.columns([1, 2], vertical_alignment="center")
        label.text(" · ".join(filter(None, (settings.prompt, settings.label))) or "no prompt")
        label.caption(f"seed {settings.seed}")
        with strip, st.spinner("Drawing …"):
            key = ("guidance", loaded.weights, settings, scales, guide)
            pictures = remembered(key, partial(guidance_row, loaded, settings, scales, classifier))
            row(pictures, [] if i else [f"s = {scale:g}" for scale in scales])


@st.cache_resource(max_entries=2, show_spinner="Loading the classifier …")
def _classifier(folder: str, device: str, changed: float) -> NoisyClassifier:
    """A classifier in memory, loaded anew where it has `changed`."""
    return NoisyClassifier.load(folder, device)


def _chosen_classifier(guides: list[str], loaded: Loaded) -> tuple[str, NoisyClassifier]:
    """The folder and the classifier that the visitor chooses; UserError where it does not fit the model."""
    folder = st.selectbox("Classifier", guides, format_func=lambda name: short(Path(name)))
    changed = allowed(f"{folder}/model/config.json").stat().st_mtime
    classifier = _classifier(folder, str(loaded.model.device), changed)
    classifier.check(loaded.model.scheduler, loaded.model.autoencoder)
    return folder, classifier


def _rows(loaded: Loaded, folder: str, classifier: NoisyClassifier | None) -> tuple[Settings, ...]:
    """What the grid's rows draw: prompts or classes, at most `MAX_ROWS`; of one alone, three seeds."""
    left, right = st.columns([3, 1])
    seed = int(right.number_input("Seed", 0, 2**32 - 3, 0))
    prompts: list[str | None] = [None]
    if loaded.model.text:
        lines = left.text_area("Prompts, one a line; one alone is drawn from three seeds", "red heart", height=80)
        prompts = [line.strip() for line in lines.splitlines() if line.strip()]
    classes = classifier.classes if classifier else loaded.model.classes
    labels: list[str | None] = [None]
    if classes:
        labels = list(left.multiselect("Classes", classes, classes[:2], max_selections=MAX_ROWS))
    pairs = [(prompt, label) for prompt in prompts for label in labels][:MAX_ROWS]
    seeds = range(seed, seed + 3) if len(pairs) == 1 else [seed]
    return tuple(Settings(folder, prompt, label, number) for prompt, label in pairs for number in seeds)
