"""Prompts → token embeddings for cross-attention, through transformers.

BERT-like encoders (MiniLM), CLIP, OpenCLIP and T5. Embeddings are the last layer's token states, padded to one length,
exactly as diffusers' `StableDiffusionPipeline` computes them, so that an exported model gets the same numbers.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, PreTrainedModel

from ldm.config.schema import TextConfig
from ldm.models import open_clip, text_encoder_files
from ldm.models.conditioning import TextEmbedding
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.errors import UserError

OPEN_CLIP = "open_clip:"
NULL_PROMPT = ""  # its embedding is the unconditional one


class TextEncoder:
    """A text encoder, frozen until a part of it is made trainable: captions to `length` states of `width` channels.

    A caption is split into `chunks` pieces; by default as many as the model's configuration records, else 1. Each piece
    has its own first and last token and its own padding. `length` counts the tokens of all pieces. The states are those
    of the last layer, after the final norm; with `penultimate`, of the layer before, without it, as SDXL takes them.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, chunks: int | None = None, *, penultimate: bool = False):
        recorded = getattr(model.config, "chunks", 1)
        self.chunks: int = chunks or recorded
        if self.chunks != recorded:
            model.config.chunks = self.chunks
        self.model = model.eval().requires_grad_(False)
        self.tokenizer, self.penultimate = tokenizer, penultimate
        self.added_words: list[str] = []
        """Words that the tokenizer got after it was loaded; of one with several vectors, all of its tokens."""
        self.piece: int = tokenizer.model_max_length  # tokens of a piece
        self.length = self.chunks * self.piece
        self.width: int = model.config.hidden_size
        self.pooled_width: int = model.config.projection_dim if self._projects else 0
        """Channels of the pooled embedding; 0 where there is none."""

    @property
    def _projects(self) -> bool:
        """Whether the model has CLIP's text projection, which gives one embedding of each text."""
        return isinstance(self.model, CLIPTextModelWithProjection)

    @property
    def encoders(self) -> tuple[TextEncoder, ...]:
        return (self,)

    @property
    def models(self) -> list[PreTrainedModel]:
        return [self.model]

    @property
    def module(self) -> nn.Module:
        """All weights, as one module."""
        return self.model

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch: int = 64) -> TextEmbedding:
        """The embeddings of N prompts, float32. Text beyond `length` tokens is cut off."""
        parts = (prompts[i : i + batch] for i in range(0, len(prompts), batch))
        return TextEmbedding.cat([self.embed_tokens(self.token_ids(part)) for part in parts])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 64) -> torch.Tensor:
        """The states of `embed`, `(N, length, width)`."""
        return self.embed(prompts, batch).states

    def token_ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """Ids and their mask (0 at padding), `(N, 2, chunks, piece)` int64. Unused pieces are empty captions."""
        return _to_device(self.tokenize(prompts), self.model.device)

    def tokenize(self, prompts: Sequence[str]) -> torch.Tensor:
        """The result of `token_ids`, on the CPU."""
        options = {"padding": "max_length", "max_length": self.piece, "truncation": True, "return_tensors": "pt"}
        prompts = self._expand(prompts)
        if self.chunks == 1:
            tokens = self.tokenizer(list(prompts), **options)
            ids, mask = tokens.input_ids[:, None], tokens.attention_mask[:, None]
        else:
            tokens = self.tokenizer([*prompts, NULL_PROMPT], return_overflowing_tokens=True, **options)
            caption = tokens.overflow_to_sample_mapping  # (P,), the caption of each piece, ascending
            piece = torch.arange(len(caption)) - torch.searchsorted(caption, caption)  # (P,), its index in the caption
            kept = (caption < len(prompts)) & (piece < self.chunks)
            ids, mask = (
                tensor[-1].repeat(len(prompts), self.chunks, 1).index_put((caption[kept], piece[kept]), tensor[kept])
                for tensor in (tokens.input_ids, tokens.attention_mask)
            )
        return torch.stack([ids, mask], dim=1)

    def embed_tokens(self, tokens: torch.Tensor) -> TextEmbedding:
        """The embeddings, float32, of the result of `token_ids`; with gradients where they are enabled."""
        ids, mask = tokens.unbind(1)
        attention_mask = mask.flatten(0, 1) if getattr(self.model.config, "use_attention_mask", False) else None
        output = self.model(
            ids.flatten(0, 1), attention_mask=attention_mask, output_hidden_states=self.penultimate or None
        )
        states = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        states = states.float().unflatten(0, ids.shape[:2]).flatten(1, 2)
        pooled = output.text_embeds.float().unflatten(0, ids.shape[:2])[:, 0] if self._projects else None
        return TextEmbedding(states, pooled)  # of several pieces, the first one's pooled embedding

    def _expand(self, prompts: Sequence[str]) -> list[str]:
        """The prompts with all tokens of words that have several: `<toy>` becomes `<toy> <toy>_1`, as in diffusers."""
        tokens, tokens_of = self.tokenizer.added_tokens_encoder, dict[str, str]()
        for word in tokens:
            numbered = (f"{word}_{i}" for i in itertools.count(1))
            if more := list(itertools.takewhile(tokens.__contains__, numbered)):
                tokens_of[self.normalize(word)] = " ".join([word, *more])
        if not tokens_of:
            return list(prompts)
        flags = re.IGNORECASE if self.normalize("A") == "a" else re.NOFLAG
        longest_first = sorted(map(re.escape, tokens_of), key=len, reverse=True)
        pattern = re.compile(f"(?:{'|'.join(longest_first)})(?!_[0-9])", flags)
        return [
            pattern.sub(lambda match: tokens_of.get(self.normalize(match[0]), match[0]), prompt) for prompt in prompts
        ]

    def normalize(self, text: str) -> str:
        """Text as the tokenizer looks words up: most tokenizers write small letters."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return str(normalizer.normalize_str(text)) if normalizer else text

    def trainable(self, pooled: bool = True) -> list[nn.Parameter]:
        """Enables gradients for the parameters that the states depend on, and returns them. Dropout stays off.

        With `pooled`, also for those that only the pooled embedding depends on.
        """
        self.model.requires_grad_(True)
        return self.freeze_unused(pooled)

    def freeze_unused(self, pooled: bool = True) -> list[nn.Parameter]:
        """The same for those parameters alone that require gradients now; freezes the others of these."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        if not parameters:
            return []
        with torch.enable_grad():
            embedding = self.embed_tokens(self.token_ids([NULL_PROMPT]))
            output = embedding.states.sum()
            if pooled and embedding.pooled is not None:
                output = output + embedding.pooled.sum()
            gradients = torch.autograd.grad(output, parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)  # BERT's pooler gets none
        return [parameter for parameter in parameters if parameter.requires_grad]

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, with the special tokens of its pieces; `encode` uses `length`."""
        added = self.tokenizer.num_special_tokens_to_add()
        prompts = self._expand(prompts)
        counts = [len(ids) for ids in self.tokenizer(prompts, verbose=False).input_ids] if prompts else []
        pieces = [min(self.chunks, max(1, math.ceil((count - added) / (self.piece - added)))) for count in counts]
        return [count + added * (number - 1) for count, number in zip(counts, pieces, strict=True)]

    def unread(self, prompt: str) -> str:
        """The end of a prompt that does not fit into `length` tokens; empty if all of it fits."""
        room = self.chunks * (self.piece - self.tokenizer.num_special_tokens_to_add())
        (prompt,) = self._expand([prompt])
        ids = self.tokenizer(prompt, add_special_tokens=False, verbose=False).input_ids
        return str(self.tokenizer.decode(ids[room:])).strip()

    def to(self, device: torch.device) -> TextEncoder:
        self.model.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of weights, length and chunks, on which cached embeddings depend."""
        settings = [*([self.chunks] if self.chunks > 1 else []), *(["penultimate"] if self.penultimate else [])]
        return tensors_sha256(self.model.state_dict(), self.piece, *settings)


