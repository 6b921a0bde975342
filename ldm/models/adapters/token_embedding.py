"""New words of a text encoder: their embeddings learn, all else is frozen (textual inversion, arXiv 2208.01618).

A word of several vectors is several tokens, `<toy>`, `<toy>_1`, …, which the encoder reads wherever a prompt has the
word, as diffusers' pipelines do.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from ldm.models.text_encoder import AnyTextEncoder, TextEncoder
from ldm.utils.errors import UserError


class TokenEmbedding(nn.Module):
    """A frozen token embedding with `learned` rows `(V, D)`, float32, for the ids `first`, `first` + 1, ….

    The rows are a parameter of their own, so that neither weight decay nor an optimizer's moments reach the others.
    """

    def __init__(self, base: nn.Embedding, first: int, rows: torch.Tensor):
        super().__init__()
        self.base, self.first = base.requires_grad_(False), first
        self.learned = nn.Parameter(rows.detach().float().clone())

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        row = ids - self.first
        is_learned = (row >= 0) & (row < len(self.learned))
        frozen = self.base(ids.masked_fill(is_learned, 0))
        learned = F.embedding(row.clamp(0, len(self.learned) - 1), self.learned)
        return torch.where(is_learned[..., None], learned.to(frozen.dtype), frozen)


def tokens_of(token: str, vectors: int) -> list[str]:
    """The tokens of a word: `<toy>`, `<toy>_1`, …."""
    return [token, *(f"{token}_{i}" for i in range(1, vectors))]


def check_token(encoder: AnyTextEncoder, token: str, initializer: str, vectors: int) -> None:
    """UserError, naming the key of `finetune`, where `add_token` can't add this word; changes nothing."""
    for part in encoder.encoders:
        if (normal := part.normalize(token)) != token:
            raise UserError(f"finetune.token: {token} is read as {normal}; set it to that, and write captions so")
        if known := _known(part, tokens_of(token, vectors)):
            raise UserError(f"finetune.token: {known} is a word that the text encoder knows already; set a new one")
        _initial_ids(part, initializer, vectors)


def add_token(encoder: AnyTextEncoder, token: str, initializer: str, vectors: int = 1) -> list[nn.Parameter]:
    """Freezes a text encoder, gives it a new word, and returns its rows `(vectors, D)`, one tensor for each encoder.

    The rows start from the embeddings of the initializer's tokens: one vector from their mean; several vectors from a
    token each, beginning anew after the last. UserError as `check_token`.
    """
    check_token(encoder, token, initializer, vectors)
    rows = []
    for part in encoder.encoders:
        part.model.requires_grad_(False)
        base = part.model.get_input_embeddings()
        start = base.weight.detach()[_initial_ids(part, initializer, vectors)].float()
        start = start.mean(0, keepdim=True) if vectors == 1 else start[torch.arange(vectors) % len(start)]
        part.model.set_input_embeddings(TokenEmbedding(base, _add_words(part, token, vectors), start))
        rows.append(part.model.get_input_embeddings().learned)
    return rows


def learned_rows(encoder: AnyTextEncoder) -> list[torch.Tensor]:
    """The rows `(vectors, D)` of the word that `add_token` added, one tensor for each encoder."""
    return [part.model.get_input_embeddings().learned.detach() for part in encoder.encoders]


def add_embedding(encoder: AnyTextEncoder, token: str, rows: Sequence[torch.Tensor], source: str) -> None:
    """Gives a text encoder a word that was learned: rows `(V, D)`, or `(D,)`, one tensor for each encoder.

    UserError, which begins with `source`, where they don't fit.
    """
    for part, tensor in zip(encoder.encoders, rows, strict=True):
        width = part.model.get_input_embeddings().weight.shape[1]
        if tensor.shape[-1] != width:
            raise UserError(
                f"{source}: has vectors of {tensor.shape[-1]} numbers, and the model's text encoder {width}; it was "
                "made for another model"
            )
        if not tensor.isfinite().all():
            raise UserError(f"{source}: has NaN or infinite numbers; fetch it anew")
        if known := _known(part, tokens_of(token, tensor.numel() // width)):
            raise UserError(f"{source}: its word {known} is one that the text encoder knows already; leave it out")
    for part, tensor in zip(encoder.encoders, rows, strict=True):
        base = part.model.get_input_embeddings()
        new = tensor.reshape(-1, base.weight.shape[1]).to(base.weight)
        first = _add_words(part, token, len(new))
        missing = max(0, first + len(new) - len(base.weight))  # some embeddings have unused rows
        weight = F.pad(base.weight.detach(), (0, 0, 0, missing)).clone()
        weight[first : first + len(new)] = new
        part.model.set_input_embeddings(nn.Embedding.from_pretrained(weight, padding_idx=base.padding_idx))
        part.model.config.vocab_size = len(weight)


def _known(encoder: TextEncoder, tokens: Sequence[str]) -> str:
    """The first of `tokens` that the tokenizer reads as a single one already; empty if there is none."""
    vocabulary = encoder.tokenizer.get_vocab()
    unknown = encoder.tokenizer.unk_token
    for token in tokens:
        pieces = encoder.tokenizer.tokenize(token)
        if token in vocabulary or (len(pieces) == 1 and pieces[0] != unknown):
            return token
    return ""


def _initial_ids(encoder: TextEncoder, initializer: str, vectors: int) -> list[int]:
    """The ids of the initializer's tokens; UserError where they don't suit the number of vectors."""
    ids = list(encoder.tokenizer(initializer, add_special_tokens=False).input_ids)
    if not ids or encoder.tokenizer.unk_token_id in ids:
        raise UserError(f"finetune.initializer: {initializer!r} has no word that the text encoder knows; set another")
    if 1 < vectors < len(ids):
        raise UserError(
            f"finetune.vectors: {vectors}, but the initializer {initializer!r} has {len(ids)} tokens; set 1, for their "
            f"mean, or {len(ids)} or more"
        )
    return ids


def _add_words(encoder: TextEncoder, token: str, vectors: int) -> int:
    """Adds a word to the tokenizer and returns its first id."""
    tokens = tokens_of(token, vectors)
    encoder.tokenizer.add_tokens(tokens)
    encoder.added_words += tokens
    ids: list[int] = encoder.tokenizer.convert_tokens_to_ids(tokens)
    assert ids == list(range(ids[0], ids[0] + vectors)), "a tokenizer numbers new tokens one after the other"
    return ids[0]
