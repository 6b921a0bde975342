"""`data`: which images and captions, and how they are read, cropped, held out and cached."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from ldm.config.schema.base import Section


class SourceConfig(Section):
    path: str
    """A folder, tars, parquet, kohya's TOML, an id of the Hub, `openmoji-demo` or `openmoji-all`."""
    kind: Literal[
        "auto", "openmoji", "metadata", "sidecars", "classes", "pictures", "tar", "parquet", "datasets", "kohya"
    ] = "auto"
    """What the path is; `auto` looks."""
    caption_column: str = "text"
    """Column, or key of a JSON, with the caption or a list of them."""
    label: str = "label"
    """Column, or key of a JSON, with the class, a string or an integer; read where `stage2.conditions` has `class`."""
    image: str = "image"
    """Column with the picture, of parquet and `datasets`."""
    lines: bool = False
    """Each line of a caption file is a caption of its own."""
    template: str = "{}"
    """Caption of a class folder's pictures: `a photo of a {}`."""
    split: str = "train"
    """Split of a data set of `datasets`."""
    repeats: PositiveInt = 1
    """Times that each picture comes in an epoch."""
    weight: float | None = Field(default=None, gt=0)
    """Share of an epoch beside the other sources' weights; default: its number of pictures."""


class BucketConfig(Section):
    step: PositiveInt = 64
    """Sides are multiples of it."""
    smallest: PositiveInt | None = None
    """Shortest side of a bucket; default: half of `data.size`."""
    largest: PositiveInt | None = None
    """Longest side of a bucket; default: twice `data.size`."""
    upscale: bool = True
    """Enlarges pictures that are smaller than their bucket; otherwise they get a smaller one."""


def as_sources(value: Any) -> Any:
    values = value if isinstance(value, list) else [value]
    values = [{"path": str(each)} if isinstance(each, (str, int, float)) else each for each in values]
    for each in values:
        if isinstance(each, dict) and isinstance(each.get("path"), str) and each["path"].startswith("~"):
            each["path"] = str(Path(each["path"]).expanduser())
    return values


class DataConfig(Section):
    source: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources), Field(min_length=1, strict=False)]
    """A path or id, a section with `path` and how to read it, or a list of these."""
    size: PositiveInt
    """Side of the square pictures, in pixels; with buckets, the square root of their area."""
    buckets: BucketConfig | None = None
    """Sorts pictures into batches by aspect ratio, so that little is cropped; default: squares."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept of what does not fit."""
    crops: PositiveInt = 4
    """Random crops cached of each picture; without a cache, and in stage one, every draw is a fresh one."""
    flip: bool = False
    """Mirrors half of the samples."""
    background: str = "white"
    """Colour behind transparent pictures."""
    min_side: PositiveInt = 8
    """Pictures with a side of fewer pixels are bad."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Share of the pictures that nothing is trained on, for measuring; which ones follows from their files' content."""
    on_error: Literal["skip", "stop"] = "skip"
    """What bad pictures and captions do: they are left out, or nothing is trained."""
    max_bad: float = Field(default=0.05, ge=0, le=1)
    """Share of bad ones beyond which `skip` stops too."""
    streaming: bool = False
    """Reads tars, parquet and `datasets` shard by shard, with no index and no cache: for more than a disk holds."""
    cache: Literal["disk", "none"] = "disk"
    """Latents and embeddings are encoded once and kept, or encoded for every batch."""
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """What the cache stores."""
    latents: Literal["sample", "mean"] = "sample"
    """Each draw is a fresh sample of the autoencoder's posterior, or its mean."""
    cache_dir: Path | None = None
    """Where indices, latents and embeddings are kept, for several runs too; default: `cache` in the run's folder."""
    workers: int = Field(default=0, ge=0)
    """Loader processes per training process."""

    @property
    def name(self) -> str:
        return ", ".join(source.path for source in self.source)

    @property
    def shortest(self) -> int:
        """The shortest side that a picture may have, in pixels."""
        return (self.buckets.smallest or self.size // 2) if self.buckets else self.size
