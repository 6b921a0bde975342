"""Reads and checks kohya's TOML data-set file.

Its image sizes become `data.size` and `data.buckets`. An unsupported key is an error that names its replacement.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ldm.utils.errors import UserError
from ldm.utils.paths import expand

SIZE_KEYS = {
    "resolution": (int, list),
    "enable_bucket": bool,
    "bucket_reso_steps": int,
    "min_bucket_reso": int,
    "max_bucket_reso": int,
    "bucket_no_upscale": bool,
}

CAPTION_KEYS: dict[str, Any] = {
    "caption_extension": str,
    "shuffle_caption": bool,
    "keep_tokens": int,
    "caption_dropout_rate": (int, float),
    "flip_aug": bool,
    "num_repeats": int,
    "class_tokens": str,
    "alpha_mask": bool,
}

SUBSET_KEYS = {**CAPTION_KEYS, "image_dir": str, "is_reg": bool, "conditioning_data_dir": str}

# Keys that have an effect only where another one is true.
NEEDED_KEYS = {
    **{key: "enable_bucket" for key in SIZE_KEYS if key not in ("resolution", "enable_bucket")},
    "keep_tokens": "shuffle_caption",
}

REPLACEMENTS = {
    "batch_size": "set stage2.batch",
    "color_aug": "the latents are cached; leave it out",
    "random_crop": "set data.crop=random",
    "keep_tokens_separator": "use keep_tokens",
    "metadata_file": "give the folder of a metadata.jsonl as data.source",
    "is_reg": "write it into a [[datasets.subsets]]",
    "enable_wildcard": "write one caption an image",
}


@dataclass(frozen=True)
class Subset:
    folder: Path
    num_repeats: int = 1
    caption_extension: str = ""  # empty: .txt or .caption
    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_dropout_rate: float | None = None
    flip_aug: bool | None = None
    class_tokens: str = ""
    alpha_mask: bool = False  # the alpha channel is the mask of the loss
    conditioning_data_dir: Path | None = None  # a folder with the masks
    is_reg: bool = False  # images of the class, which keep it from being forgotten


def settings(file: Path) -> dict[str, Any]:
    """The keys `size` and `buckets` of the section `data`, where the file sets them."""
    tree = _read(file)
    sizes_of = [dict(_innermost(SIZE_KEYS, tree.get("general", {}), dataset)) for dataset in tree["datasets"]]
    sizes = sizes_of[0]
    for other in sizes_of[1:]:
        if other != sizes:
            raise UserError(f"{file}: data sets of several sizes ({sizes}, {other}); make a file of each")
    data: dict[str, Any] = {}
    if "resolution" in sizes:
        sides = sizes["resolution"] if isinstance(sizes["resolution"], list) else [sizes["resolution"]]
        if len(set(sides)) != 1 or not isinstance(sides[0], int):
            raise UserError(f"{file}: resolution: {sizes['resolution']}; give one side, the square root of the area")
        data["size"] = sides[0]
    if sizes.get("enable_bucket"):
        data["buckets"] = {
            "step": sizes.get("bucket_reso_steps", 64),
            "smallest": sizes.get("min_bucket_reso"),
            "largest": sizes.get("max_bucket_reso"),
            "upscale": not sizes.get("bucket_no_upscale", False),
        }
    return data


def subsets(file: Path) -> list[Subset]:
    """The subsets with their settings, inherited from their data set and from `[general]`."""
    tree = _read(file)
    result = []
    for dataset in tree["datasets"]:
        for subset in dataset["subsets"]:
            if not isinstance(subset.get("image_dir"), str):
                raise UserError(f"{file}: a subset without image_dir; name its folder")
            options = dict(_innermost(CAPTION_KEYS, tree.get("general", {}), dataset, subset))
            options["is_reg"] = subset.get("is_reg", False)
            if options.get("alpha_mask") and "conditioning_data_dir" in subset:
                raise UserError(
                    f"{file}: a subset with alpha_mask and conditioning_data_dir; masks are one or the other"
                )
            if "conditioning_data_dir" in subset:
                options["conditioning_data_dir"] = _folder(file, subset, "conditioning_data_dir")
            result.append(Subset(_folder(file, subset, "image_dir"), **options))
    return result


def _folder(file: Path, subset: Mapping[str, Any], key: str) -> Path:
    try:
        return file.parent / expand(subset[key])
    except ValueError as error:
        raise UserError(f"{file}: {key}: {subset[key]!r}: {error}") from None


def keys_without_effect(file: Path) -> list[str]:
    """The keys that change nothing of any subset: inner ones take their place, or the key that they need is not set."""
    tree = _read(file)
    sections = {"general": tree.get("general", {})}
    effective = set[tuple[str, str]]()
    for i, dataset in enumerate(tree["datasets"], start=1):
        for j, subset in enumerate(dataset["subsets"], start=1):
            inner = {f"data set {i}": dataset, f"data set {i}, subset {j}": subset}
            sections |= inner
            chain = {"general": sections["general"], **inner}
            settings = dict(_innermost({**SIZE_KEYS, **CAPTION_KEYS}, *chain.values()))
            for key in settings:
                if key not in NEEDED_KEYS or settings.get(NEEDED_KEYS[key]):
                    effective.add((next(name for name in reversed(chain) if key in chain[name]), key))
    return [
        f"{name}: {key}"
        for name, section in sections.items()
        for key in section
        if key not in ("subsets", "image_dir", "is_reg", "conditioning_data_dir") and (name, key) not in effective
    ]


def _read(file: Path) -> dict[str, Any]:
    """The parsed file; UserError where a key is unknown, with the nearest known one, or of the wrong type."""
    try:
        tree = tomllib.loads(file.read_text("utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"data.source: no file {file}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not valid TOML ({error})") from None
    inherited = {**SIZE_KEYS, **CAPTION_KEYS}
    _check(file, "", tree, {"general": dict, "datasets": list})
    _check(file, "general: ", tree.get("general", {}), inherited)
    if not tree.get("datasets"):
        raise UserError(f"{file}: no [[datasets]]; give at least one, with [[datasets.subsets]]")
    for dataset in tree["datasets"]:
        _check(file, "datasets: ", dataset, {**inherited, "subsets": list})
        if not dataset.get("subsets"):
            raise UserError(f"{file}: a data set without [[datasets.subsets]]; give at least one, with image_dir")
        for subset in dataset["subsets"]:
            _check(file, "subsets: ", subset, SUBSET_KEYS)
    return tree


def _check(file: Path, prefix: str, section: Any, known: Mapping[str, Any]) -> None:
    if not isinstance(section, dict):
        raise UserError(f"{file}: {prefix}{section!r}; write a table of keys")
    for key, value in section.items():
        if key in REPLACEMENTS and key not in known:
            raise UserError(f"{file}: {prefix}{key} has no meaning here; {REPLACEMENTS[key]}")
        if key not in known:
            close = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise UserError(f"{file}: {prefix}{key!r} is unknown or has no meaning here; the nearest is {close[0]!r}")
        kinds = known[key] if isinstance(known[key], tuple) else (known[key],)
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise UserError(f"{file}: {prefix}{key}: {value!r}; give {names}")
        least = 1 if key == "num_repeats" or key.endswith(("steps", "reso")) or key == "resolution" else 0
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value < least:
            raise UserError(f"{file}: {prefix}{key}: {value!r}; give {least} or more")
        if key == "caption_dropout_rate" and not value < 1:  # nor is NaN
            raise UserError(f"{file}: {prefix}{key}: {value!r}; give less than 1")


def _innermost(keys: Mapping[str, Any], *sections: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The innermost value of each key that is set; `sections` go from the outermost to the innermost."""
    for key in keys:
        values = [section[key] for section in sections if key in section]
        if values:
            yield key, values[-1]