class TextEncoders:
    """Several text encoders, whose states are joined channel by channel: SDXL's two, arXiv 2307.01952, section 2.1.

    The pooled embedding is the last encoder's. `zero_null`: the embedding of the empty prompt is 0, as SDXL was trained
    (diffusers' `force_zeros_for_empty_prompt`). ValueError if they read different numbers of tokens.
    """

    def __init__(self, encoders: Sequence[TextEncoder], zero_null: bool = False):
        self.encoders, self.zero_null = tuple(encoders), zero_null
        lengths = {encoder.length for encoder in encoders}
        if len(lengths) > 1:
            raise ValueError(f"its text encoders read {', '.join(map(str, sorted(lengths)))} tokens")
        self.length = lengths.pop()
        self.width = sum(encoder.width for encoder in encoders)
        self.pooled_width = self.encoders[-1].pooled_width
        self.chunks = self.encoders[-1].chunks

    @property
    def models(self) -> list[PreTrainedModel]:
        return [encoder.model for encoder in self.encoders]

    @property
    def module(self) -> nn.Module:
        """All weights, as one module."""
        return nn.ModuleList(self.models)

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch: int = 64) -> TextEmbedding:
        """The embeddings of N prompts, float32. Text beyond `length` tokens is cut off."""
        parts = (prompts[i : i + batch] for i in range(0, len(prompts), batch))
        return TextEmbedding.cat([self.embed_tokens(self.token_ids(part)) for part in parts])

    def token_ids(self, prompts: Sequence[str]) -> torch.Tensor:
        """Each encoder's ids and their mask, `(N, encoders, 2, chunks, piece)` int64.

        The mask of a prompt whose embedding is 0 is 0 everywhere.
        """
        tokens = torch.stack([encoder.tokenize(prompts) for encoder in self.encoders], dim=1)
        if self.zero_null:
            tokens[[prompt == NULL_PROMPT for prompt in prompts], :, 1] = 0
        return _to_device(tokens, self.encoders[0].model.device)

    def embed_tokens(self, tokens: torch.Tensor) -> TextEmbedding:
        """The embeddings, float32, of the result of `token_ids`; with gradients where they are enabled."""
        parts = [encoder.embed_tokens(tokens[:, i]) for i, encoder in enumerate(self.encoders)]
        embedding = TextEmbedding(torch.cat([part.states for part in parts], dim=-1), parts[-1].pooled)
        if not self.zero_null:
            return embedding
        kept = tokens[:, :, 1].flatten(1).any(1).to(embedding.states)
        return embedding.map(lambda tensor: tensor * kept.reshape(-1, *[1] * (tensor.dim() - 1)))

    def trainable(self, pooled: bool = True) -> list[nn.Parameter]:
        """As `TextEncoder.trainable`; the pooled embedding is the last encoder's."""
        self.module.requires_grad_(True)
        return self.freeze_unused(pooled)

    def freeze_unused(self, pooled: bool = True) -> list[nn.Parameter]:
        """As `TextEncoder.freeze_unused`; the pooled embedding is the last encoder's."""
        *others, last = self.encoders
        return [p for encoder in others for p in encoder.freeze_unused(pooled=False)] + last.freeze_unused(pooled)

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, by the encoder that finds most."""
        counts = zip(*(encoder.count_tokens(prompts) for encoder in self.encoders), strict=True)
        return [max(of_prompt) for of_prompt in counts]

    def unread(self, prompt: str) -> str:
        """The end of a prompt that does not fit into `length` tokens of every encoder; empty if all of it fits."""
        return max((encoder.unread(prompt) for encoder in self.encoders), key=len)

    def to(self, device: torch.device) -> TextEncoders:
        for encoder in self.encoders:
            encoder.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of all on which cached embeddings depend."""
        parts = [*(encoder.fingerprint() for encoder in self.encoders), str(self.zero_null)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()


def _to_device(tokens: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Tokens on `device`; from pinned memory, as the copy from other memory waits for what a GPU computes."""
    return (tokens.pin_memory() if device.type == "cuda" else tokens).to(device, non_blocking=True)


AnyTextEncoder: TypeAlias = TextEncoder | TextEncoders


def of(config: TextConfig) -> AnyTextEncoder:
    """The encoder of a configuration, frozen; UserError as `load`."""
    options = {"skip_layers": config.skip_layers, "chunks": config.chunks}
    encoder = load(config.model, config.max_tokens, config.width, config.base, **options)
    if config.pooled_width not in (None, encoder.pooled_width):
        raise UserError(
            f"text.pooled_width: {config.pooled_width}, but {config.model} has {encoder.pooled_width}; set it to that"
        )
    return encoder


def load(
    name: str,
    max_tokens: int | None = None,
    width: int | None = None,
    base: str | None = None,
    *,
    skip_layers: int = 0,
    chunks: int = 1,
) -> AnyTextEncoder:
    """Loads tokenizer and encoder from a local folder or the Hub; MiniLM also from the package that contains it.

    From a diffusers pipeline it takes the pipeline's own, or both of SDXL's; so too from a single file in the layout of
    Stable Diffusion 1, 2 or XL, whose tokenizers and configuration are those of `base`, a pipeline of the same family:
    by default the published one, from the Hub. `open_clip:` before a name loads a text tower of OpenCLIP. The last
    `skip_layers` layers are removed; the final norm stays. UserError if nothing can be loaded, if the encoder's width
    is not `width`, if the file of all-MiniLM-L6-v2 is not the published one, and for options that the encoder can't
    satisfy.
    """
    is_file = not name.startswith(OPEN_CLIP) and text_encoder_files.is_single_file(name)
    if base and not is_file:
        raise UserError(f"text.base: has no effect on {name}, which is no single file; leave it out")
    zero_null = False
    if name.startswith(OPEN_CLIP):
        pairs = [open_clip.load(name.removeprefix(OPEN_CLIP))]
    elif is_file:
        pairs, zero_null = text_encoder_files.from_single_file(Path(name), base)
    else:
        pairs, zero_null = text_encoder_files.from_folder(name)
    if len(pairs) > 1:
        encoders = TextEncoders([TextEncoder(*pair, penultimate=True) for pair in pairs], zero_null)
        fixed = {"max_tokens": encoders.length, "skip_layers": 0, "chunks": 1}
        for key, value in {"max_tokens": max_tokens, "skip_layers": skip_layers, "chunks": chunks}.items():
            if value not in (None, fixed[key]):
                raise UserError(f"text.{key}: {value}, but {name} has several text encoders; leave it out")
        return _check_width(encoders, width, name)
    model, tokenizer = pairs[0]
    if skip_layers:
        text_encoder_files.remove_layers(model, skip_layers, name)
    positions = getattr(model.config, "max_position_embeddings", 512)
    default = min(tokenizer.model_max_length, positions)  # 10**30 for a tokenizer without a maximum
    if max_tokens and max_tokens > positions:
        raise UserError(f"text.max_tokens: {max_tokens} is more than the {positions} positions of {name}")
    if chunks > 1 and not tokenizer.is_fast:
        raise UserError(f"text.chunks: {chunks}, but {name} has a slow tokenizer, which can't divide captions; set 1")
    tokenizer.model_max_length = max_tokens or default
    if not isinstance(model, CLIPTextModel):  # CLIP was trained without a mask for padding
        model.config.use_attention_mask = True
    return _check_width(TextEncoder(model, tokenizer, chunks), width, name)


def _check_width(encoder: AnyTextEncoder, width: int | None, name: str) -> AnyTextEncoder:
    if width and width != encoder.width:
        raise UserError(f"text.width: {width}, but {name} has {encoder.width}; set it to that")
    return encoder
