"""What a run shows at each position: which picture, cut where, mirrored or not, under which caption.

All of it is drawn from (seed, position), so it is the same for any number of processes and loader workers, and for
latents from the cache as for latents encoded on the fly.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from PIL import ImageOps

from ldm.config.schema import Config
from ldm.data.cache import Cache, View, build
from ldm.data.images import Size, cut, to_tensor
from ldm.data.index import Entry, Index
from ldm.data.sampler import Order
from ldm.data.stream import Stream
from ldm.distributed.launch import leave_signals_to_parent
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import TextEncoder
from ldm.utils.rng import generator, normal

Item = dict[str, Any]


class Draw(NamedTuple):
    """One position of a run."""

    number: int  # of the entry
    entry: Entry
    view: View
    caption: str


class Draws:
    """The draws of a run by position."""

    def __init__(self, index: Index, config: Config, batch: int):
        self.index, self.data, self.seed = index, config.data, config.run.seed
        self.dropout = config.stage2.cond_dropout
        self.sizes = index.sizes
        self.order = Order(index.weights(), self.seed, batch, self.sizes, index.column("repeats"))
        self.classes = {label: number for number, label in enumerate(index.labels())}

    def __getitem__(self, n: int) -> Draw:
        number = self.order[n]
        entry, data = self.index[number], self.data
        choice = int(generator(self.seed, "caption", n).integers(len(entry.captions)))
        mirrored = data.flip if entry.flip is None else entry.flip
        flip = mirrored and bool(generator(self.seed, "flip", n).random() < 0.5)
        crop = int(generator(self.seed, "crop", n).integers(data.crops)) if data.crop == "random" else -1
        return Draw(number, entry, View(self.sizes[number], crop, flip), entry.captions[choice])

    def pixels(self, n: int, draw: Draw) -> tuple[torch.Tensor, Size]:
        """The picture of a draw, `(3, H, W)` in [-1, 1], and the crop's left and top in the resized picture.

        Each draw of a random crop lies somewhere else; only the cache has few of them.
        """
        picture, view, sha256 = self.index.picture(draw.number), draw.view, draw.entry.sha256
        if view.crop < 0:
            return view.cut(picture, sha256), view.at(picture.size, sha256)
        u, v = generator(self.seed, "corner", n).random(2)
        if view.flip:
            picture = ImageOps.mirror(picture)
        part, at = cut(picture, view.size, float(u), float(v))
        return to_tensor(part), at

    def facts(self, n: int, draw: Draw) -> Item:
        """What else a model may be told: position, original width and height, class; and its caption's dropout."""
        dropout = self.dropout if draw.entry.dropout is None else draw.entry.dropout
        return {
            "position": torch.tensor(n),
            "dropout": torch.tensor(dropout),
            "original_size": torch.tensor((draw.entry.width, draw.entry.height)),
            "class": torch.tensor(self.classes.get(draw.entry.label, -1)),
        }


class Pictures(torch.utils.data.Dataset[Item]):
    """Pictures by position: item n is `{"position": n, "pixels": (3, H, W), "caption": …, "crop": (left, top), …}`."""

    def __init__(self, index: Index, config: Config, batch: int):
        self.draws = Draws(index, config, batch)

    def __getitem__(self, n: int) -> Item:
        draw = self.draws[n]
        pixels, at = self.draws.pixels(n, draw)
        return {**self.draws.facts(n, draw), "pixels": pixels, "caption": draw.caption, "crop": torch.tensor(at)}


def named(data: Index | Stream, config: Config, batch: int) -> Callable[[int], str]:
    """What to call the sample at a position, for people."""
    if isinstance(data, Stream):
        return "sample {}".format
    draws = cache(lambda: Draws(data, config, batch))  # made when it is asked for
    return lambda n: f"sample {n}, {draws()[n].entry.key}"


def pictures(data: Index | Stream, config: Config, batch: int) -> Pictures | Stream:
    """The samples of stage one."""
    return data if isinstance(data, Stream) else Pictures(data, config, batch)


def whole(
    data: Index | Stream, batch: int = 64, rank: int = 0, processes: int = 1, workers: int = 0
) -> Iterator[torch.Tensor]:
    """Every picture once, centre cropped, in batches of one size, `(N, 3, H, W)`; of a stream, the first ones.

    Each of several processes gets its share of them, as many as any other, or one fewer. Pictures are read by as many
    `workers`, a stream's here; batches are the same for any number.
    """
    if isinstance(data, Stream):
        yield from itertools.islice(data.whole(batch), rank, None, processes)
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
        return View(self.sizes[i]).cut(self.index.picture(i), b"")


# --------------------------------------------------------------------------------------------- the samples of stage two


class Feed(NamedTuple):
    """The samples of stage two: a data set, and what makes latents and embeddings of its batches.

        for batch in run.batches(feed.dataset):
            x0, text = feed.encoded(batch)

    Latents are `(N, C, h, w)`, embeddings `(N, T, D)`, both float32 on the device. Embeddings are None where there is
    no frozen text encoder; captions are in `batch["caption"]` then.
    """

    dataset: torch.utils.data.Dataset[Item] | Stream
    encoded: Callable[[Item], tuple[torch.Tensor, torch.Tensor | None]]


def feed(
    data: Index | Stream, config: Config, autoencoder: Autoencoder, text: TextEncoder | None, device: torch.device
) -> Feed:
    """Latents and embeddings from the cache, which is filled first, or encoded for each batch (`data.cache: none`).

    `text` is None where captions are not read, or by an encoder that is trained. Where the model is conditioned on a
    picture, samples have their `pixels` too.
    """
    if config.data.cache == "disk":
        assert isinstance(data, Index), "the configuration allows a stream no cache"
        cache = build(data, config, autoencoder, text)
        return Feed(_Cached(data, config, cache), lambda batch: (batch["latent"], batch.get("text")))

    def encode(batch: Item) -> tuple[torch.Tensor, torch.Tensor | None]:
        mean, logvar = autoencoder.moments(batch["pixels"])
        if config.data.latents == "sample":
            eps = normal(config.run.seed, "latent", batch["position"], mean.shape[1:]).to(device)
            mean = mean + (0.5 * logvar).exp() * eps
        return mean, text.encode(batch["caption"]) if text else None

    dataset = data if isinstance(data, Stream) else Pictures(data, config, config.stage2.batch)
    return Feed(dataset, encode)


class _Cached(torch.utils.data.Dataset[Item]):
    def __init__(self, index: Index, config: Config, cache: Cache):
        self.draws, self.cache = Draws(index, config, config.stage2.batch), cache
        self.pixels = config.stage2.image

    def __getitem__(self, n: int) -> Item:
        draw = self.draws[n]
        mean, logvar = self.cache.latent(draw.view, draw.entry.sha256)
        if self.draws.data.latents == "sample":
            mean = mean + (0.5 * logvar).exp() * normal(self.draws.seed, "latent", [n], mean.shape)[0]
        at = draw.view.at((draw.entry.width, draw.entry.height), draw.entry.sha256)
        item = {**self.draws.facts(n, draw), "crop": torch.tensor(at), "latent": mean}
        if self.cache.text:
            item["text"] = self.cache.embedding(draw.caption)
        else:
            item["caption"] = draw.caption
        if self.pixels:
            item["pixels"] = draw.view.cut(self.draws.index.picture(draw.number), draw.entry.sha256)
        return item
