"""One YAML and dotted overrides (`stage2.lr=1e-4`) → one frozen, validated `Config`.

The keys stand in `ldm.config.schema`. An unknown key, a wrong type or an impossible combination is a UserError of
one line.
"""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import ValidationError

from ldm.config import kohya
from ldm.config.presets import PRESETS
from ldm.config.schema import Config, Section, Stage2Config, Training, as_sources
from ldm.utils.errors import UserError

Kind = TypeVar("Kind", bound=Section)

# Names that keys had before version 0.2, by section: they still load, with a line that names the new one.
OLD_NAMES: dict[str, dict[str, str]] = {
    "RunConfig": {"keep": "checkpoints_total_limit"},
    "SourceConfig": {"column": "caption_column"},
    "DataConfig": {"held_out": "val_fraction"},
    "Training": {
        "clip": "max_grad_norm", "decay": "lr_scheduler", "warmup": "lr_warmup_steps", "ema": "ema_decay",
    },
    "Stage1Config": {"groups": "norm_num_groups"},
    "ClassifierConfig": {"head_size": "attention_head_dim", "groups": "norm_num_groups"},
    "Stage2Config": {
        "target": "prediction_type", "schedule": "beta_schedule", "times": "timestep_sampling",
        "time_mean": "logit_mean", "time_std": "logit_std", "weight": "loss_weighting", "dropout": "cond_dropout",
        "null": "uncond_embedding", "head_size": "attention_head_dim", "groups": "norm_num_groups",
    },
}  # fmt: skip
OLD_PRESETS = ("free", "unet")  # now "custom"


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads a configuration file, then applies overrides such as `stage2.lr=1e-4` (values are YAML)."""
    path = Path(path)
    try:
        tree = yaml.load(path.read_text("utf-8"), _Loader)
    except FileNotFoundError:
        raise UserError(
            f"--config: no file {path}; configurations that come with this project are in configs/"
        ) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--config: can't read {path}: {error}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected sections such as 'data:' and 'stage2:', found {type(tree).__name__}")
    tree, notes = renamed(Config, tree)
    overrides = [_renamed_override(override, notes) for override in overrides]
    for section, name, _, decided in PRESETS:
        if any(override.startswith(f"{section}.{name}=") for override in overrides):
            for key in decided if isinstance(tree.get(section), dict) else ():  # those in the file are of its own set
                tree[section].pop(key, None)
    for override in overrides:
        _apply(tree, override)
    tree, more = renamed(Config, tree)
    print_once([*notes, *more])
    _add_kohya(tree)
    return parse(tree, str(path))


def parse(tree: dict[str, Any], origin: str) -> Config:
    """A validated configuration from plain data; `origin` is named in errors."""
    tree, _ = renamed(Config, tree)
    for key, name, presets, _ in PRESETS:
        values = tree.get(key)
        if isinstance(values, dict) and str(values.get(name)) in presets:
            tree = {**tree, key: {**presets[values[name]], **values}}
    try:
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error)}") from None


def of_run(folder: Path) -> Config:
    """The configuration of a finished run, in whatever folder it lies now; UserError where it is none."""
    for name in ("pipeline", "config.yaml"):
        if not (folder / name).exists():
            raise UserError(f"{folder}: no finished run (it has no {name}); run train_ldm.py first")
    tree = yaml.safe_load((folder / "config.yaml").read_text("utf-8"))
    if not isinstance(tree, dict) or "configuration" not in tree:
        raise UserError(f"{folder}: not a run of train_ldm.py, but made from one; give the run itself")
    found = parse(tree["configuration"], str(folder / "config.yaml"))
    return found.model_copy(update={"run": found.run.model_copy(update={"dir": folder})})


def section(kind: type[Kind], overrides: Sequence[str], origin: str) -> Kind:
    """A section by itself from overrides such as `lr=1e-4`; `origin` is named in errors."""
    tree: dict[str, Any] = {}
    for override in overrides:
        _apply(tree, override)
    tree, notes = renamed(kind, tree)
    print_once(notes)
    try:
        return kind.model_validate_json(json.dumps(tree))
    except ValidationError as error:
        raise UserError(f"{origin}: {_explain(error, kind)}") from None


def dump(config: Config) -> dict[str, Any]:
    """The resolved configuration as plain data, every default written out."""
    return config.model_dump(mode="json")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """`key: old → new` for each differing leaf."""
    found: list[str] = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} → {b}")
    return found


def _add_kohya(tree: dict[str, Any]) -> None:
    """Sizes and buckets that a kohya file sets, where the configuration does not say otherwise."""
    data = tree.get("data")
    if not isinstance(data, dict):
        return
    for source in as_sources(data.get("source")):
        path = source.get("path") if isinstance(source, dict) else None
        if isinstance(path, str) and (path.endswith(".toml") or source.get("kind") == "kohya"):
            for key, value in kohya.settings(Path(path)).items():
                if data.get(key) not in (None, value):
                    raise UserError(
                        f"data.{key}: {data[key]}, but {path} says {value}; data.{key}=null takes it from there"
                    )
                data[key] = value


def renamed(kind: type[Section], values: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """A section's values under today's names of keys, and a note for each key that had an old one.

    UserError where a key stands under both names.
    """
    result, notes = dict(values), []
    for old, new in _old_names(kind).items():
        if old in result:
            if result.get(new) is not None:
                raise UserError(f"{prefix}{old} is now {prefix}{new}; leave the first out")
            result[new] = result.pop(old)
            notes.append(f"{prefix}{old} is now {prefix}{new}")
    for key in ("model", "process"):
        if kind is Stage2Config and result.get(key) in OLD_PRESETS:
            notes.append(f"{prefix}{key}: {result[key]} is now custom")
            result[key] = "custom"
    if issubclass(kind, Training) and "micro_batches" in result:
        result, note = _device_batch(kind, result, prefix)
        notes += note
    for key, value in result.items():
        if key in kind.model_fields and (inner := _section_in(kind.model_fields[key].annotation)):
            if isinstance(value, dict):
                result[key], more = renamed(inner, value, f"{prefix}{key}.")
                notes += more
            elif isinstance(value, list) and all(isinstance(item, dict) for item in value):
                pairs = [renamed(inner, item, f"{prefix}{key}.") for item in value]
                result[key] = [item for item, _ in pairs]
                notes += [note for _, more in pairs for note in more]
    return result, list(dict.fromkeys(notes))


def _renamed_override(override: str, notes: list[str]) -> str:
    """An override such as `stage2.target=v` under today's name of its key; adds a note where that is another."""
    path, equals, value = override.partition("=")
    return current_key(path, notes) + equals + value


