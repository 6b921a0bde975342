"""Random numbers that a training step needs, drawn by position with its samples, in the loader's workers.

So the main process neither draws nor copies them while a GPU waits: they arrive with the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.utils.data import Dataset, default_collate

from ldm.data import read_ahead
from ldm.utils.rng import normal

if TYPE_CHECKING:
    from ldm.data.stream import Stream

Item = dict[str, Any]
Draw = Callable[[int, Item], Item]
"""What is drawn for the item at a position of the run, from seed and position alone; loader processes get a copy."""


def with_drawn(item: Item, n: int, draws: Sequence[Draw]) -> Item:
    """The item at position n with what each of `draws` draws for it."""
    for draw in draws:
        item = item | draw(n, item)
    return item


class _DrawingDataset(Dataset[Item]):
    def __init__(self, dataset: Dataset[Item], draws: tuple[Draw, ...]):
        self.dataset, self.draws = dataset, draws

    def read_ahead(self, positions: Sequence[int]) -> None:
        read_ahead.start_reading(self.dataset, positions)

    def __getitem__(self, n: int) -> Item:
        return with_drawn(self.dataset[n], n, self.draws)


def with_draws(dataset: Dataset[Item] | Stream, *draws: Draw) -> Dataset[Item] | Stream:
    """The data set with what each of `draws` draws as a part of its items."""
    return _DrawingDataset(dataset, draws) if isinstance(dataset, Dataset) else dataset.with_draws(*draws)


def draw_batch(batch: Item, *draws: Draw) -> Item:
    """A batch that no loader made, with what `draws` draw for its items; its tensors are on the CPU."""
    items = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["position"]))]
    complete = (with_drawn(item, int(item["position"]), draws) for item in items)
    drawn = default_collate([{key: value for key, value in item.items() if key not in batch} for item in complete])
    return {**batch, **drawn}


@dataclass(frozen=True)
class LatentNoise:
    """Draws `key`: standard normal noise `(C, h, w)` of a latent, of the random numbers named `stream`."""

    key: str
    seed: int
    stream: str
    channels: int
    factor: int

    def __call__(self, n: int, item: Item) -> Item:
        return {self.key: normal(self.seed, self.stream, [n], latent_shape(item, self.channels, self.factor))[0]}


def latent_shape(item: Item, channels: int, factor: int) -> tuple[int, ...]:
    """The shape of an item's latent, `(C, h, w)`, which the item has, or which an autoencoder will make of it."""
    if "latent" in item:
        return tuple(item["latent"].shape)
    height, width = item["pixels"].shape[1:]
    return channels, height // factor, width // factor
