"""A frozen model with a new word, whose embedding alone is trained: textual inversion."""

from __future__ import annotations

from ldm.config.schema import Config
from ldm.data.index import Index
from ldm.data.stream import Stream
from ldm.models.adapters.embedding_files import write_embeddings
from ldm.models.adapters.token_embedding import add_token
from ldm.models.text_encoder import AnyTextEncoder
from ldm.models.unet import UNet
from ldm.utils.errors import UserError


def learn_word(config: Config, unet: UNet, text: AnyTextEncoder | None, train_set: Index | Stream) -> AnyTextEncoder:
    """Freezes a model, but for the embedding of the new word, and returns the text encoder that reads it.

    UserError where no caption has the word; a stream's captions are not known beforehand.
    """
    finetune = config.finetune
    assert text, "the configuration allows no inversion without text"
    _check_captions(train_set, text, finetune.token)
    unet.requires_grad_(False)
    add_token(text, finetune.token, finetune.initializer, finetune.vectors)
    return text


def _check_captions(train_set: Index | Stream, text: AnyTextEncoder, token: str) -> None:
    if isinstance(train_set, Stream):
        return
    normalize = text.encoders[0].normalize
    if not any(normalize(token) in normalize(caption) for captions in train_set.captions() for caption in captions):
        raise UserError(
            f"finetune.token: no caption has {token}, so there is nothing to learn it from; write it in the captions, "
            f'or set data.source.caption="a photo of {token}"'
        )


def write_word(config: Config, text: AnyTextEncoder) -> None:
    """Writes `RUN/embeddings`, the result of a finished run."""
    prompts = [prompt for prompt in config.sample.prompts if config.finetune.token in prompt]
    base = str(config.stage2.init_from)
    write_embeddings(config.run.dir / "embeddings", text, config.finetune.token, base, *prompts[:1])
