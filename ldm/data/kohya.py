"""The images of a kohya TOML data-set file: each subset is a folder of images with caption files."""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from ldm.config.kohya import Subset, keys_without_effect, subsets
from ldm.data.folder_tree import FolderTree
from ldm.data.folders import sidecars
from ldm.data.masks import MaskFolder, check_apart
from ldm.data.records import PRIOR, BadSample, LeftOut, ReadOptions, Record, Records, label_of
from ldm.data.unread_files import SIDECARS
from ldm.utils.errors import UserError

MAX_SHUFFLES = 8  # tag orders of a shuffled caption: the embedding of each is cached


def read(file: Path, options: ReadOptions, prior: bool = False) -> Records:
    """The images of every subset, named by folder and file. Where classes are read, they are `class_tokens`.

    Regularization images (`is_reg`) come last. An epoch shows them as often as all the others together, as kohya's own
    scripts do. With `prior` they have that split instead, and `ldm.data.sampler.Order` balances them.
    """
    yield from (LeftOut(f"{file.name}: {key}", "keys without effect") for key in keys_without_effect(file))
    regularization, shown = list[Record](), 0
    for subset in sorted(subsets(file), key=lambda subset: subset.is_reg):
        if not os.path.isdir(subset.folder):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
            raise UserError(f"{file}: image_dir: no folder {subset.folder}")
        if masks := subset.conditioning_data_dir:
            if not os.path.isdir(masks):  # noqa: PTH112
                raise UserError(f"{file}: conditioning_data_dir: no folder {masks}; it has the masks of the images")
            check_apart(f"{file}: conditioning_data_dir", masks, subset.folder)
        for record in _records(subset, options):
            if not isinstance(record, Record):
                yield record
            elif subset.is_reg and prior:
                yield replace(record, split=PRIOR)
            elif subset.is_reg:
                regularization.append(record)
            else:
                shown += record.repeats
                yield record
    if regularization and not shown:
        raise UserError(f"{file}: only regularization images; give a subset of other images, or drop is_reg")
    for record, repeats in zip(regularization, _repeats(regularization, shown), strict=True):
        if repeats:
            yield replace(record, repeats=repeats)
        else:
            yield LeftOut(record.key, "regularization images beyond the number of the others")


def _repeats(records: Sequence[Record], total: int) -> list[int]:
    """How often an epoch shows each record, `total` times in all: first as often as it says, then in turns."""
    repeats = [record.repeats for record in records]
    left = [max(total - before, 0) for before in itertools.accumulate(repeats, initial=0)]
    repeats = [min(own, rest) for own, rest in zip(repeats, left, strict=False)]
    rounds, first = divmod(left[-1], max(len(records), 1))
    return [own + rounds + (i < first) for i, own in enumerate(repeats)]


def _records(subset: Subset, options: ReadOptions) -> Records:
    extension = subset.caption_extension  # kohya's own scripts also take it without the dot
    extensions = (f".{extension.removeprefix('.')}",) if extension else SIDECARS
    masks = subset.conditioning_data_dir
    tree = FolderTree(subset.folder, masks=masks)
    records = sidecars(tree, options._replace(lines=False), extensions, subset.class_tokens)
    for record in MaskFolder(masks).masked(records) if masks else records:
        key = f"{subset.folder.name}/{record.key}"
        if isinstance(record, BadSample | LeftOut):
            yield replace(record, key=key)
        else:
            yield Record(
                key,
                record.location,
                tuple(_shuffled(record.captions[0], key, subset)),
                label="" if options.label is None else label_of(subset.class_tokens),
                repeats=subset.num_repeats,
                flip=subset.flip_aug,
                dropout=subset.caption_dropout_rate,
                mask=record.location if subset.alpha_mask else record.mask,
            )


def _shuffled(caption: str, key: str, subset: Subset) -> list[str]:
    """The caption, or some random orders of its comma-separated tags; the first `keep_tokens` tags stay in place.

    The orders follow from `key`, the image's name.
    """
    tags = [tag.strip() for tag in caption.split(",")]
    kept, free = tags[: subset.keep_tokens], tags[subset.keep_tokens :]
    if not subset.shuffle_caption or len(free) < 2:
        return [caption]
    if len(free) < 4:
        return [", ".join([*kept, *order]) for order in itertools.permutations(free)]
    rng = np.random.default_rng([*key.encode()])
    return list(dict.fromkeys(", ".join([*kept, *rng.permutation(free).tolist()]) for _ in range(MAX_SHUFFLES)))
