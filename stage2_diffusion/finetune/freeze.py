"""What of a model is frozen and what is trained, by `finetune.kind`."""

from __future__ import annotations

from typing import Any

import torch

from ldm.config.schema import Config
from ldm.models.adapters.base_precision import convert_base
from ldm.models.adapters.inject import AdapterSpec, add_adapter
from ldm.models.adapters.token_embedding import add_token
from ldm.models.conditioning import reads_pooled
from ldm.models.text_encoder import AnyTextEncoder
from ldm.models.unet import UNet
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.rng import generator


def freeze(config: Config, unet: UNet, text: AnyTextEncoder | None) -> AnyTextEncoder | None:
    """Freezes a model, but for what is trained: all of it, new adapters, or the rows of a new word.

    Returns the text encoder if some of it is trained. Frozen weights are rounded to `finetune.base_precision`.
    """
    finetune = config.finetune
    if finetune.kind == "full":
        if text and config.text.train:
            text.trainable(pooled=reads_pooled(unet))
            return text
        return None
    unet.requires_grad_(False)
    convert_base(unet, finetune.base_precision)
    if finetune.adapter:
        spec = AdapterSpec.of(finetune)
        add_adapter(unet, spec)
        if not (finetune.text_encoder and text):
            return None
        for model in text.models:
            add_adapter(model, spec)
        text.freeze_unused(pooled=reads_pooled(unet))
    else:
        assert text, "the configuration allows no inversion without text"
        add_token(text, finetune.token, finetune.initializer, finetune.vectors)
    return text


def base_fingerprint(config: Config, unet: UNet, text: AnyTextEncoder | None) -> dict[str, Any]:
    """What a checkpoint remembers of the model that its trained parts belong to; nothing where all of it is trained."""
    if config.finetune.kind == "full":
        return {}
    return {"base": tensors_sha256(unet.state_dict()), **({"text": text.fingerprint()} if text else {})}


def seed_dropout(config: Config, n: torch.Tensor) -> None:
    """Makes the dropout of an adapter in the batch at positions n `(N,)` depend on these alone."""
    if config.finetune.dropout:
        torch.manual_seed(int(generator(config.run.seed, "adapter dropout", int(n[0])).integers(2**63)))
