"""The index, data sets and cache that a configuration describes."""

from __future__ import annotations

from pathlib import Path

from ldm.config.schema import Config
from ldm.data import cache, index, openmoji
from ldm.data.cache import Cache, CacheOptions
from ldm.data.dataset import ImageDataset
from ldm.data.index import Index
from ldm.data.sampler import SampleSpec
from ldm.data.stream import Stream
from ldm.models.autoencoder import Autoencoder
from ldm.models.text_encoder import TextEncoder

EVERY = ("text", "class")  # conditions whose index suits all others, where every image has a caption and a class
_EMBEDDED: dict[tuple[str, Path], Index] = {}


def indexed(config: Config) -> Index:
    return index.build(config.data, config.cache_dir, config.stage2.conditions)


def indexed_once(config: Config) -> Index:
    """The same for the embedded drawings, which don't change, is built once a process for all conditions."""
    if any(source.path not in openmoji.SUBSETS for source in config.data.source):
        return indexed(config)
    read = {key: getattr(config.data, key) for key in ("source", "size", "background", "min_side", "val_fraction")}
    key = repr(read), config.cache_dir
    if key not in _EMBEDDED:
        _EMBEDDED[key] = index.build(config.data, config.cache_dir, EVERY)
    built = _EMBEDDED[key]
    return Index(built.table, built.sources, config.data, built.rows)


def spec_of(config: Config, batch: int | None = None) -> SampleSpec:
    return SampleSpec.of(config.data, batch or config.stage2.batch, config.run.seed, config.stage2.cond_dropout)


def images_of(index: Index, config: Config, batch: int) -> ImageDataset:
    return ImageDataset(index, spec_of(config, batch))


def streamed(config: Config) -> Stream:
    stream = Stream(config.data, config.cache_dir, config.run.dir / "data-report.jsonl", config.stage2.conditions)
    return stream.with_spec(spec_of(config))


def cached(
    index: Index, config: Config, autoencoder: Autoencoder, text: TextEncoder | None, per_file: int = cache.PER_FILE
) -> Cache:
    options = CacheOptions.of(config.data, config.cache_dir)
    assert options, "settings without a cache"
    return cache.build(index, spec_of(config).augmentation, options, autoencoder, text, per_file)
