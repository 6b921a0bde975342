"""Names that keys had in earlier versions: they still load, with a note that names the current one."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any, get_args

from ldm.config.schema import Config, Section, SourceConfig, Stage2Config, Training
from ldm.utils.errors import UserError

# Old name → name, by section; all from before 0.1.0, the first release.
OLD_NAMES: dict[str, dict[str, str]] = {
    "RunConfig": {"keep": "checkpoints_total_limit"},
    "SourceConfig": {"column": "caption_column"},
    "DataConfig": {"held_out": "val_fraction"},
    "Training": {
        "clip": "max_grad_norm",
        "decay": "lr_scheduler",
        "warmup": "lr_warmup_steps",
        "ema": "ema_decay",
    },
    "Stage1Config": {"groups": "norm_num_groups", "evaluate_pictures": "evaluate_images"},
    "ClassifierConfig": {
        "head_size": "attention_head_dim",
        "groups": "norm_num_groups",
        "evaluate_pictures": "evaluate_images",
    },
    "Stage2Config": {
        "target": "prediction_type",
        "schedule": "beta_schedule",
        "times": "timestep_sampling",
        "time_mean": "logit_mean",
        "time_std": "logit_std",
        "weight": "loss_weighting",
        "dropout": "cond_dropout",
        "null": "uncond_embedding",
        "head_size": "attention_head_dim",
        "groups": "norm_num_groups",
        "evaluate_pictures": "evaluate_images",
    },
}
OLD_PRESETS = ("free", "unet")  # now "custom"
OLD_SOURCE_KIND = "pictures"  # now "images"


def rename_keys(kind: type[Section], values: dict[str, Any], prefix: str = "") -> tuple[dict[str, Any], list[str]]:
    """A section's values under the current names of keys, and a note for each key with an old one.

    UserError where both names of a key are set.
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
    if kind is SourceConfig and result.get("kind") == OLD_SOURCE_KIND:
        notes.append(f"{prefix}kind: {OLD_SOURCE_KIND} is now images")
        result["kind"] = "images"
    if issubclass(kind, Training) and "micro_batches" in result:
        result, note = _device_batch(kind, result, prefix)
        notes += note
    for key, value in result.items():
        if key in kind.model_fields and (inner := section_in(kind.model_fields[key].annotation)):
            if isinstance(value, dict):
                result[key], more = rename_keys(inner, value, f"{prefix}{key}.")
                notes += more
            elif isinstance(value, list):
                path = f"{prefix}{key}."
                pairs = [rename_keys(inner, item, path) if isinstance(item, dict) else (item, []) for item in value]
                result[key] = [item for item, _ in pairs]
                notes += [note for _, more in pairs for note in more]
    return result, list(dict.fromkeys(notes))


def current_key(path: str, notes: list[str]) -> str:
    """The current name of a key such as `stage2.target`; adds a note where that differs."""
    *sections, leaf = path.split(".")
    kind: type[Section] | None = Config
    for name in sections:
        kind = section_in(kind.model_fields[name].annotation) if kind and name in kind.model_fields else None
    new = _old_names(kind).get(leaf, leaf) if kind else leaf
    current = ".".join([*sections, new])
    if new != leaf:
        notes.append(f"{path} is now {current}")
    return current


def _old_names(kind: type[Section]) -> dict[str, str]:
    """Old name → name of the keys of a section; a class overrides its parents."""
    merged: dict[str, str] = {}
    for parent in reversed(kind.__mro__):
        merged |= OLD_NAMES.get(parent.__name__, {})
    return merged


def section_in(annotation: Any) -> type[Section] | None:
    """The section in the type of a field, such as `GanConfig | None` or `tuple[SourceConfig, ...]`."""
    if isinstance(annotation, type(Section)) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(section_in, get_args(annotation))), None)


def _device_batch(kind: type[Section], values: dict[str, Any], prefix: str) -> tuple[dict[str, Any], list[str]]:
    """Replaces `micro_batches`, the number of equal parts of a process's share of the batch, by `device_batch`."""
    values = dict(values)
    old, new, parts = f"{prefix}micro_batches", f"{prefix}device_batch", values.pop("micro_batches")
    if parts == 1:  # the whole share at once, as by default
        return values, []
    batch, processes = values.get("batch", kind.model_fields["batch"].default), int(os.environ.get("WORLD_SIZE", "1"))
    if values.get("device_batch") is not None:
        raise UserError(f"{old}: {parts} and {new}: {values['device_batch']} are both set; leave the first out")
    if not (isinstance(parts, int) and isinstance(batch, int) and parts > 0) or batch % (parts * processes):
        share = f", {batch}," if processes == 1 else f", {batch}, over {processes} processes"
        raise UserError(f"{old}: {parts} equal parts of {prefix}batch{share} can't be; set {new} instead")
    images = batch // (parts * processes)
    note = f"{old} is now {new}, the images that a device computes at once: {images} here"
    return {**values, "device_batch": images}, [note]


def print_notes(notes: Sequence[str]) -> None:
    """Prints notes to stderr, on the first process of a run."""
    for note in notes if os.environ.get("RANK", "0") == "0" else ():
        print(note, file=sys.stderr)
