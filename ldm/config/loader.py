"""Loads a YAML file and dotted overrides (`stage2.lr=1e-4`) into a frozen, validated `Config`.

The keys are defined in `ldm.config.schema`. An unknown key, a wrong type or an impossible combination is a UserError of
one line.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from ldm.config import kohya
from ldm.config.old_names import current_key, print_notes, rename_keys
from ldm.config.presets import PRESETS
from ldm.config.schema import Config, Section, as_sources
from ldm.config.yaml_text import field_type, override_value, read_yaml
from ldm.utils.errors import UserError
from ldm.utils.paths import expand

Kind = TypeVar("Kind", bound=Section)


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration file, or a run's `config.yaml`, then applies overrides such as `stage2.lr=1e-4`.

    The values of overrides are YAML; those of strings and paths are text as it is typed, or YAML in quotes.
    """
    path = Path(path)
    try:
        tree = read_yaml(path.read_text("utf-8"), Config)
    except FileNotFoundError:
        raise UserError(
            f"--config: no file {path}; configurations that come with this project are in configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: can't read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'data:' and 'stage2:', found {type(tree).__name__}")
    if isinstance(tree.get("configuration"), dict):  # a run's, which says how it was made, too
        tree = tree["configuration"]
    tree, notes = rename_keys(Config, tree)
    overrides = [_renamed_override(override, notes) for override in overrides]
    for section, name, _, keys in PRESETS:
        if any(override.startswith(f"{section}.{name}=") for override in overrides):
            for key in keys if isinstance(tree.get(section), dict) else ():  # the file's values belong to its preset
                tree[section].pop(key, None)
    for override in overrides:
        _apply(tree, override, Config)
    tree, more = rename_keys(Config, tree)
    print_notes([*notes, *more])
    _add_kohya(tree)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    """A validated configuration from plain data; errors name its `origin`."""
    tree, _ = rename_keys(Config, tree)
    tree = _mark_regularization(tree)
    for key, name, presets, _ in PRESETS:
        values = tree.get(key)
        if isinstance(values, dict) and str(values.get(name)) in presets:
            tree = {**tree, key: {**presets[values[name]], **values}}
    try:
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def load_run(folder: Path) -> Config:
    """The configuration of a finished run, which may have been moved; UserError where the folder is none."""
    for name in ("pipeline", "config.yaml"):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no finished run (it has no {name}); run train_ldm.py first")
    tree = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    if not isinstance(tree, dict) or "configuration" not in tree:
        raise UserError(f"{folder}: not a run of train_ldm.py, but made from one; give the run itself")
    values = tree["configuration"]
    return parse({**values, "run": {**values.get("run", {}), "dir": str(folder)}}, str(folder / "config.yaml"))


def section(kind: type[Kind], overrides: Sequence[str], origin: str) -> Kind:
    """A single section from overrides such as `lr=1e-4`; errors name their `origin`."""
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(tree, override, kind)
    tree, notes = rename_keys(kind, tree)
    print_notes(notes)
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error, kind)}") from None


def key_of(section: str, name: str) -> str:
    """A key as its command takes it: `stage2.lr`, or `lr` of a section that has a command of its own."""
    return f"{section}.{name}" if section in Config.model_fields else name


def dump(config: Config) -> dict[str, Any]:
    """The configuration as plain data, with all defaults."""
    return config.model_dump(mode="json")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for each key that differs."""
    result: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            result += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            result.append(f"{prefix}{key}: {a} → {b}")
    return result


def _add_kohya(tree: dict[str, Any]) -> None:
    """Adds the sizes and buckets of a kohya file; UserError where the configuration sets other ones."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for source in as_sources(data.get("source")):
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str) and (path.endswith(".toml") or source.get("kind") == "kohya"):
            try:
                path = expand(path)
            except ValueError as error:
                raise UserError(f"data.source: {path!r}: {error}") from None
            for key, value in kohya.settings(Path(path)).items():
                if data.get(key) not in (None, value):
                    raise UserError(
                        f"data.{key}: {data[key]}, but {path} says {value}; data.{key}=null takes it from there"
                    )
                data[key] = value


def _mark_regularization(tree: dict[str, Any]) -> dict[str, Any]:
    """The tree with `prior` at kohya's files where prior preservation is on: `is_reg` images are then of the class."""
    data, finetune = tree.get("data"), tree.get("finetune")
    if not isinstance(data, dict) or not isinstance(finetune, dict) or finetune.get("prior_weight") is None:
        return tree
    sources = as_sources(data.get("source"))
    marked = [{"prior": True, **source} if _is_kohya(source) else source for source in sources]
    return tree if marked == sources else {**tree, "data": {**data, "source": marked}}


def _is_kohya(source: Any) -> bool:
    if not isinstance(source, dict):
        return False
    kind = source.get("kind", "auto")
    return kind == "kohya" or (kind == "auto" and str(source.get("path")).endswith(".toml"))


def _renamed_override(override: str, notes: list[str]) -> str:
    """An override such as `stage2.target=v` with the current name of its key; adds a note where that differs."""
    path, equals, value = override.partition("=")
    return current_key(path, notes) + equals + value


def _apply(tree: dict[str, Any], override: str, root: type[Section]) -> None:
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise UserError(f"override {override!r}: expected section.key=value, for example stage2.lr=1e-4")
    *sections, leaf = key.split(".")
    for name in sections:
        if name == "source" and isinstance(tree.get(name), str):
            tree[name] = {"path": tree[name]}
        tree = tree.setdefault(name, {})
        if not isinstance(tree, dict):
            raise UserError(f"override {override!r}: {name!r} is a value, not a section")
    try:
        new = override_value(value, field_type(root, key))
    except ValueError as error:
        raise UserError(f"override {override!r}: {error}") from None
    if leaf == "source" and isinstance(tree.get(leaf), dict) and isinstance(new, str):
        new = {**tree[leaf], "path": new}  # keeps options that were set before
    tree[leaf] = new


def _explain(error: ValidationError, root: type[Section] = Config) -> str:
    """The first error in one line: key, value and remedy."""
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        kind: Any = root
        for part in first["loc"][:-1]:
            kind = kind.model_fields[part].annotation if isinstance(part, str) else kind
            kind = next((arg for arg in (kind, *get_args(kind)) if isinstance(arg, type(Section))), kind)
        name = str(first["loc"][-1])
        close = difflib.get_close_matches(name, kind.model_fields, n=1, cutoff=0.5)
        hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(kind.model_fields)}"
        return f"unknown key {key!r}; {hint}"
    if first["type"] == "missing":
        return f"{key} is missing; set it in the file or give {key}=… on the command line"
    message = re.sub(r"^Value error, ", "", first["msg"])
    if not key:
        return message
    if isinstance(first["input"], dict) and first["type"] == "value_error":  # concerns several keys of the section
        return f"{key}.{message}"
    message = re.sub(r"^Input s", "s", message)
    close = difflib.get_close_matches(
        str(first["input"]), first.get("ctx", {}).get("expected", "").replace("'", "").split(" "), n=1
    )
    return f"{key}: {first['input']!r}: {message}" + (f"; did you mean {close[0].strip(',')!r}?" if close else "")
