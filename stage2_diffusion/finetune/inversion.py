"""Textual inversion's captions, which have to contain the new word."""

from __future__ import annotations

from ldm.config.schema import FinetuneConfig
from ldm.data.index import Index
from ldm.data.stream import Stream
from ldm.models.text_encoder import AnyTextEncoder
from ldm.utils.errors import UserError


def check_word_in_captions(finetune: FinetuneConfig, train_set: Index | Stream, text: AnyTextEncoder | None) -> None:
    """UserError where a word is to be learned that no caption has; a stream's are not known beforehand."""
    if finetune.kind != "inversion" or not text or isinstance(train_set, Stream):
        return
    normalize, token = text.encoders[0].normalize, finetune.token
    if not any(normalize(token) in normalize(caption) for captions in train_set.captions() for caption in captions):
        raise UserError(
            f"finetune.token: no caption has {token}, so there is nothing to learn it from; write it in the captions, "
            f'or set data.source.caption="a photo of {token}"'
        )
