"""What a run reports of its index before it trains: `data-report.json`, and why it may not train at all."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ldm.data.index import Index
from ldm.data.index_table import SPLITS
from ldm.utils.atomic_files import atomic_file

MAX_REPORTED = 10_000  # bad samples that the report lists


def write_report(index: Index, path: Path) -> None:
    """Writes `data-report.json`: how many good images and captions; each bad image: file, reason, remedy."""
    listed = [bad.__dict__ for _, bad in zip(range(MAX_REPORTED), index.bad_samples(), strict=False)]
    counts = np.bincount(index.split_numbers(), minlength=len(SPLITS) + 1)[1:].tolist()
    report = {
        "images": len(index),
        "splits": {split: count for split, count in sorted(zip(SPLITS, counts, strict=True)) if count},
        "captions": int(index.caption_counts().sum()) if len(index) else 0,
        "bad": index.bad_count(),
        "left_out": dict(index.sources.left_out().counts),
        "on_error": index.data.on_error,
        "max_bad": index.data.max_bad,
        "list": listed,
    }
    if masks := index.table.masks_by_source():
        names = [name for _, name in zip(range(MAX_REPORTED), index.table.without_masks(), strict=False)]
        report["masks"] = {"images": sum(n for n, _ in masks.values()), "without": names}
    with atomic_file(path) as tmp_path:
        tmp_path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", "utf-8")


def stop_reason(index: Index, report: Path) -> str:
    """Why the bad images forbid training, in one line that names the file `report`; empty if they don't."""
    bad, total = index.bad_count(), len(index.table)
    if not len(index):
        first = next(index.bad_samples(), None)
        return f"data.source: no usable image in {index.data.name}" + (f"; the first bad one: {first}" if first else "")
    if not len(index.select("train")):
        if index.prior() is not None and not index.data.val_fraction:
            return f"data.source: {index.data.name} has only images of the class; add those of the subject"
        fraction = index.data.val_fraction
        return f"data.val_fraction: {fraction} holds out all {len(index)} images; set it to 0, or add some"
    for number, (masked, _) in index.table.masks_by_source().items():
        if not masked:
            return index.sources.no_masks(number)
    stops = bad and index.data.on_error == "stop"
    if stops or bad > index.data.max_bad * total:
        rule = "data.on_error is stop" if stops else f"data.max_bad is {index.data.max_bad}"
        return f"{bad} of {total} images are bad, and {rule}; see {report}. The first: {next(index.bad_samples())}"
    return ""
