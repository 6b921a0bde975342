"""A report on a data set before training: sizes, crops, captions that are too long, classes, duplicates."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState
from PIL import Image

from ldm.data.dataset import SamplePlan
from ldm.data.images import grid, to_pil
from ldm.data.index import Index
from ldm.data.index_report import stop_reason, write_report
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.models.text_encoder import AnyTextEncoder
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

QUANTILES = (0, 5, 50, 95, 100)
NEAR_DUPLICATE_BITS = 3  # of the 64 of a perceptual hash, by which near duplicates differ at most
MAX_EXAMPLES = 5  # of each kind


def facts(index: Index, text: AnyTextEncoder | None, text_name: str = "") -> dict[str, Any]:
    """Statistics of an index as plain data. They are stored beside it, and read from there until something changes.

    They have captions and classes where the index was built for a model with these conditions; without captions, `text`
    may be None. `text_name` is what `text` was loaded from.
    """
    text = text if "text" in index.sources.conditions else None
    key = f"{index.fingerprint()[:16]}-{index.data.size}-{text.length if text else 0}"
    settings = {
        "buckets": index.data.model_dump()["buckets"],
        "text": [text_name, text.chunks] if text else None,
        "bad": index.bad_count(),
    }
    file = index.sources.cache / f"check-{key}.json"
    if file.exists() and (stored := json.loads(file.read_text("utf-8"))).get("settings") == settings:
        return dict(stored)
    result = {
        "settings": settings,
        "images": len(index),
        "bad": index.bad_count(),
        **_sizes(index),
        **(_captions(index, text) if text else {}),
        **(_classes(index) if "class" in index.sources.conditions else {}),
        **_duplicates(index),
    }
    with atomic_file(file) as tmp_path:
        tmp_path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", "utf-8")
    return result


def describe(result: dict[str, Any]) -> str:
    """The statistics as text."""
    duplicates, buckets = result["duplicates"], result["buckets"]
    largest = max(count for _, count in buckets)
    lines = [
        f"images     {result['images']:,} good, {result['bad']:,} bad",
        f"shorter    {_spread(result['shorter'])} px (percentiles 0, 5, 50, 95, 100)",
        f"longer     {_spread(result['longer'])} px",
        f"upscaled   {result['upscaled']:,} are smaller than their bucket",
        f"cropped    {result['cropped']:.1%} of the area on average",
        *(
            f"{'buckets' if i == 0 else '':10} {size:>11} {'█' * max(1, round(30 * count / largest))} {count:,}"
            for i, (size, count) in enumerate(buckets)
        ),
    ]
    if captions := result.get("captions"):
        lines += [
            f"captions   {captions['distinct']:,} distinct, {_spread(captions['tokens'])} tokens (percentiles); "
            f"{captions['truncated']:,} are longer than {captions['max_tokens']} and lose {captions['lost']:,} in all",
            *(f"             loses {lost}: {caption}" for caption, lost in captions["longest"]),
        ]
    if classes := result.get("classes"):
        lines.append(f"classes    {classes['distinct']:,} of {_spread(classes['images'])} images (percentiles)")
    lines += [
        f"duplicates {duplicates['exact']:,} are exact copies, {duplicates['near']:,} look like another",
        *(f"             {kind}: {a} and {b}" for kind, a, b in duplicates["pairs"]),
    ]
    return "\n".join(lines)


def balance(index: Index) -> str:
    """What became of everything that was seen: good, bad, and left out on purpose, which is counted by reason."""
    left_out = index.sources.left_out()
    masks = index.table.masks_by_source().values()
    lines = [describe_masks(index.table.without_masks(), *map(sum, zip(*masks, strict=True)))] if masks else []
    lines += [*left_out.lines(), balance_line(len(index), index.bad_count(), left_out.counts.total())]
    return "\n".join(lines)


def describe_masks(missing: Iterator[str], masked: int, without: int) -> str:
    """How many images have a mask, and how many have none although they should, with the first names."""
    names = itertools.islice(missing, MAX_EXAMPLES)
    rest = f"; {without:,} have none and are learned whole: {', '.join(names)}{', …' * (without > MAX_EXAMPLES)}"
    return f"masks      {masked:,} images have one{rest if without else ''}"


def balance_line(good: int, bad: int, left_out: int) -> str:
    return f"balance    {good:,} good, {bad:,} bad, {left_out:,} left out = {good + bad + left_out:,} seen"


def sheet(index: Index, spec: SampleSpec, count: int = 32) -> Image.Image:
    """A grid of `samples`."""
    images, captions = zip(*samples(index, spec, count), strict=True)
    return grid(images, captions, columns=8)


def samples(index: Index, spec: SampleSpec, count: int) -> list[tuple[Image.Image, str]]:
    """A sample of each of the first steps, cropped and mirrored as in training, with caption or class."""
    plan = SamplePlan(index, spec)
    chosen = {n: plan[n] for n in range(0, count * spec.batch, spec.batch)}
    return [
        (to_pil(plan.pixels(n, sample)[0][None])[0], sample.caption or sample.entry.label)
        for n, sample in chosen.items()
    ]


def _sizes(index: Index) -> dict[str, Any]:
    width, height = index.column("width").astype(float), index.column("height").astype(float)
    numbers, sizes = index.sizes.numbers(), index.sizes.distinct
    target = np.array(sizes, float)[numbers]
    scale = np.maximum(target[:, 0] / width, target[:, 1] / height)
    kept = target.prod(1) / (width * height * scale**2)
    return {
        "shorter": _quantiles(np.minimum(width, height)),
        "longer": _quantiles(np.maximum(width, height)),
        "upscaled": int((scale > 1).sum()),
        "cropped": float(1 - kept.mean()),
        "buckets": [[f"{w} × {h}", n] for (w, h), n in zip(sizes, np.bincount(numbers).tolist(), strict=False) if n],
    }


def _captions(index: Index, text: AnyTextEncoder) -> dict[str, Any]:
    lengths: list[int] = []
    seen: set[int] = set()  # hashes, which take less memory than the captions
    longest: list[tuple[int, str]] = []
    captions = itertools.chain.from_iterable(index.captions())
    while batch := list(itertools.islice(captions, 1024)):
        new = {caption: hash(caption) for caption in batch if hash(caption) not in seen}
        seen.update(new.values())
        counts = text.count_tokens(list(new))
        lengths += counts
        longest = sorted([*longest, *zip(counts, new, strict=True)], reverse=True)[:MAX_EXAMPLES]
    tokens = np.array(lengths)
    return {
        "captions": {
            "distinct": len(tokens),
            "tokens": _quantiles(tokens),
            "max_tokens": text.length,
            "truncated": int((tokens > text.length).sum()),
            "lost": int((tokens - text.length).clip(0).sum()),
            "longest": [[caption, count - text.length] for count, caption in longest if count > text.length],
        }
    }


def _classes(index: Index) -> dict[str, Any]:
    counts = np.array(list(Counter(index.column("label").tolist()).values()))
    return {"classes": {"distinct": len(counts), "images": _quantiles(counts)}}


def _duplicates(index: Index) -> dict[str, Any]:
    sha256 = index.sha256().view("S32").ravel()
    _, first, group = np.unique(sha256, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[group] != np.arange(len(sha256)))
    near = near_duplicates(index.column("phash")[first])
    pairs = [("copies", int(first[group[i]]), int(i)) for i in copies[:MAX_EXAMPLES]]
    pairs += [("alike", int(first[a]), int(first[b])) for a, b in near[:MAX_EXAMPLES]]
    return {
        "duplicates": {
            "exact": len(copies),
            "near": len(np.unique(near)),
            "pairs": [(kind, index[a].key, index[b].key) for kind, a, b in pairs],
        }
    }


def near_duplicates(hashes: np.ndarray, max_bits: int = NEAR_DUPLICATE_BITS, window: int = 64) -> np.ndarray:
    """Pairs `(M, 2)` of indices into `hashes` `(N,)` uint64 that differ in at most `max_bits` < 4 bits.

    Such a pair agrees in one of four bands of 16 bits. Each hash is compared with the next `window` ones of equal band,
    so of more duplicates than that, not every pair is listed.
    """
    pairs: list[np.ndarray] = []
    for band in range(4):
        keys = (hashes >> np.uint64(16 * band)) & np.uint64(0xFFFF)
        order = np.lexsort((hashes, keys))
        for shift in range(1, min(window, len(order) - 1) + 1):
            a, b = order[:-shift], order[shift:]
            same = keys[a] == keys[b]
            if not same.any():
                break
            close = same & (np.bitwise_count(hashes[a] ^ hashes[b]) <= max_bits)
            pairs.append(np.sort(np.stack([a[close], b[close]], axis=1), axis=1))
    joined = np.concatenate(pairs) if pairs else np.zeros((0, 2), int)
    return np.unique(joined, axis=0)


def _quantiles(values: np.ndarray) -> list[int]:
    return [round(float(value)) for value in np.percentile(values, QUANTILES)]


def _spread(quantiles: list[int]) -> str:
    return " ".join(f"{value:,}" for value in quantiles)


def before_training(
    index: Index | Stream, run_dir: Path, text: AnyTextEncoder | None, text_name: str, batches: Sequence[int]
) -> None:
    """Prints the statistics and writes the run's `data-report.json`; UserError where too many samples are bad.

    A stream is only read in training, which reports its bad samples. `batches` are the stages' global batches.
    """
    if isinstance(index, Stream):
        if PartialState().is_main_process:
            shards = dict.fromkeys(index.describe(batch, PartialState().num_processes) for batch in batches)
            print(*index.sources.describe(), *shards, sep="\n", flush=True)
        return
    report = run_dir / "data-report.json"
    main = PartialState().is_main_process
    if main:
        write_report(index, report)
    if problem := stop_reason(index, report):
        raise UserError(problem)
    if main:
        print(describe(facts(index, text, text_name)), balance(index), sep="\n", flush=True)
