"""The training samples by position: which image, which crop of it, mirrored or not, with which caption.

Everything is drawn from (seed, position), so samples are the same for any number of processes and loader workers, and
for cached latents as for latents encoded on the fly.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from accelerate.utils import send_to_device
from PIL import Image, ImageOps

from ldm.data import cache
from ldm.data.cache import Cache, CacheOptions
from ldm.data.crops import Crop, crop_resize
from ldm.data.draws import Draw, LatentNoise, draw_batch, with_draws
from ldm.data.images import Size, to_tensor
from ldm.data.index import Index
from ldm.data.masks import latent_mask
from ldm.data.page_cache import Lookup, look_up
from ldm.data.records import PRIOR, SampleFields
from ldm.data.sampler import Order, SampleSpec
from ldm.data.stream import Stream
from ldm.distributed.launch import DataLoader
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import TextEmbedding
from ldm.models.text_encoder import AnyTextEncoder
from ldm.utils.rng import generator, normal

Item = dict[str, Any]


class PlannedSample(NamedTuple):
    """What is drawn for one position of a run."""

    number: int  # of the entry
    entry: SampleFields
    crop: Crop
    caption: str


class SamplePlan:
    """The samples of a run by position, before any image is read."""

    def __init__(self, index: Index, spec: SampleSpec):
        self.index, self.spec, self.sizes = index, spec, index.sizes
        draws = index.draws()
        self.order = Order.of(draws, spec.seed, spec.batch)
        self.has_prior = any(kind.prior for kind in draws.draws)
        self.classes = {label: number for number, label in enumerate(index.labels())}
        self._ahead: dict[int, PlannedSample] = {}  # that were read ahead, until they are asked for

    def __getitem__(self, n: int) -> PlannedSample:
        return self._ahead.pop(n, None) or self._plan(n)

    def read_ahead(self, positions: Sequence[int]) -> list[PlannedSample]:
        """The samples at these positions; what they need of the index, but where images lie, is read all at once."""
        look_up(map(self._lookup, positions))
        samples = [self._plan(n) for n in positions]
        self._ahead.update(zip(positions, samples, strict=True))
        return samples

    def _lookup(self, n: int) -> Lookup[None]:
        number = yield from self.order.lookup(n)
        yield from self.index.lookup(number)

    def _plan(self, n: int) -> PlannedSample:
        number, seed, augmentation = self.order[n], self.spec.seed, self.spec.augmentation
        entry = self.index.sample_fields(number)
        count = len(entry.captions)
        caption = entry.captions[int(generator(seed, "caption", n).integers(count)) if count > 1 else 0]
        may_flip = augmentation.flip if entry.flip is None else entry.flip
        flip = may_flip and bool(generator(seed, "flip", n).random() < 0.5)
        crops = augmentation.crops
        crop = -1 if crops is None else int(generator(seed, "crop", n).integers(crops))
        return PlannedSample(number, entry, Crop(self.sizes[number], crop, flip), caption)

    def pixels(self, n: int, sample: PlannedSample) -> tuple[torch.Tensor, Size]:
        """The image of a sample, `(3, H, W)` in [-1, 1], and the crop's left and top in the resized image.

        Random crops differ at each position; only the cache is limited to a few of each image.
        """
        cropped, corner = self._cropped(n, sample, self.index.load_image(sample.number))
        return to_tensor(cropped), corner

    def _cropped(self, n: int, sample: PlannedSample, image: Image.Image) -> tuple[Image.Image, Size]:
        """The crop of a sample's image, or of its mask, and its left and top."""
        crop, sha256 = sample.crop, sample.entry.sha256
        if crop.number < 0:
            return crop.apply(image, sha256), crop.corner(image.size, sha256)
        u, v = generator(self.spec.seed, "corner", n).random(2)
        if crop.flip:
            image = ImageOps.mirror(image)
        return crop_resize(image, crop.size, float(u), float(v))

    def mask(self, n: int, sample: PlannedSample, factor: int) -> torch.Tensor | None:
        """The mask of a sample at the size of its latent, `(1, H / factor, W / factor)` in [0, 1], if it has one."""
        mask = self.index.load_mask(sample.number)
        return None if mask is None else latent_mask(self._cropped(n, sample, mask)[0], factor)

    def conditions(self, n: int, sample: PlannedSample) -> Item:
        """Position, original width and height, class, the dropout of the conditions, and, where there are some,
        whether it is an image of the class for prior preservation."""
        dropout = self.spec.cond_dropout if sample.entry.dropout is None else sample.entry.dropout
        prior = {"prior": torch.tensor(sample.entry.split == PRIOR)} if self.has_prior else {}
        return {
            **prior,
            "position": torch.tensor(n),
            "dropout": torch.tensor(dropout),
            "original_size": torch.tensor((sample.entry.width, sample.entry.height)),
            "class": torch.tensor(self.classes.get(sample.entry.label, -1)),
        }


