"""What a run shows at each position: which picture, cut where, mirrored or not, under which caption.

All of it is drawn from (seed, position), so it is the same for any number of processes and loader workers, and for
latents from the cache as for latents encoded on the fly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from PIL import ImageOps

from ldm.data.cache import Cache, CacheOptions, build
from ldm.data.crops import Crop, crop_resize
from ldm.data.images import Size, to_tensor
from ldm.data.index import Entry, Index
from ldm.data.sampler import Order, SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.launch import leave_signals_to_parent
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.utils.rng import generator, normal

Item = dict[str, Any]


class PlannedSample(NamedTuple):
    """What is shown at one position of a run."""

    number: int  # of the entry
    entry: Entry
    crop: Crop
    caption: str


class SamplePlan:
    """The samples of a run by position, before any image is read."""

    def __init__(self, index: Index, spec: SampleSpec):
        self.index, self.spec, self.sizes = index, spec, index.sizes
        self.order = Order(index.weights(), spec.seed, spec.batch, self.sizes, index.column("repeats"))
        self.classes = {label: number for number, label in enumerate(index.labels())}

    def __getitem__(self, n: int) -> PlannedSample:
        number, seed, varied = self.order[n], self.spec.seed, self.spec.augmentation
        entry = self.index[number]
        caption = entry.captions[int(generator(seed, "caption", n).integers(len(entry.captions)))]
        mirrored = varied.flip if entry.flip is None else entry.flip
        flip = mirrored and bool(generator(seed, "flip", n).random() < 0.5)
        crop = -1 if varied.crops is None else int(generator(seed, "crop", n).integers(varied.crops))
        return PlannedSample(number, entry, Crop(self.sizes[number], crop, flip), caption)

    def pixels(self, n: int, sample: PlannedSample) -> tuple[torch.Tensor, Size]:
        """The image of a sample, `(3, H, W)` in [-1, 1], and the crop's left and top in the resized image.

        A random crop lies somewhere else at each position; only the cache has few of them.
        """
        image, crop, sha256 = self.index.picture(sample.number), sample.crop, sample.entry.sha256
        if crop.number < 0:
            return crop.pixels(image, sha256), crop.corner(image.size, sha256)
        u, v = generator(self.spec.seed, "corner", n).random(2)
        if crop.flip:
            image = ImageOps.mirror(image)
        part, corner = crop_resize(image, crop.size, float(u), float(v))
        return to_tensor(part), corner

    def facts(self, n: int, sample: PlannedSample) -> Item:
        """What else a model may be told: position, original width and height, class; and its caption's dropout."""
        dropout = self.spec.cond_dropout if sample.entry.dropout is None else sample.entry.dropout
        return {
            "position": torch.tensor(n),
            "dropout": torch.tensor(dropout),
            "original_size": torch.tensor((sample.entry.width, sample.entry.height)),
            "class": torch.tensor(self.classes.get(sample.entry.label, -1)),
        }


class ImageDataset(torch.utils.data.Dataset[Item]):
    """Images by position: item n is `{"position": n, "pixels": (3, H, W), "caption": …, "crop": (left, top), …}`."""

    def __init__(self, index: Index, spec: SampleSpec):
        self.plan = SamplePlan(index, spec)

    def __getitem__(self, n: int) -> Item:
        sample = self.plan[n]
        pixels, corner = self.plan.pixels(n, sample)
        return {
            **self.plan.facts(n, sample), "pixels": pixels, "caption": sample.caption, "crop": torch.tensor(corner),
        }  # fmt: skip


def sample_names(data: Index | Stream, spec: SampleSpec) -> Callable[[int], str]:
    """What to call the sample at a position, for people."""
    if isinstance(data, Stream):
        return "sample {}".format
    plan = cache(lambda: SamplePlan(data, spec))  # made when it is asked for
    return lambda n: f"sample {n}, {plan()[n].entry.key}"


def stage1_dataset(data: Index | Stream, spec: SampleSpec) -> ImageDataset | Stream:
    """The samples of stage one: images."""
    return data.sampled(spec) if isinstance(data, Stream) else ImageDataset(data, spec)


def iter_images(
    data: Index | Stream, batch: int = 64, rank: int = 0, processes: int = 1, workers: int = 0
) -> Iterator[torch.Tensor]:
    """Every picture once, centre cropped, in batches of one size, `(N, 3, H, W)`; of a stream, the first ones.

    Each of several processes gets its share of them, as many as any other, or one fewer. Pictures are read by as many
    `workers`, a stream's here; batches are the same for any number.
    """
    if isinstance(data, Stream):
        yield from itertools.islice(data.iter_images(batch), rank, None, processes)
        return
    parts: list[list[int]] = []
    dealt = 0  # like cards, one size after the other, so that sizes of few pictures don't all go to the first process
    for all_of_it in data.by_size().values():
        mine = all_of_it[(rank - dealt) % processes :: processes].tolist()
        parts += [mine[start : start + batch] for start in range(0, len(mine), batch)]
        dealt += len(all_of_it)
    order = [i for part in parts for i in part]
    if not order:
        return
    read = iter(
        torch.utils.data.DataLoader(
            _Cropped(data), batch_size=None, sampler=order, num_workers=min(workers, len(order)),
            worker_init_fn=leave_signals_to_parent, generator=torch.Generator(),  # its own: it draws seeds of workers
        )
    )  # fmt: skip
    for part in parts:
        yield torch.stack(list(itertools.islice(read, len(part))))


