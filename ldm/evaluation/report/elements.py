"""The pieces of a page: everything that comes from a run is escaped here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

SLIDER = """
for (const box of document.querySelectorAll(".frames")) {
  const frames = [...box.querySelectorAll("figure")], bar = box.querySelector(".slider");
  const range = bar.querySelector("input");
  bar.hidden = frames.length < 2;
  range.addEventListener("input", () => frames.forEach((frame, i) => { frame.hidden = i !== Number(range.value); }));
}
"""
# The page can load nothing, even where a run's text had found a way to ask for it.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


class Raw(str):
    """HTML that is written as it is; other text is escaped."""


class Section(NamedTuple):
    """A part of a page; without content it is left out."""

    id: str
    title: str
    content: str


def text(value: object) -> str:
    return value if isinstance(value, Raw) else escape(str(value))


def table(header: Sequence[object], rows: Iterable[Sequence[object]], wrap: bool = False) -> str:
    """Rows of cells below a header: names, then right-aligned values. Columns without a value are left out.

    With `wrap` values are aligned left, and long ones take several lines.
    """
    rows = list(rows)
    mark = f' class="{"w" if wrap else "n"}"'
    filled = [i for i in range(len(header)) if i == 0 or any(cells[i] != "" for cells in rows)]

    def row(cells: Sequence[object], tag: str) -> str:
        return "".join(f"<{tag}{mark if i else ''}>{text(cells[i])}</{tag}>" for i in filled)

    body = "".join(f"<tr>{row(cells, 'td')}</tr>" for cells in rows)
    return f'<div class="scroll"><table><thead><tr>{row(header, "th")}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(values: Mapping[str, object]) -> str:
    """Names and values; those that are empty are left out."""
    shown = {name: value for name, value in values.items() if value not in ("", None)}
    return "<dl>" + "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in shown.items()) + "</dl>"


def tiles(values: Mapping[str, object]) -> str:
    shown = "".join(
        f'<div class="tile"><b>{text(value)}</b><span>{text(name)}</span></div>' for name, value in values.items()
    )
    return f'<div class="tiles">{shown}</div>' if shown else ""


def code(source: str) -> Raw:
    return Raw(f"<code>{escape(source)}</code>")


def block(source: str) -> str:
    return f"<pre>{escape(source)}</pre>"


def image(uri: str, caption: str = "", hidden: bool = False) -> str:
    """An image in the page, from `image_data.data_uri`."""
    below = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure{" hidden" if hidden else ""}>{below}<img alt="{escape(caption)}" src="{uri}"></figure>'


def thumbnail(uri: str, caption: Raw, name: str) -> str:
    return f'<figure><img alt="{escape(name)}" src="{uri}"><figcaption>{caption}</figcaption></figure>'


def frames(images: Sequence[tuple[str, str]]) -> str:
    """Images with captions, of which a slider chooses one; without a script the last is seen."""
    last = len(images) - 1
    shown = "".join(image(uri, caption, i < last) for i, (uri, caption) in enumerate(images))
    bar = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="step of training">'
    return (
        f'<div class="frames"><div class="slider" hidden><span>earlier</span>{bar}<span>later</span></div>{shown}</div>'
    )


def document(title: str, lead: str, notes: Sequence[str], head: str, sections: Iterable[Section], foot: str) -> str:
    """A whole page, which needs no other file; `head` comes before the sections."""
    shown = [section for section in sections if section.content]
    links = "".join(f'<a href="#{section.id}">{escape(section.title)}</a>' for section in shown)
    body = "".join(f'<h2 id="{part.id}">{escape(part.title)}</h2>{part.content}' for part in shown)
    warnings = "".join(f'<p class="warn">{escape(note)}</p>' for note in notes)
    style = files("ldm.evaluation.report").joinpath("style.css").read_text("utf-8")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(title)}</title><style>{style}</style></head>\n<body>"
        f'<header><h1>{escape(title)}</h1><p class="lead">{escape(lead)}</p><nav>{links}</nav></header>'
        f"{warnings}{head}\n<main>{body}</main>\n<footer>{escape(foot)}</footer>"
        f"<script>{SLIDER}</script></body></html>\n"
    )
