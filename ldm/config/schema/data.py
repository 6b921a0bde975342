"""`data`: images and captions, and how they are read, cropped, held out and cached."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, PositiveInt

from ldm.config.schema.base import LocalPath, PathOrId, Section


class SourceConfig(Section):
    path: PathOrId
    """A folder, tars, parquet, kohya's TOML, an id of the Hub, `openmoji-demo` or `openmoji-all`."""
    kind: Literal[
        "auto", "openmoji", "metadata", "sidecars", "classes", "images", "tar", "parquet", "datasets", "kohya"
    ] = "auto"
    """Kind of the path; `auto` detects it."""
    caption_column: str = "text"
    """Column, or key of a JSON, with the caption or a list of them."""
    label: str = "label"
    """Column, or key of a JSON, with the class, a string or an integer; read where `stage2.conditions` has `class`."""
    image: str = "image"
    """Column with the image, for parquet and `datasets`."""
    lines: bool = False
    """Each line of a caption file is a caption of its own."""
    template: str = "{}"
    """Caption of a class folder's images: `a photo of a {}`."""
    caption: str = ""
    """Caption of a folder's images that have no caption file: `a photo of sks dog`; `{}` is the file's name."""
    replace: dict[str, str] = Field(default_factory=dict)
    """Words of captions and what stands there instead, such as a word for textual inversion to learn: `{toy: <toy>}`.
    Capitals make no difference."""
    mask: PathOrId = ""
    """Masks for the loss, white where an image is learned: `alpha`, its alpha channel; a folder of files with the
    images' relative names and any suffix; or a column with them, in a metadata file their names. With a metadata file,
    a folder has a slash: `./masks`."""
    split: str = "train"
    """Split of a data set of `datasets`, or of files and folders that are named after splits."""
    repeats: PositiveInt = 1
    """How often an epoch repeats each image."""
    weight: float | None = Field(default=None, gt=0)
    """Share of an epoch, relative to the other sources' weights; default: its number of images. With `prior`, relative
    to the other sources with `prior`: every second sample is of the class, whatever the weights."""
    limit: PositiveInt | None = None
    """Takes only so many images, the first ones; default: all."""
    prior: bool = False
    """Prior preservation: these are images of the class, whose loss `finetune.prior_weight` weights; of kohya's TOML,
    those with `is_reg`, which are so without this key."""


class BucketConfig(Section):
    step: PositiveInt = 64
    """Width and height are multiples of it."""
    smallest: PositiveInt | None = None
    """Shortest side of a bucket; default: half of `data.size`."""
    largest: PositiveInt | None = None
    """Longest side of a bucket; default: twice `data.size`."""
    upscale: bool = True
    """Enlarges images that are smaller than their bucket; otherwise they get a smaller bucket."""


def as_sources(value: Any) -> Any:
    """A path, a section or a list of these as a list of sections."""
    sources = value if isinstance(value, list) else [value]
    return [{"path": str(source)} if isinstance(source, (str, int, float)) else source for source in sources]


class DataConfig(Section):
    source: Annotated[tuple[SourceConfig, ...], BeforeValidator(as_sources), Field(min_length=1, strict=False)]
    """A path or id, a section with `path` and how to read it, or a list of these."""
    size: PositiveInt
    """Side of the square images, in pixels; with buckets, the square root of their area."""
    buckets: BucketConfig | None = None
    """Sorts images into batches by aspect ratio, so that little is cropped; default: squares."""
    crop: Literal["center", "random"] = "center"
    """Which part is kept where the aspect ratio differs."""
    crops: PositiveInt = 4
    """Random crops cached of each image; without a cache, and in stage one, every sample is a new crop."""
    flip: bool = False
    """Mirrors half of the samples."""
    background: str = "white"
    """Colour behind transparent images."""
    min_side: PositiveInt = 8
    """Images with a side of fewer pixels are bad."""
    val_fraction: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the images held out for validation; which ones follows from their files' content."""
    on_error: Literal["skip", "stop"] = "skip"
    """What happens with bad images and captions: they are skipped, or stop the training."""
    max_bad: float = Field(default=0.05, ge=0, le=1)
    """Fraction of bad ones beyond which `skip` stops too."""
    streaming: bool = False
    """Streams tars, parquet and `datasets` shard by shard, without index and cache: for data larger than the disk."""
    stream_lanes: PositiveInt = 64
    """Shards that are read at once, at most; the order of samples follows from it, whatever the number of processes."""
    cache: Literal["disk", "none"] = "disk"
    """Latents and embeddings are encoded once and stored, or encoded for every batch."""
    cache_dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Dtype of the cache."""
    latents: Literal["sample", "mean"] = "sample"
    """A new sample of the autoencoder's posterior each time, or its mean."""
    cache_dir: LocalPath | None = None
    """Folder of indices, latents and embeddings, which runs can share; default: `cache` in the run's folder."""
    workers: int = Field(default=0, ge=0)
    """Loader processes per training process."""
    prefetch_factor: int = Field(default=2, ge=1)
    """Batches that each loader process reads ahead; on slow storage more hide slow reads, and take memory. Of no effect
    without `workers`; refused with `streaming`."""

    @property
    def name(self) -> str:
        return ", ".join(source.path for source in self.source)

    @property
    def shortest(self) -> int:
        """The shortest side that an image may have, in pixels."""
        return (self.buckets.smallest or self.size // 2) if self.buckets else self.size
