"""The form of the page *Train*: few settings first, all others of the schema on demand, with the rules' messages."""

from __future__ import annotations

import shlex
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from ldm.app import processes
from ldm.app.inputs import plain
from ldm.app.roots import roots
from ldm.app.train_settings import (
    FULL,
    KINDS,
    LORA,
    SCRATCH,
    Base,
    Setting,
    bases,
    fitting_images,
    free_name,
    image_sources,
    resolve,
    settings,
    tidy,
)
from ldm.config import loader
from ldm.config.schema import Config
from ldm.utils.errors import UserError

FIRST = {
    "data.source": "Images",
    "data.size": "Side of the images, in pixels",
    "stage1.steps": "Steps of the autoencoder",
    "stage2.steps": "Steps of the U-Net",
    "stage2.batch": "Images in a step",
    "stage2.lr": "Learning rate",
    "finetune.rank": "Rank",
    "sample.prompts": "Prompts to draw while it trains, one a line",
}
"""The settings that are shown first, with their labels."""
NOT_OF_KIND = {
    SCRATCH: {"stage2.lr", "finetune.rank"},
    FULL: {"data.size", "stage1.steps", "finetune.rank"},
    LORA: {"data.size", "stage1.steps"},
}
SOURCE = "train-source"  # in the session: images that the page Data hands over
WIDE = ("data.source", "sample.prompts")
OF_THE_MODEL = ("stage1.", "stage2.", "text.", "finetune.")
"""Sections whose changes were made for one base."""
SMALL_SIDE = 64  # pixels; models of smaller images show how training goes
KIND = "train-kind"


@dataclass
class Form:
    """What a visitor chose; kept for as long as the base stays the same."""

    base: Base
    name: str
    changed: dict[str, Any] = field(default_factory=dict)
    """What the widgets of changed settings have, by key."""
    fitting: dict[str, Any] = field(default_factory=dict)
    """The same for what follows from the images that were chosen; what was changed goes first."""
    typed: str = ""
    """Further overrides, one a line."""

    @property
    def values(self) -> dict[str, Any]:
        """Of all settings that differ from the base's, by key, as their widgets have them."""
        return self.fitting | self.changed

    @property
    def overrides(self) -> list[str]:
        """As on the command line, without those of the base."""
        known = {key: setting for keys in settings().values() for key, setting in keys.items()}
        chosen = [known[key].override(value) for key, value in self.values.items()]
        return [*chosen, *filter(None, map(str.strip, self.typed.splitlines())), f"run.dir={self.folder}"]

    @property
    def folder(self) -> Path:
        return tidy(roots()[0] / self.name.strip())

    def on(self, base: Base, kind: str) -> Form:
        """The form of another base: images, name and typed text stay, and those changes that are not of the model."""
        name = self.name if self.name != free_name(self.base.run_name) else free_name(base.run_name)
        hidden = (*OF_THE_MODEL, *NOT_OF_KIND[kind])
        kept = {key: value for key, value in self.changed.items() if not key.startswith(hidden)}
        form = Form(base, name, kept, typed=self.typed)
        if "data.source" in kept:
            form.choose_images(kept["data.source"])
        return form

    def choose_images(self, source: str) -> None:
        """Takes a source of images, and what fits it."""
        self.changed["data.source"], self.fitting = source, {}
        with suppress(UserError):  # which the form shows
            self.fitting = fitting_images(resolve(self.base, self.overrides))

    def command(self, *flags: str) -> list[str]:
        """What trains with these settings."""
        overrides = [*self.base.overrides, *self.overrides]
        last = {override.partition("=")[0]: i for i, override in enumerate(overrides)}
        merged = "data.source="  # a path keeps the options that were set before
        kept = [text for i, text in enumerate(overrides) if i in last.values() or text.startswith(merged)]
        return processes.command(self.base.path, kept, *flags)


def has_own_images() -> bool:
    """Whether the visitor chose images, here or on the page Data."""
    form = st.session_state.get("train-form")
    return SOURCE in st.session_state or (isinstance(form, Form) and "data.source" in form.changed)


