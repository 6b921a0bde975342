"""Latents and text embeddings on disk: encoded once, by all processes, and read memory-mapped ever after.

An entry's key is the SHA-256 of the image or caption; its folder follows from everything else that it depends on, so
that latents of another autoencoder are never read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from ldm.config.schema import DataConfig
from ldm.data.crops import Augmentation, Crop
from ldm.data.encoding_store import EncodingJob, EncodingStore, encode_missing
from ldm.data.images import Size
from ldm.data.index import Index
from ldm.distributed.launch import leave_signals_to_parent
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import AnyTextEncoder

PER_FILE = 4096  # entries
BATCH = 32
Variant = tuple[int, bool]  # number of the crop, mirrored or not


@dataclass(frozen=True)
class CacheOptions:
    """Where encodings are stored, with which dtype, and how many loader processes read the images to encode."""

    folder: Path
    dtype: str = "float32"
    workers: int = 0

    @classmethod
    def of(cls, data: DataConfig, folder: Path) -> CacheOptions | None:
        """None where `data.cache` is none: every batch is then encoded when it is used."""
        return cls(folder, data.cache_dtype, data.workers) if data.cache == "disk" else None


@dataclass
class Cache:
    """The latents and embeddings of an index."""

    latents: dict[Size, EncodingStore]
    text: EncodingStore | None
    variants: Sequence[Variant]

    def latent(self, crop: Crop, sha256: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of an image's normalised latent, `(C, h, w)` each."""
        entry, variant = self.latents[crop.size][sha256], self.variants.index((crop.number, crop.flip))
        return entry["mean"][variant], entry["logvar"][variant]

    def embedding(self, caption: str) -> dict[str, torch.Tensor]:
        """`text` `(T, D)`, and `pooled` `(P,)` where the encoder has it."""
        assert self.text, "a cache without captions"
        return self.text[_caption_key(caption)]


class CropDataset(torch.utils.data.Dataset[torch.Tensor]):
    """All variants of some images of an index, `(V, 3, H, W)` each."""

    def __init__(self, index: Index, entries: np.ndarray, size: Size, variants: Sequence[Variant]):
        self.index, self.entries, self.size, self.variants = index, entries, size, variants

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> torch.Tensor:
        entry = int(self.entries[i])
        image, sha256 = self.index.load_image(entry), self.index[entry].sha256
        return torch.stack([Crop(self.size, *variant).pixels(image, sha256) for variant in self.variants])


def variants_of(augmentation: Augmentation, index: Index) -> list[Variant]:
    """The variants of each image that the cache holds; mirrored ones where any source mirrors."""
    crops = (-1,) if augmentation.crops is None else range(augmentation.crops)
    mirrors = augmentation.flip or bool(pc.any(index.table["flip"]).as_py())
    return [(crop, flip) for crop in crops for flip in ((False, True) if mirrors else (False,))]


def build(
    index: Index,
    augmentation: Augmentation,
    options: CacheOptions,
    autoencoder: Autoencoder,
    text: AnyTextEncoder | None,
    per_file: int = PER_FILE,
) -> Cache:
    """The cache of an index; encodes what is missing. Every process of the run calls it. No `text`: no embeddings."""
    variants = variants_of(augmentation, index)
    images = _image_jobs(index, options, autoencoder, variants)
    captions = [_caption_job(index, options, text)] if text else []
    encode_missing(list(images.values()), "images", max(1, per_file // len(variants)))
    encode_missing(captions, "captions", per_file)
    latents = {size: job.store for size, job in images.items()}
    return Cache(latents, captions[0].store if captions else None, variants)


def _image_jobs(
    index: Index, options: CacheOptions, autoencoder: Autoencoder, variants: Sequence[Variant]
) -> dict[Size, EncodingJob]:
    """A job for the images of each bucket."""
    dtype, fingerprint = getattr(torch, options.dtype), autoencoder.encoder_fingerprint()
    sha256 = index.column("sha256").tolist()
    keys = np.array(sha256, "S32")

    def job(size: Size, entries: np.ndarray) -> EncodingJob:
        metadata = {
            "the autoencoder": fingerprint,
            "the size": list(size),
            "data.crop": sorted({crop for crop, _ in variants}),
            "data.flip": any(flip for _, flip in variants),
            "data.background": index.data.background,
            "data.cache_dtype": options.dtype,
        }

        def encode(indices: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
            crops = CropDataset(index, entries[indices], size, variants)
            batch = max(1, BATCH // len(variants))
            loader = torch.utils.data.DataLoader(
                crops,
                batch,
                num_workers=options.workers,
                worker_init_fn=leave_signals_to_parent,
                generator=torch.Generator(),  # its own, because it draws the workers' seeds
            )
            for pixels in loader:
                moments = autoencoder.moments(pixels.flatten(0, 1))  # (N, V, 3, H, W) → (N·V, 3, H, W)
                mean, logvar = (moment.unflatten(0, pixels.shape[:2]).to("cpu", dtype) for moment in moments)
                yield {"mean": mean, "logvar": logvar}

        return EncodingJob(EncodingStore(options.folder / "latents", metadata), [sha256[i] for i in entries], encode)

    jobs = {}
    for size, entries in index.by_size().items():
        distinct = entries[np.sort(np.unique(keys[entries], return_index=True)[1])]  # copies are encoded once
        jobs[size] = job(size, distinct)
    return jobs


def _caption_job(index: Index, options: CacheOptions, text: AnyTextEncoder) -> EncodingJob:
    """The job of all distinct captions."""
    captions = {_caption_key(caption): caption for of_entry in index.captions() for caption in of_entry}
    keys, dtype = list(captions), getattr(torch, options.dtype)

    def encode(indices: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(indices), 2 * BATCH):
            batch = [captions[keys[i]] for i in indices[start : start + 2 * BATCH]]
            embedding = text.embed(batch).map(lambda tensor: tensor.to("cpu", dtype))
            yield {"text": embedding.states} | ({} if embedding.pooled is None else {"pooled": embedding.pooled})

    metadata = {"the text encoder": text.fingerprint(), "data.cache_dtype": options.dtype}
    return EncodingJob(EncodingStore(options.folder / "text", metadata), keys, encode)


def _caption_key(caption: str) -> bytes:
    return hashlib.sha256(caption.encode()).digest()
