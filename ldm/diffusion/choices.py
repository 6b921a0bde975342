"""One sentence for a name that is none of those known."""

from __future__ import annotations

from collections.abc import Sequence


def unknown_choice(key: str, value: object, choices: Sequence[str]) -> ValueError:
    """The error to raise where `value` is none of two or more `choices`."""
    return ValueError(f"{key}: {value!r} is not {', '.join(choices[:-1])} or {choices[-1]}")
