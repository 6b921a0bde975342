"""`text`: the text encoder."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, Field, PositiveInt

from ldm.config.schema.base import PathOrId, Section
from ldm.utils.paths import expand


def _expand(model: str) -> str:
    return ":".join(map(expand, model.split(":"))) if model.startswith("open_clip:") else expand(model)


class TextConfig(Section):
    model: Annotated[str, AfterValidator(_expand)] = "sentence-transformers/all-MiniLM-L6-v2"
    """A local folder or Hub id of a BERT-like, CLIP or T5 encoder, or of a diffusers pipeline with one;
    `open_clip:ARCH:WEIGHTS`; or the `.safetensors` of a whole model of Stable Diffusion 1, 2 or XL."""
    base: PathOrId | None = None
    """Of a single file: a diffusers pipeline of the same family, folder or Hub id, whose tokenizers and configuration
    it gets; default: the published one, from the Hub."""
    max_tokens: int | None = Field(default=None, ge=3)
    """Length that captions are padded or truncated to; default: the tokenizer's own."""
    width: PositiveInt | None = None
    """Channels of the encoder's hidden states, checked when it is loaded; `--dry-run` then needs no download."""
    pooled_width: PositiveInt | None = None
    """Channels of its pooled embedding, if it has one (SDXL's has 1280); checked as `width` is."""
    skip_layers: int = Field(default=0, ge=0)
    """Last layers that are skipped: 1 gives the penultimate layer's states (Stable Diffusion 2, "clip skip")."""
    chunks: PositiveInt = 1
    """Long captions are encoded in up to so many chunks, whose states are concatenated."""
    normalize: bool = False
    """Token states get mean 0 and deviation 1 per channel, over 256 images' captions; for a U-Net trained from
    scratch. Both are folded into the encoder's last layer, so the exported pipeline needs nothing else."""
    train: bool = False
    """Trains the encoder with the U-Net; text embeddings are then not cached."""