def masked(mask: torch.Tensor | None, shape: Sequence[int]) -> Item:
    """What a sample says of its mask, `(1, h, w)`: white where it has none, so that all of the image is learned."""
    return {"mask": torch.ones(1, *shape) if mask is None else mask, "masked": torch.tensor(mask is not None)}


class ImageDataset(torch.utils.data.Dataset[Item]):
    """Images by position: item n is `{"position": n, "pixels": (3, H, W), "caption": …, "crop": (left, top), …}`.

    With `mask_factor`, where any image has a mask, also `{"mask": (1, H / mask_factor, W / mask_factor), …}`.
    """

    def __init__(self, index: Index, spec: SampleSpec, mask_factor: int = 0):
        self.plan, self.mask_factor = SamplePlan(index, spec), mask_factor if index.has_masks else 0

    def read_ahead(self, positions: Sequence[int]) -> None:
        self.plan.read_ahead(positions)

    def __getitem__(self, n: int) -> Item:
        sample = self.plan[n]
        pixels, corner = self.plan.pixels(n, sample)
        item = {**self.plan.conditions(n, sample), "pixels": pixels, "crop": torch.tensor(corner)}
        if factor := self.mask_factor:
            height, width = pixels.shape[1:]
            item |= masked(self.plan.mask(n, sample, factor), (height // factor, width // factor))
        return {**item, "caption": sample.caption}


def sample_names(data: Index | Stream, spec: SampleSpec) -> Callable[[int], str]:
    """Names the sample at a position in messages."""
    if isinstance(data, Stream):
        return "sample {}".format
    plan = functools.cache(lambda: SamplePlan(data, spec))  # made when a name is first needed
    return lambda n: f"sample {n}, {data[plan()[n].number].key}"


def stage1_dataset(data: Index | Stream, spec: SampleSpec) -> ImageDataset | Stream:
    """The samples of stage one: images."""
    return data.with_spec(spec) if isinstance(data, Stream) else ImageDataset(data, spec)


def iter_images(
    data: Index | Stream, batch: int = 64, rank: int = 0, processes: int = 1, workers: int = 0
) -> Iterator[torch.Tensor]:
    """Every image once, centre cropped, in batches of one size, `(N, 3, H, W)`; of a stream, the first ones.

    Each process gets an equal share of the images, or one fewer. Loader processes, `workers`, read the images of an
    index; batches are the same for any number of them.
    """
    if isinstance(data, Stream):
        yield from itertools.islice(data.iter_images(batch), rank, None, processes)
        return
    batches: list[list[int]] = []
    dealt = 0  # over all sizes, so that sizes of few images do not all go to process 0
    for entries in data.by_size().values():
        share = entries[(rank - dealt) % processes :: processes].tolist()
        batches += [share[start : start + batch] for start in range(0, len(share), batch)]
        dealt += len(entries)
    order = [i for numbers in batches for i in numbers]
    if not order:
        return
    loader = DataLoader[torch.Tensor](
        _CenterCropDataset(data),
        batch_size=None,
        sampler=order,
        num_workers=min(workers, len(order)),
        generator=torch.Generator(),  # its own, because it draws the workers' seeds
    )
    images = iter(loader)
    for numbers in batches:
        yield torch.stack(list(itertools.islice(images, len(numbers))))


class _CenterCropDataset(torch.utils.data.Dataset[torch.Tensor]):
    def __init__(self, index: Index):
        self.index, self.sizes = index, index.sizes

    def __getitem__(self, i: int) -> torch.Tensor:
        return Crop(self.sizes[i]).pixels(self.index.load_image(i), b"")


# ------------------------------------------------------------------------------------------------- samples of stage two


class Stage2Dataset(NamedTuple):
    """The samples of stage two: a data set, and the function that encodes its batches.

        for batch in run.batches(samples.dataset):
            x0, text = samples.encode(batch)

    Latents are `(N, C, h, w)`; they and the embeddings are float32 on the device. Without a frozen text encoder,
    embeddings are None, and the captions are in `batch["caption"]`.
    """

    dataset: torch.utils.data.Dataset[Item] | Stream
    encode: Callable[[Item], tuple[torch.Tensor, TextEmbedding | None]]


def stage2_dataset(
    data: Index | Stream,
    spec: SampleSpec,
    cache_options: CacheOptions | None,
    autoencoder: Autoencoder,
    text: AnyTextEncoder | None,
    device: torch.device,
    with_pixels: bool = False,
    with_masks: bool = False,
) -> Stage2Dataset:
    """Latents and embeddings from the cache, which is completed first, or, without one, encoded batch by batch.

    `text` is None where captions are not read, or where their encoder is trained. Samples have `pixels` where there is
    no cache, or with `with_pixels`, which a model needs that is conditioned on an image. With `with_masks`, where any
    image has a mask, they have `mask` `(N, 1, h, w)` in [0, 1], and `masked` `(N,)`, whether it is the image's own.
    """
    if cache_options:
        assert isinstance(data, Index), "the configuration allows a stream no cache"
        built = cache.build(data, spec.augmentation, cache_options, autoencoder, text, with_masks=with_masks)
        dataset = _CachedDataset(data, spec, built, with_pixels)
        return Stage2Dataset(dataset, _cached)

    def encode(batch: Item) -> tuple[torch.Tensor, TextEmbedding | None]:
        mean, logvar = autoencoder.moments(batch["pixels"])
        if spec.latents == "sample":
            mean = mean + (0.5 * logvar).exp() * batch["latent_noise"]
        return mean, text.embed(batch["caption"]) if text else None

    if isinstance(data, Stream):
        images: torch.utils.data.Dataset[Item] | Stream = data.with_spec(spec)
    else:
        images = ImageDataset(data, spec, autoencoder.factor if with_masks else 0)
    if spec.latents == "sample":
        noise = LatentNoise("latent_noise", spec.seed, "latent", autoencoder.channels, autoencoder.factor)
        images = with_draws(images, noise)
    return Stage2Dataset(images, encode)


def _cached(batch: Item) -> tuple[torch.Tensor, TextEmbedding | None]:
    states = batch.get("text")
    return batch["latent"], None if states is None else TextEmbedding(states, batch.get("pooled"))


class _CachedDataset(torch.utils.data.Dataset[Item]):
    def __init__(self, index: Index, spec: SampleSpec, cache: Cache, with_pixels: bool):
        self.plan, self.cache, self.with_pixels = SamplePlan(index, spec), cache, with_pixels

    def read_ahead(self, positions: Sequence[int]) -> None:
        samples = self.plan.read_ahead(positions)
        self.cache.read_ahead([(sample.crop, sample.entry.sha256, sample.caption) for sample in samples])

    def __getitem__(self, n: int) -> Item:
        sample, spec = self.plan[n], self.plan.spec
        crop, sha256 = sample.crop, sample.entry.sha256
        mean, logvar = self.cache.latent(crop, sha256)
        if spec.latents == "sample":
            mean = mean + (0.5 * logvar).exp() * normal(spec.seed, "latent", [n], mean.shape)[0]
        corner = crop.corner((sample.entry.width, sample.entry.height), sha256)
        item = {**self.plan.conditions(n, sample), "crop": torch.tensor(corner), "latent": mean}
        if self.cache.text:
            item |= self.cache.embedding(sample.caption)
        else:
            item["caption"] = sample.caption
        if self.cache.masks:
            mask = None if sample.entry.mask_sha256 is None else self.cache.mask(crop, sample.entry)
            item |= masked(mask, mean.shape[1:])
        if self.with_pixels:
            item["pixels"] = crop.pixels(self.plan.index.load_image(sample.number), sha256)
        return item


# --------------------------------------------------------------------------------------------------------- evaluation


class EvaluationBatch(NamedTuple):
    """A batch to evaluate on: its items as of a data set, and the posterior of its latents, `(N, C, h, w)` each.

    `text` is None without a text encoder.
    """

    batch: Item
    mean: torch.Tensor
    log_variance: torch.Tensor
    text: TextEmbedding | None


def evaluation_batch(
    index: Index,
    numbers: Sequence[int],
    autoencoder: Autoencoder,
    text: AnyTextEncoder | None,
    classes: Sequence[str],
    device: torch.device,
    draws: Sequence[Draw] = (),
) -> EvaluationBatch:
    """Entries of an index without randomness: centre crops, the first caption, no condition dropped.

    Their numbers are their positions, from which the noise of an evaluation follows. `classes` are the model's; an
    entry of another class has class -1. Where any image has a mask, they have a `mask` as in training. They have what
    `draws` draw. Everything but the positions is on the device.
    """
    square, entries = (index.data.size, index.data.size), [index[i] for i in numbers]
    cropped = [crop_resize(index.load_image(i), square) for i in numbers]
    class_numbers = {label: number for number, label in enumerate(classes)}
    batch: Item = {
        "position": torch.tensor(list(numbers)),
        "pixels": torch.stack([to_tensor(image) for image, _ in cropped]),
        "dropout": torch.zeros(len(entries)),
        "class": torch.tensor([class_numbers.get(entry.label, -1) for entry in entries]),
        "original_size": torch.tensor([(entry.width, entry.height) for entry in entries]),
        "crop": torch.tensor([corner for _, corner in cropped]),
    }
    if index.has_masks:
        white = Image.new("L", square, 255)
        masks = [crop_resize(index.load_mask(i) or white, square)[0] for i in numbers]
        batch["mask"] = torch.stack([latent_mask(mask, autoencoder.factor) for mask in masks])
    batch = draw_batch(batch, *draws)
    position = batch.pop("position")
    batch = send_to_device(batch, device)
    batch |= {"position": position, "caption": [entry.captions[0] for entry in entries]}
    embedding = text.embed(batch["caption"]) if text else None
    return EvaluationBatch(batch, *autoencoder.moments(batch["pixels"]), embedding)
