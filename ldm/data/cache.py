"""Latents and text embeddings on disk: encoded once, keyed by everything that they were made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from ldm.autoencoder import Autoencoder
from ldm.data.images import load
from ldm.data.order import Order, generator
from ldm.data.sources import Record
from ldm.files import whole_file
from ldm.text import NULL_PROMPT, TextEncoder


@dataclass(frozen=True)
class Cache:
    """Latents `(N, C, h, w)` of N records; embeddings `(M, T, D)` of their distinct captions and the null prompt."""

    latents: torch.Tensor
    text: torch.Tensor
    rows: dict[str, int]  # caption → row of `text`

    @property
    def null(self) -> torch.Tensor:
        """The unconditional embedding, `(T, D)`."""
        return self.text[self.rows[NULL_PROMPT]]


def build(records: Sequence[Record], size: int, autoencoder: Autoencoder, text: TextEncoder, folder: Path) -> Cache:
    """Reads the cache of these records from `folder`, encoding what is not there.

    A file's name is the SHA-256 of what it was made from (pictures, size and autoencoder; captions and text encoder),
    so a cache of other data or another model is never read.
    """
    captions = sorted({caption for record in records for caption in record.captions} | {NULL_PROMPT})

    def encode_pictures() -> torch.Tensor:
        parts = []
        for start in tqdm(range(0, len(records), 32), desc="encoding pictures", unit=" batch", leave=False):
            pixels = torch.stack([load(record.path, size) for record in records[start : start + 32]])
            parts.append(autoencoder.encode(pixels).cpu())
        return torch.cat(parts)

    def encode_captions() -> torch.Tensor:
        parts = (
            text.encode(captions[start : start + 64]).cpu()
            for start in tqdm(range(0, len(captions), 64), desc="encoding captions", unit=" batch", leave=False)
        )
        return torch.cat(list(parts))

    latents = _cached(folder, "latents", [autoencoder.fingerprint(), size, _pictures(records)], encode_pictures)
    embeddings = _cached(folder, "text", [text.fingerprint(), captions], encode_captions)
    return Cache(latents, embeddings, {caption: row for row, caption in enumerate(captions)})


class Samples(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """The samples of stage two by position: item n is `{"position": n, "latent": (C, h, w), "text": (T, D)}`.

    Where a picture has several captions, one is drawn from (seed, n).
    """

    def __init__(self, records: Sequence[Record], cache: Cache, seed: int):
        self.records, self.cache, self.seed = records, cache, seed
        self.order = Order([record.weight for record in records], seed)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        index = self.order[n]
        captions = self.records[index].captions
        choice = int(generator(self.seed, "caption", n).integers(len(captions)))
        text = self.cache.text[self.cache.rows[captions[choice]]]
        return {"position": torch.tensor(n), "latent": self.cache.latents[index], "text": text}


def _pictures(records: Sequence[Record]) -> str:
    digest = hashlib.sha256()
    for record in records:
        digest.update(hashlib.sha256(record.path.read_bytes()).digest())
    return digest.hexdigest()


def _cached(folder: Path, name: str, key: list[object], make: Callable[[], torch.Tensor]) -> torch.Tensor:
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]
    path = folder / f"{name}-{digest}.safetensors"
    state = PartialState()
    if state.is_main_process and not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as beside:
            save_file({name: make().contiguous()}, beside)
    state.wait_for_everyone()
    return load_file(path)[name]
