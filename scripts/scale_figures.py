"""For `scripts/plan_at_scale.py`: bytes that follow from a configuration, and rates with their sources."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pyarrow as pa
import torch

from ldm.config.schema import Config
from ldm.data.crops import Augmentation
from ldm.data.index_file import CHUNK
from ldm.data.index_schema import SCHEMA
from ldm.models.autoencoder import Autoencoder
from ldm.training import plan
from ldm.utils.errors import UserError

KEY_BYTES = 32  # of an entry of the cache: a SHA-256
PUBLISHED = "published: MosaicML, github.com/mosaicml/diffusion"
MEASURED = "measured: a core of a Xeon (AVX-512), busy, per second of CPU time; JPEGs of 683 × 512 px, 116 kB"


def published_rate(config: Config) -> float:
    """Images/s that an A100 trains: MosaicML's for Stable Diffusion 2, 866 M parameters and 64 × 64 latents."""
    unet = plan.networks(config)[1]
    work = sum(p.numel() for p in unet.parameters()) * (config.data.size / config.stage1.factor) ** 2
    return 36.6 * 866e6 * 64**2 / work


RATES: dict[str, tuple[float | Callable[[Config], float], str]] = {
    "images-per-second-per-gpu": (
        published_rate,
        f"{PUBLISHED}: 2,340 on 64 A100, Stable Diffusion 2, 512 px, cached; scaled by parameters × area of latents",
    ),
    "encoded-per-second-per-gpu": (
        lambda config: 36.6 / 0.4 * (512 / config.data.size) ** 2,
        f"{PUBLISHED}: encoding in every step takes 1.4 times as long; scaled by the area of the images",
    ),
    "indexed-per-second-per-core": (160, MEASURED),
    "decoded-per-second-per-core": (90, MEASURED),
    "cores-per-gpu": (8, "assumed"),
    "gpus-per-machine": (8, "assumed"),
    "image-kilobytes": (
        lambda config: 0.28e-3 * config.data.size**2,
        "published: img2dataset, LAION-high-resolution: 170 M images of 1,024 px in 50 TB; scaled by the area",
    ),
    "caption-bytes": (60, "assumed"),
    "write-gigabytes-per-second": (1, "assumed"),
    "dollars-per-gpu-hour": (2, f"{PUBLISHED}: an A100"),
}


def live_rate(rates: Mapping[str, float]) -> float:
    """Images/s that a GPU trains where it encodes every batch itself."""
    return 1 / (1 / rates["images-per-second-per-gpu"] + 1 / rates["encoded-per-second-per-gpu"])


def variants(config: Config) -> int:
    """Encodings of one image that the cache holds: of each crop, mirrored and not."""
    augmentation = Augmentation.of(config.data)
    return (augmentation.crops or 1) * (2 if augmentation.flip else 1)


def latent_bytes(config: Config) -> int:
    """Bytes of one encoding of an image: mean and log-variance."""
    vae, size = Autoencoder(plan.networks(config)[0].to("meta")), config.data.size
    moments = vae.moments(torch.empty(1, 3, size, size, device="meta"))
    return sum(moment.numel() for moment in moments) * _itemsize(config)


def text_bytes(config: Config) -> int:
    """Bytes of a caption's embedding; 0 where none is cached: without text, or where the text encoder is trained."""
    if config.trains_text_encoder or not config.stage2.text:
        return 0
    sizes = plan.text_encoder_sizes(config.text)
    if not isinstance(sizes.length, int):
        raise UserError("text.max_tokens: not set, so an embedding's size is unknown; set it, for example to 77")
    return (sizes.length * sizes.width + sizes.pooled_width) * _itemsize(config)


def _itemsize(config: Config) -> int:
    dtype: torch.dtype = getattr(torch, config.data.cache_dtype)
    return dtype.itemsize


def index_row_bytes(caption: int, key: int = 28, file: int = 48) -> float:
    """Bytes of a row of the index, with a caption, a key and a file name of so many bytes."""
    row = {"key": "k" * key, "file": "f" * file, "captions": ["c" * caption], "stamp": bytes(16), "sha256": bytes(32)}
    buffer = pa.BufferOutputStream()
    with pa.ipc.new_stream(buffer, SCHEMA) as writer:
        writer.write_batch(pa.RecordBatch.from_pylist([row] * CHUNK, SCHEMA))
    return float(buffer.getvalue().size / CHUNK)
