"""Latents, their masks and text embeddings on disk: encoded once, by all processes, and read memory-mapped ever after.

An entry's key is the SHA-256 of the image, of image and mask, or of the caption; its folder follows from everything
else that it depends on, so that latents of another autoencoder are never read. Masks have files of their own: with a
changed mask, or none, the image's latents stay valid.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from ldm.config.schema import DataConfig
from ldm.data.crops import Augmentation, Crop
from ldm.data.encoding_store import EncodingJob, EncodingStore, encode_missing
from ldm.data.images import Size
from ldm.data.index import Entry, Index
from ldm.data.masks import latent_mask
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
    """The latents and embeddings of an index, and the masks, where any image has one."""

    latents: dict[Size, EncodingStore]
    masks: dict[Size, EncodingStore]
    text: EncodingStore | None
    variants: Sequence[Variant]

    def latent(self, crop: Crop, sha256: bytes) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and log-variance of an image's normalised latent, `(C, h, w)` each."""
        entry, variant = self.latents[crop.size][sha256], self.variants.index((crop.number, crop.flip))
        return entry["mean"][variant], entry["logvar"][variant]

    def mask(self, crop: Crop, entry: Entry) -> torch.Tensor:
        """An image's mask at the size of its latent, `(1, h, w)` in [0, 1]."""
        stored = self.masks[crop.size][_mask_key(entry.sha256, entry.mask_sha256)]
        return stored["mask"][self.variants.index((crop.number, crop.flip))]

    def embedding(self, caption: str) -> dict[str, torch.Tensor]:
        """`text` `(T, D)`, and `pooled` `(P,)` where the encoder has it."""
        assert self.text, "a cache without captions"
        return self.text[_caption_key(caption)]


class CropDataset(torch.utils.data.Dataset[torch.Tensor]):
    """All variants of some images of an index, `(V, 3, H, W)` each, or with `mask_factor` of their masks.

    Masks are as many times smaller, `(V, 1, h, w)`.
    """

    def __init__(
        self, index: Index, entries: np.ndarray, size: Size, variants: Sequence[Variant], mask_factor: int = 0
    ):
        self.index, self.entries, self.size, self.mask_factor = index, entries, size, mask_factor
        self.variants = variants

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, i: int) -> torch.Tensor:
        entry = int(self.entries[i])
        sha256, crops = self.index[entry].sha256, [Crop(self.size, *variant) for variant in self.variants]
        if not self.mask_factor:
            image = self.index.load_image(entry)
            return torch.stack([crop.pixels(image, sha256) for crop in crops])
        mask = self.index.load_mask(entry)
        assert mask, "only images with a mask are listed"
        return torch.stack([latent_mask(crop.apply(mask, sha256), self.mask_factor) for crop in crops])

    def batches(self, workers: int) -> torch.utils.data.DataLoader[torch.Tensor]:
        """In order, read by loader processes."""
        return torch.utils.data.DataLoader(
            self,
            max(1, BATCH // len(self.variants)),
            num_workers=workers,
            worker_init_fn=leave_signals_to_parent,
            generator=torch.Generator(),  # its own, because it draws the workers' seeds
        )


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
    with_masks: bool = False,
) -> Cache:
    """The cache of an index; encodes what is missing. Every process of the run calls it. No `text`: no embeddings."""
    variants = variants_of(augmentation, index)
    images = _image_jobs(index, options, autoencoder, variants)
    masks = _mask_jobs(index, options, autoencoder.factor, variants) if with_masks and index.has_masks else {}
    captions = [_caption_job(index, options, text)] if text else []
    encode_missing(list(images.values()), "images", max(1, per_file // len(variants)))
    encode_missing(list(masks.values()), "masks", max(1, per_file // len(variants)))
    encode_missing(captions, "captions", per_file)
    text_store = captions[0].store if captions else None
    return Cache(_stores(images), _stores(masks), text_store, variants)


def _stores(jobs: Mapping[Size, EncodingJob]) -> dict[Size, EncodingStore]:
    return {size: job.store for size, job in jobs.items()}


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
            for pixels in CropDataset(index, entries[indices], size, variants).batches(options.workers):
                moments = autoencoder.moments(pixels.flatten(0, 1))  # (N, V, 3, H, W) → (N·V, 3, H, W)
                mean, logvar = (moment.unflatten(0, pixels.shape[:2]).to("cpu", dtype) for moment in moments)
                yield {"mean": mean, "logvar": logvar}

        return EncodingJob(EncodingStore(options.folder / "latents", metadata), [sha256[i] for i in entries], encode)

    jobs = {}
    for size, entries in index.by_size().items():
        distinct = entries[np.sort(np.unique(keys[entries], return_index=True)[1])]  # copies are encoded once
        jobs[size] = job(size, distinct)
    return jobs


def _mask_jobs(
    index: Index, options: CacheOptions, factor: int, variants: Sequence[Variant]
) -> dict[Size, EncodingJob]:
    """A job for the masks of each bucket's images."""
    pairs = list(zip(index.column("sha256").tolist(), index.column("mask_sha256").tolist(), strict=True))

    def job(size: Size, entries: np.ndarray) -> EncodingJob:
        entry_of = {_mask_key(*pairs[i]): i for i in entries.tolist() if pairs[i][1] is not None}
        chosen = np.array(list(entry_of.values()), int)
        metadata = {
            "the size": list(size),
            "the autoencoder's factor": factor,
            "data.crop": sorted({crop for crop, _ in variants}),
            "data.flip": any(flip for _, flip in variants),
        }

        def encode(indices: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
            for masks in CropDataset(index, chosen[indices], size, variants, factor).batches(options.workers):
                yield {"mask": masks}

        return EncodingJob(EncodingStore(options.folder / "masks", metadata), list(entry_of), encode)

    return {size: job(size, entries) for size, entries in index.by_size().items()}


def _mask_key(sha256: bytes, mask_sha256: bytes | None) -> bytes:
    """Random crops follow from the image, so that images can't share a mask's entry."""
    assert mask_sha256, "an image with a mask"
    return hashlib.sha256(sha256 + mask_sha256).digest()


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
