"""What sources yield: records of images with captions, and bad samples with the reason."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple


class ImageLocation(NamedTuple):
    """Where an image's bytes are: a whole file or URL, `size` bytes of it from `start`, or row `start` of a table."""

    file: str
    start: int = 0
    size: int = -1  # -1: the whole file; TABLE_ROW, MASK_ROW: a row of the table that source number `file` opens


HELD_OUT = ("reconstruction", "combination")  # the splits that stage one never sees
PRIOR = "prior"  # the split of images of the class, which stage two trains on for prior preservation
TRAINED = ("train", PRIOR)  # the splits that stage two trains on
TABLE_ROW = -2
MASK_ROW = -3  # the mask in a row
NO_MASK = ImageLocation("")  # of an image that should have a mask
MAX_EXAMPLES = 3  # names listed for each reason why files are left out


@dataclass(frozen=True)
class Record:
    """One image with its captions; a single empty one where it has none and needs none.

    `split` is `train`, `reconstruction` (stage one never sees it), `combination` (neither stage sees it: its caption
    combines parts that training only shows separately) or `prior` (only stage two sees it: an image of the class that
    is not to be forgotten, not of the subject that is learned). An epoch has it `repeats` times; `weight` is how often
    it is drawn relative to one of weight 1. `flip` and `dropout` override the configuration's, where a source sets
    them. `attributes` is what a source knows of an image besides its caption: OpenMoji's people have `role` and `tone`.
    `mask` says where the mask of its loss is: at the image's own location, its alpha channel is the mask; None where
    the source has no masks, NO_MASK where it has none for this image.
    """

    key: str
    location: ImageLocation
    captions: tuple[str, ...]
    label: str = ""  # its class
    split: str = "train"
    weight: float = 1.0
    repeats: int = 1
    flip: bool | None = None
    dropout: float | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    mask: ImageLocation | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", one_line(self.key))


@dataclass(frozen=True)
class Entry(Record):
    """A record whose image has been opened: SHA-256 of its bytes, width and height after rotation by its EXIF.

    `mask_sha256` is None where the image has no mask.
    """

    sha256: bytes = b""
    width: int = 0
    height: int = 0
    mask_sha256: bytes | None = None


class SampleFields(NamedTuple):
    """What a training sample needs of its entry: fewer columns, each of which may be an access to a disk."""

    sha256: bytes
    width: int
    height: int
    captions: tuple[str, ...]
    label: str
    split: str
    flip: bool | None
    dropout: float | None
    mask_sha256: bytes | None


@dataclass(frozen=True)
class BadSample:
    """An image or a line that can't be used: its name, the reason, and how to mend it."""

    key: str
    reason: str
    fix: str

    def __post_init__(self) -> None:
        for name in ("key", "reason", "fix"):
            object.__setattr__(self, name, one_line(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.key}: {self.reason}; {self.fix}"


@dataclass(frozen=True)
class LeftOut:
    """What is left out on purpose, a file, column, split or key: its name, and what it is, in the plural."""

    key: str
    reason: str

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", one_line(self.key))


class LeftOutCounts:
    """How much was left out for each reason, with the names of the first ones."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}

    def add(self, file: LeftOut) -> None:
        self.counts[file.reason] += 1
        if len(examples := self.examples.setdefault(file.reason, [])) < MAX_EXAMPLES:
            examples.append(file.key)

    def update(self, other: LeftOutCounts) -> None:
        self.counts.update(other.counts)
        for reason, names in other.examples.items():
            self.examples[reason] = (self.examples.get(reason, []) + names)[:MAX_EXAMPLES]

    def lines(self) -> list[str]:
        """A line for each reason: how many, what they are, the first names."""
        return [
            f"left out   {count:,} {reason}: {', '.join(self.examples[reason])}"
            + (", …" if count > len(self.examples[reason]) else "")
            for reason, count in self.counts.items()
        ]


Records = Iterator[Record | BadSample | LeftOut]
Sample = tuple[Record, bytes] | BadSample  # the bytes are the encoded image


class BadSampleError(ValueError):
    """An image or caption that can't be used; the arguments are the reason and how to mend it."""


class ReadOptions(NamedTuple):
    """Which captions and classes are read, and from where."""

    column: str = "text"
    """Column, or key of a JSON, with captions."""
    lines: bool = False
    """Each line of a string is a caption."""
    captions: bool = True
    """An image without a caption is bad; otherwise it has an empty one."""
    label: str | None = None
    """Column, or key of a JSON, with the class; None: classes are not read."""
    mask: str | None = None
    """Column with the mask, in tars the name of its member before the suffix; None: no column has masks."""


def captions_of(value: Any, options: ReadOptions) -> tuple[str, ...]:
    """Captions from a string or a list of strings, white space normalised; BadSampleError for a missing or bad one.

    Where captions are optional, empty ones are left out; without any, the result is `("",)`.
    """
    lines = options.lines
    value = [_decoded(text) for text in value] if isinstance(value, list) else _decoded(value)
    if isinstance(value, str):
        value = value.splitlines() if lines else [value]
        if lines:
            value = [line for line in value if line.strip()] or [""]
    if value is None or value == []:
        if not options.captions:
            return ("",)
        raise BadSampleError("it has no caption", "give it one")
    if not isinstance(value, list) or not all(isinstance(caption, str) for caption in value):
        raise BadSampleError(f"its caption is {_short(value)}", "give a string or a list of strings")
    captions = tuple(" ".join(caption.split()) for caption in value)
    if not options.captions:
        captions = tuple(filter(None, captions)) or ("",)
    elif not all(captions):
        raise BadSampleError("its caption is empty", "write what the image shows")
    for caption in captions:
        _check_text(caption, "caption")
    return captions


def label_of(value: Any, names: Sequence[str] = ()) -> str:
    """A class from a string or an integer, white space normalised; "" for none; BadSampleError for anything else.

    `names` are the names of integer classes, where they have some; -1 then means no class, as in `datasets`.
    """
    value = _decoded(value, "class")
    if value is None or (value == -1 and names):
        return ""
    if isinstance(value, int) and not isinstance(value, bool):
        if names and not 0 <= value < len(names):
            raise BadSampleError(f"its class is {value}, and only {len(names)} have names", "give one that has")
        value = names[value] if names else str(value)
    if not isinstance(value, str):
        raise BadSampleError(f"its class is {_short(value)}", "give a string or an integer")
    _check_text(value, "class")
    return " ".join(value.split())


def _check_text(text: str, what: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):  # Python's stand-ins for bytes that are not UTF-8
        raise BadSampleError(f"the {what} is not UTF-8", "save the file as UTF-8")
    if "\0" in text:  # UTF-16 without a byte order mark decodes as UTF-8
        raise BadSampleError(f"the {what} has NULs in it", "save the file as UTF-8")


def _decoded(value: Any, what: str = "caption") -> Any:
    if not isinstance(value, bytes):
        return value
    try:
        return value.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        reason = f"the {what} is not UTF-8 ({error.reason} at byte {error.start})"
        raise BadSampleError(reason, "save it as UTF-8") from None


def unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object from its pairs; ValueError where a key comes twice, of which `json` alone would keep the last."""
    content = dict(pairs)
    if len(content) < len(pairs):
        raise ValueError("a key comes twice")
    return content


def one_line(text: str) -> str:
    """The text with every unprintable character escaped."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _short(value: object) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 40 else text[:37] + "…"
