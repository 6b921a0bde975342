"""Latents, their masks and text embeddings on disk: encoded once, by all processes, and read memory-mapped ever after.

An entry's key is the SHA-256 of the image, of image and mask, or of the caption; its folder follows from everything
else that it depends on, so that latents of another autoencoder are never read. Masks have files of their own: with a
changed mask, or none, the image's latents stay valid.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import torch

from ldm.config.schema import DataConfig
from ldm.data.arrow_columns import BLOCK
from ldm.data.crops import Augmentation, Crop
from ldm.data.encoding_store import EncodingJob, EncodingStore, encode_missing
from ldm.data.images import Size
from ldm.data.index import Index
from ldm.data.key_lookup import first_occurrences
from ldm.data.masks import latent_mask
from ldm.data.page_cache import look_up
from ldm.data.records import SampleFields
from ldm.distributed.launch import DataLoader
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

    def read_ahead(self, samples: Sequence[tuple[Crop, bytes, str]]) -> None:
        """Has the system read where the entries of these samples are: of a crop of an image, and of its caption."""
        lookups = [self.latents[crop.size].lookup.lookup(sha256) for crop, sha256, _ in samples]
        lookups += [self.text.lookup.lookup(_caption_key(caption)) for _, _, caption in samples if self.text]
        look_up(lookups)

    def mask(self, crop: Crop, entry: SampleFields) -> torch.Tensor:
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

    def batches(self, workers: int) -> DataLoader[torch.Tensor]:
        """In order, read by loader processes."""
        return DataLoader(
            self,
            batch_size=max(1, BATCH // len(self.variants)),
            num_workers=workers,
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

    def job(size: Size) -> EncodingJob:
        images = functools.cache(lambda: DistinctImages(index, size))
        metadata = {
            "the autoencoder": fingerprint,
            "the size": list(size),
            "data.crop": sorted({crop for crop, _ in variants}),
            "data.flip": any(flip for _, flip in variants),
            "data.background": index.data.background,
            "data.cache_dtype": options.dtype,
        }

        def encode(indices: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
            for pixels in CropDataset(index, images().entries[indices], size, variants).batches(options.workers):
                moments = autoencoder.moments(pixels.flatten(0, 1))  # (N, V, 3, H, W) → (N·V, 3, H, W)
                mean, logvar = (moment.unflatten(0, pixels.shape[:2]).to("cpu", dtype) for moment in moments)
                yield {"mean": mean, "logvar": logvar}

        store = EncodingStore(options.folder / "latents", metadata)
        return EncodingJob(store, index.name, images, encode)

    return {size: job(size) for size in index.sizes.used()}


class DistinctImages:
    """The entries of a size whose image no earlier one has too, as copies are encoded once, and their keys."""

    def __init__(self, index: Index, size: Size):
        self.index, self.size = index, size
        self.entries = index.columns.array("distinct-images", (index.name, size), self._first_occurrences)

    def __len__(self) -> int:
        return len(self.entries)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return self.index.sha256(self.entries[indices]).view("S32").ravel()

    def _first_occurrences(self) -> np.ndarray:
        sizes = self.index.sizes
        entries = np.flatnonzero(sizes.numbers() == sizes.distinct.index(self.size)).astype(self.index.rows.dtype)
        keys = np.empty(len(entries), "S16")  # half a hash is enough to tell images apart
        for start in range(0, len(entries), BLOCK):
            part = self.index.sha256(entries[start : start + BLOCK])[:, :16]
            keys[start : start + BLOCK] = np.ascontiguousarray(part).view("S16").ravel()
        return entries[first_occurrences(keys)]


def _mask_jobs(
    index: Index, options: CacheOptions, factor: int, variants: Sequence[Variant]
) -> dict[Size, EncodingJob]:
    """A job for the masks of each bucket's images."""
    numbers = index.sizes.numbers()

    def job(size: Size) -> EncodingJob:
        @functools.cache
        def entry_of() -> dict[bytes, int]:
            of_size = np.flatnonzero(numbers == index.sizes.distinct.index(size))
            entries = [(i, index[i]) for i in of_size.tolist()]
            return {_mask_key(e.sha256, e.mask_sha256): i for i, e in entries if e.mask_sha256 is not None}

        metadata = {
            "the size": list(size),
            "the autoencoder's factor": factor,
            "data.crop": sorted({crop for crop, _ in variants}),
            "data.flip": any(flip for _, flip in variants),
        }

        def encode(indices: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
            chosen = np.array(list(entry_of().values()), int)[indices]
            for masks in CropDataset(index, chosen, size, variants, factor).batches(options.workers):
                yield {"mask": masks}

        store = EncodingStore(options.folder / "masks", metadata)
        return EncodingJob(store, index.name, lambda: np.array(list(entry_of()), "S32"), encode)

    return {size: job(size) for size in index.sizes.used()}


def _mask_key(sha256: bytes, mask_sha256: bytes | None) -> bytes:
    """Random crops follow from the image, so that images can't share a mask's entry."""
    assert mask_sha256, "an image with a mask"
    return hashlib.sha256(sha256 + mask_sha256).digest()


def _caption_job(index: Index, options: CacheOptions, text: AnyTextEncoder) -> EncodingJob:
    """The job of all distinct captions."""
    dtype, captions = getattr(torch, options.dtype), functools.cache(lambda: DistinctCaptions(index))

    def encode(indices: np.ndarray) -> Iterator[dict[str, torch.Tensor]]:
        for start in range(0, len(indices), 2 * BATCH):
            batch = captions().texts(indices[start : start + 2 * BATCH])
            embedding = text.embed(batch).map(lambda tensor: tensor.to("cpu", dtype))
            yield {"text": embedding.states} | ({} if embedding.pooled is None else {"pooled": embedding.pooled})

    metadata = {"the text encoder": text.fingerprint(), "data.cache_dtype": options.dtype}
    return EncodingJob(EncodingStore(options.folder / "text", metadata), index.name, captions, encode)


class DistinctCaptions:
    """The distinct captions of an index in the order of their first occurrence, and their keys."""

    def __init__(self, index: Index):
        self.index = index
        first = functools.cache(self._first_occurrences)
        self._entries, self._numbers = (
            index.columns.array(name, index.name, lambda i=i: first()[i])  # type: ignore[misc]
            for i, name in enumerate(("caption-entries", "caption-numbers"))
        )

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, indices: np.ndarray) -> np.ndarray:
        return np.frombuffer(b"".join(map(_caption_key, self.texts(indices))), "S32")

    def texts(self, indices: np.ndarray) -> list[str]:
        """The captions at some indices."""
        captions = self.index.captions(self._entries[indices])
        return [of_entry[number] for of_entry, number in zip(captions, self._numbers[indices].tolist(), strict=True)]

    def _first_occurrences(self) -> tuple[np.ndarray, np.ndarray]:
        """The entry that each distinct caption comes first in, and its number among that entry's captions."""
        counts = self.index.caption_counts()
        ends = np.cumsum(counts)
        keys, start = np.empty(ends[-1], "S16"), 0  # half a hash is enough to tell captions apart
        captions = itertools.chain.from_iterable(self.index.captions())
        while part := list(itertools.islice(captions, BLOCK)):
            keys[start : start + len(part)] = np.frombuffer(b"".join(_caption_key(c)[:16] for c in part), "S16")
            start += len(part)
        first = first_occurrences(keys)
        entries = np.searchsorted(ends, first, side="right")
        return entries.astype(self.index.rows.dtype), (first - (ends - counts)[entries]).astype(np.uint32)


def _caption_key(caption: str) -> bytes:
    return hashlib.sha256(caption.encode()).digest()