def current_key(path: str, notes: list[str]) -> str:
    """Today's name of a key such as `stage2.target`; adds a note where that is another."""
    *sections, leaf = path.split(".")
    kind: type[Section] | None = Config
    for name in sections:
        kind = _section_in(kind.model_fields[name].annotation) if kind and name in kind.model_fields else None
    new = _old_names(kind).get(leaf, leaf) if kind else leaf
    current = ".".join([*sections, new])
    if new != leaf:
        notes.append(f"{path} is now {current}")
    return current


def _old_names(kind: type[Section]) -> dict[str, str]:
    """Old name → name, of the keys that a section has; a class's own names stand before its parents'."""
    merged: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        merged |= OLD_NAMES.get(parent.__name__, {})
    return merged


def _section_in(annotation: Any) -> type[Section] | None:
    """The section within a field's type such as `GanConfig | None` or `tuple[SourceConfig, ...]`."""
    if isinstance(annotation, type(Section)) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section_in, get_args(annotation))), None)


def _device_batch(kind: type[Section], values: dict[str, Any], prefix: str) -> tuple[dict[str, Any], list[str]]:
    """`micro_batches`, the equal parts of each process's share of the batch, written as today's `device_batch`."""
    values = dict(values)
    old, new, parts = f"{prefix}micro_batches", f"{prefix}device_batch", values.pop("micro_batches")
    if parts == 1:  # the whole share at once, as by default
        return values, []
    batch, processes = values.get("batch", kind.model_fields["batch"].default), int(os.environ.get("WORLD_SIZE", "1"))
    if values.get("device_batch") is not None:
        raise UserError(
            f"{old}: {parts} beside {new}: {values['device_batch']}, which replaces it; leave the first out"
        )
    if not (isinstance(parts, int) and isinstance(batch, int) and parts > 0) or batch % (parts * processes):
        share = f", {batch}," if processes == 1 else f", {batch}, over {processes} processes"
        raise UserError(f"{old}: {parts} equal parts of {prefix}batch{share} can't be; set {new} instead")
    images = batch // (parts * processes)
    note = f"{old} is now {new}, the images that a device computes at once: {images} here"
    return {**values, "device_batch": images}, [note]


def print_once(notes: Sequence[str]) -> None:
    """On the first process of a run."""
    for note in notes if os.environ.get("RANK", "0") == "0" else ():
        print(note, file=sys.stderr)


class _Loader(yaml.SafeLoader):
    """YAML as PyYAML reads it, except that `1e-4` is a number, and `no` and `on` are words, as YAML 1.2 has it."""

    yaml_implicit_resolvers = {  # noqa: RUF012  (PyYAML's way)
        first: [(tag, pattern) for tag, pattern in known if tag != "tag:yaml.org,2002:bool"]
        for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false|True|False)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+0123456789.")
)


def _apply(tree: dict[str, Any], override: str) -> None:
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
        new = yaml.load(value, _Loader)
    except yaml.YAMLError:
        raise UserError(f"override {override!r}: {value!r} is not valid YAML; quote it") from None
    if leaf == "source" and isinstance(tree.get(leaf), dict) and isinstance(new, str):
        new = {**tree[leaf], "path": new}  # how it is read may have been said before
    tree[leaf] = new


def _explain(error: ValidationError, root: type[Section] = Config) -> str:
    """The first problem, in one line: key, value and remedy."""
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
    if isinstance(first["input"], dict) and first["type"] == "value_error":  # of several keys of the section
        return f"{key}.{message}"
    message = re.sub(r"^Input s", "s", message)
    close = difflib.get_close_matches(
        str(first["input"]), first.get("ctx", {}).get("expected", "").replace("'", "").split(" "), n=1
    )
    return f"{key}: {first['input']!r}: {message}" + (f"; did you mean {close[0].strip(',')!r}?" if close else "")