class _Cropped(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, index: Index):
        self.index, self.sizes = index, index.sizes

    def __getitem__(self, i: int) -> torch.Tensor:
        return Crop(self.sizes[i]).pixels(self.index.picture(i), b"")


# --------------------------------------------------------------------------------------------- the samples of stage two


class Stage2Dataset(NamedTuple):
    """The samples of stage two: a data set, and what makes latents and embeddings of its batches.

        for batch in run.batches(samples.dataset):
            x0, text = samples.encode(batch)

    Latents are `(N, C, h, w)`, embeddings `(N, T, D)`, both float32 on the device. Embeddings are None where there is
    no frozen text encoder; captions are in `batch["caption"]` then.
    """

    dataset: torch.utils.data.Dataset[Item] | Stream
    encode: Callable[[Item], tuple[torch.Tensor, torch.Tensor | None]]


def stage2_dataset(
    data: Index | Stream, spec: SampleSpec, cache: CacheOptions | None, autoencoder: Autoencoder,
    text: TextEncoder | None, device: torch.device, with_pixels: bool = False,
) -> Stage2Dataset:  # fmt: skip
    """Latents and embeddings from the cache, which is filled first, or without one encoded for each batch.

    `text` is None where captions are not read, or by an encoder that is trained. Samples have their `pixels` too where
    there is no cache or `with_pixels` asks for them, as a model does that is conditioned on an image.
    """
    if cache:
        assert isinstance(data, Index), "the configuration allows a stream no cache"
        kept = build(data, spec.augmentation, cache, autoencoder, text)
        return Stage2Dataset(
            _CachedDataset(data, spec, kept, with_pixels), lambda batch: (batch["latent"], batch.get("text"))
        )

    def encode(batch: Item) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, logvar = autoencoder.moments(batch["pixels"])
        if spec.latents == "sample":
            eps = normal(spec.seed, "latent", batch["position"], mean.shape[1:]).to(device)
            mean = mean + (0.5 * logvar).exp() * eps
        return mean, text.encode(batch["caption"]) if text else None

    return Stage2Dataset(data.sampled(spec) if isinstance(data, Stream) else ImageDataset(data, spec), encode)


class _CachedDataset(torch.utils.data.Dataset[Item]):
    def __init__(self, index: Index, spec: SampleSpec, cache: Cache, with_pixels: bool):
        self.plan, self.cache, self.with_pixels = SamplePlan(index, spec), cache, with_pixels

    def __getitem__(self, n: int) -> Item:
        sample, spec = self.plan[n], self.plan.spec
        crop, sha256 = sample.crop, sample.entry.sha256
        mean, logvar = self.cache.latent(crop, sha256)
        if spec.latents == "sample":
            mean = mean + (0.5 * logvar).exp() * normal(spec.seed, "latent", [n], mean.shape)[0]
        corner = crop.corner((sample.entry.width, sample.entry.height), sha256)
        item = {**self.plan.facts(n, sample), "crop": torch.tensor(corner), "latent": mean}
        if self.cache.text:
            item["text"] = self.cache.embedding(sample.caption)
        else:
            item["caption"] = sample.caption
        if self.with_pixels:
            item["pixels"] = crop.pixels(self.plan.index.picture(sample.number), sha256)
        return item


# ------------------------------------------------------------------------------------------------- what is measured on


class EvaluationBatch(NamedTuple):
    """A batch to measure on, `batch` as a data set gives it, with the posterior of its latents, `(N, C, h, w)` each.

    `text` `(N, T, D)` is None where no text encoder was given.
    """

    batch: Item
    mean: torch.Tensor
    log_variance: torch.Tensor
    text: torch.Tensor | None


def evaluation_batch(
    index: Index, numbers: Sequence[int], autoencoder: Autoencoder, text: TextEncoder | None, classes: Sequence[str],
    device: torch.device,
) -> EvaluationBatch:  # fmt: skip
    """Entries of an index, always the same way: squares about the centre, the first caption, no condition dropped.

    Their numbers are their positions, from which a measurement's noise follows. `classes` are the model's; an entry of
    none of them has class -1. All but the positions is on the device.
    """
    square, entries = (index.data.size, index.data.size), [index[i] for i in numbers]
    cropped = [crop_resize(index.picture(i), square) for i in numbers]
    known = {label: number for number, label in enumerate(classes)}
    batch: Item = {
        "pixels": torch.stack([to_tensor(image) for image, _ in cropped]),
        "dropout": torch.zeros(len(entries)),
        "class": torch.tensor([known.get(entry.label, -1) for entry in entries]),
        "original_size": torch.tensor([(entry.width, entry.height) for entry in entries]),
        "crop": torch.tensor([corner for _, corner in cropped]),
    }
    batch = {
        "position": torch.tensor(list(numbers)), "caption": [entry.captions[0] for entry in entries],
        **send_to_device(batch, device),
    }  # fmt: skip
    states = text.encode(batch["caption"]) if text else None
    return EvaluationBatch(batch, *autoencoder.moments(batch["pixels"]), states)
