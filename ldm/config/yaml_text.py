"""YAML, read with the schema in hand: what a key needs as text stays text, and no key is there twice."""

from __future__ import annotations

import re
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml

from ldm.config.old_names import section_in
from ldm.config.schema import Section, SourceConfig

PREFIX = "tag:yaml.org,2002:"
TEXT, NULL, MERGE = f"{PREFIX}str", f"{PREFIX}null", f"{PREFIX}merge"


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, except that `1e-4` is a number, and `no` and `on` are words, as YAML 1.2 has it."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's way)
        first: [(tag, pattern) for tag, pattern in known if tag != f"{PREFIX}bool"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver(f"{PREFIX}bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    f"{PREFIX}float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def read_yaml(text: str, expected: Any) -> Any:
    """The plain data of a YAML text for a type of the schema; ValueError with its line where a key is there twice.

    YAMLError where the text is none.
    """
    try:
        return _read(text, expected)[0]
    except RecursionError:
        raise ValueError("an alias (*name) stands inside what it names; write it out") from None


def override_value(text: str, expected: Any) -> Any:
    """The value of an override for a type of the schema, a comment included: ` #1` is part of a folder's name.

    ValueError where it must be YAML, and is not.
    """
    text = text.strip()
    is_source = section_in(expected) is SourceConfig  # a path, or a section or list of these
    is_text = is_source or _is_text(expected)
    if is_text and text and text[0] not in ("'\"[{" if is_source else "'\""):
        is_null = text in ("~", "null") and NoneType in get_args(expected)
        return None if is_null else text
    try:
        data, rest = _read(text, expected)
    except yaml.YAMLError:
        if is_text:
            return text
        raise ValueError(f"{text!r} is not valid YAML; quote it") from None
    return text if rest.strip() else data


def field_type(root: type[Section], key: str) -> Any:
    """The type of a key such as `stage2.lr`; None where it is unknown."""
    kind: Any = root
    for name in key.split("."):
        section = section_in(kind)
        if section is None or name not in section.model_fields:
            return None
        kind = section.model_fields[name].annotation
    return kind


def _read(text: str, expected: Any) -> tuple[Any, str]:
    """The data of a YAML text, and what follows it: a comment, or more text."""
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, ""
        _check_keys(node)
        _keep_text(node, expected)
        return loader.construct_document(node), text[node.end_mark.index :]
    finally:
        loader.dispose()


def _check_keys(node: yaml.Node) -> None:
    """ValueError where a section has a key twice: YAML would drop the first one."""
    if isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item)
    if not isinstance(node, yaml.MappingNode):
        return
    lines: dict[str, int] = {}
    for key, value in node.value:
        line = key.start_mark.line + 1
        if isinstance(key, yaml.ScalarNode) and key.tag != MERGE:
            if key.value in lines:
                raise ValueError(
                    f"line {line}: {key.value!r} is there already, in line {lines[key.value]}; put both together"
                )
            lines[key.value] = line
        _check_keys(value)


def _keep_text(node: yaml.Node, expected: Any) -> None:
    """Marks the numbers, dates and booleans that are values of a text's key as text: `dir: 2024` is a folder."""
    section = section_in(expected)
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if section and key.value in section.model_fields:
                _keep_text(value, section.model_fields[key.value].annotation)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _keep_text(item, next((kind for kind in get_args(expected) if kind not in (NoneType, Ellipsis)), None))
    elif node.tag not in (TEXT, NULL) and (_is_text(expected) or section is SourceConfig):
        node.tag = TEXT


def _is_text(expected: Any) -> bool:
    """Whether a type is a string or a path, or null too."""
    kinds = [kind for kind in (get_args(expected) or (expected,)) if kind is not NoneType]
    kinds = [get_args(kind)[0] if hasattr(kind, "__metadata__") else kind for kind in kinds]
    return bool(kinds) and all(kind in (str, Path) for kind in kinds)