def choose() -> tuple[Form, Config | None] | None:
    """Draws the form: what was chosen, and its configuration unless it breaks a rule; None without a base."""
    source = st.session_state.pop(SOURCE, None)
    if source and st.session_state.get(KIND, SCRATCH) == SCRATCH and any(base.overrides for base in bases(LORA)):
        st.session_state[KIND] = LORA  # few images suffice for it
    st.session_state.setdefault(KIND, SCRATCH)
    left, right = st.columns(2)
    kind = left.segmented_control("What to train", KINDS, key=KIND, required=True, width="stretch")
    assert kind, "a kind is required"
    found = bases(kind)
    if not found:
        missing = "a finished model" if kind != SCRATCH else "the folder configs/"
        st.info(f"There is nothing to start from: this needs {missing} in {', '.join(f'`{r}`' for r in roots())}.")
        return None
    base = right.selectbox("Start from", found, format_func=lambda base: base.name, key=f"train-base-{kind}")
    form = st.session_state.get("train-form")
    if not isinstance(form, Form):
        form = Form(base, free_name(base.run_name))
    elif form.base != base:
        form = form.on(base, kind)
    st.session_state["train-form"] = form
    if source:
        form.choose_images(source)
    if base.description:
        st.caption(plain(base.description))
    try:
        config, mistake = resolve(base, form.overrides), ""
    except UserError as error:
        mistake = str(error)
        try:
            config = loader.load(base.path, base.overrides)
        except UserError as error:
            st.error(plain(str(error)))
            return None
    if kind != SCRATCH and config.data.size < SMALL_SIDE:
        side = config.data.size
        st.caption(f"This small model draws {side} × {side} pixels and can't draw photographs: expect no good images.")
    _first(form, config, kind)
    _all(form, config, kind)
    if mistake:
        st.error(plain(mistake))
    return form, None if mistake else config


def _first(form: Form, config: Config, kind: str) -> None:
    """The settings that everyone looks at."""
    known = {key: setting for keys in settings().values() for key, setting in keys.items()}
    with st.container(border=True):
        left, right = st.columns([2, 1])
        _images(left, known["data.source"], form, config)
        st.session_state["train-name"] = form.name
        right.text_input(
            "Name of the run",
            key="train-name",
            on_change=_rename,
            args=(form,),
            help=f"Its folder in {roots()[0]}, where everything is written.",
        )
        keys = [key for key in FIRST if key not in (*NOT_OF_KIND[kind], *WIDE)]
        for place, key in zip(st.columns(len(keys)), keys, strict=True):
            _widget(place, known[key], form, config, FIRST[key])
        _widget(st, known["sample.prompts"], form, config, FIRST["sample.prompts"])


def _images(place: DeltaGenerator, setting: Setting, form: Form, config: Config) -> None:
    """The source of images: one of the folders in the roots, or what is typed."""
    shown = form.values.get(setting.key, setting.shown(config))
    options = list(dict.fromkeys([shown, setting.shown(loader.load(form.base.path)), *image_sources()]))
    st.session_state[setting.key] = shown
    place.selectbox(
        FIRST[setting.key],
        options,
        key=setting.key,
        accept_new_options=True,
        help=f"{setting.help}\n\nThe list has the folders with images in the roots; any other source can be typed.",
        on_change=lambda: form.choose_images(st.session_state[setting.key]),
    )
    if form.fitting:
        place.caption("The prompts and the images in a step follow from these images, until you change them.")


def _all(form: Form, config: Config, kind: str) -> None:
    """Every other setting of the schema, a section at a time, and overrides as text."""
    with st.expander("All settings"):
        sections = settings()
        section = st.segmented_control("Section", list(sections), default="stage2", required=True)
        shown = [s for s in sections[section].values() if s.key not in FIRST or s.key in NOT_OF_KIND[kind]]
        rows = [shown[i : i + 3] for i in range(0, len(shown), 3)]
        for row in rows:  # not three columns: on a narrow screen they would lose the order
            for place, setting in zip(st.columns(3, vertical_alignment="bottom"), row, strict=False):
                _widget(place, setting, form, config, setting.name)
        st.session_state["train-typed"] = form.typed
        st.text_area(
            "Or as on the command line, one a line",
            key="train-typed",
            placeholder="stage1.gan={start: 0.5}",
            on_change=_type,
            args=(form,),
        )
        if form.changed and st.button("Undo all changes"):
            form.changed.clear()
            form.fitting.clear()
            st.rerun()


def _widget(place: DeltaGenerator | Any, setting: Setting, form: Form, config: Config, label: str) -> None:
    """The widget of a setting, which says what is in the form whatever it showed before."""
    st.session_state[setting.key] = form.values.get(setting.key, setting.shown(config))
    options: dict[str, Any] = {
        "key": setting.key,
        "help": setting.help,
        "on_change": _change,
        "args": (form, setting),
    }
    if setting.widget == "switch":
        place.toggle(label, **options)
    elif setting.widget == "choice":
        place.selectbox(label, setting.choices, **options)
    elif setting.widget == "number":
        place.number_input(label, step=1, **options)
    elif setting.widget == "lines":
        place.text_area(label, height=110, **options)
    else:
        place.text_input(label, placeholder="none", **options)


def _change(form: Form, setting: Setting) -> None:
    form.changed[setting.key] = st.session_state[setting.key]


def _rename(form: Form) -> None:
    form.name = st.session_state["train-name"]


def _type(form: Form) -> None:
    form.typed = st.session_state["train-typed"]


def show_command(form: Form) -> None:
    """The same for a terminal."""
    arguments = form.command()
    with st.expander("The same in a terminal"):
        st.code(shlex.join(["ldm-train", *arguments[arguments.index("--config") :]]), "bash", wrap_lines=True)
