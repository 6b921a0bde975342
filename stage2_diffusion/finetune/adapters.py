"""A frozen model with trained adapters: LoRA, DoRA, LoKr, LoHa."""

from __future__ import annotations

from typing import Any

import torch

from ldm.config.schema import Config
from ldm.models.adapters.base_precision import convert_base
from ldm.models.adapters.inject import AdapterSpec, add_adapter
from ldm.models.text_encoder import AnyTextEncoder
from ldm.models.unet import UNet
from ldm.utils.atomic_files import tensors_sha256
from ldm.utils.rng import generator


def add_adapters(config: Config, unet: UNet, text: AnyTextEncoder | None) -> AnyTextEncoder | None:
    """Freezes a model, but for new adapters in float32; returns the text encoder where it has some too."""
    finetune = config.finetune
    spec = AdapterSpec.of(finetune)
    convert_base(unet, finetune.base_precision)
    add_adapter(unet, spec)
    if not finetune.text_encoder:
        return None
    assert text, "the configuration allows no adapter of a text encoder without text"
    for model in text.models:
        add_adapter(model, spec)
    text.train_only_used()
    return text


def base_fingerprint(config: Config, unet: UNet, text: AnyTextEncoder | None) -> dict[str, Any]:
    """What a checkpoint of a frozen model's training remembers of the model; nothing where all of it is trained."""
    if config.finetune.kind == "full":
        return {}
    parts = {"base": tensors_sha256(unet.state_dict())}
    return parts | ({"text": text.fingerprint()} if text else {})


def seed_dropout(config: Config, n: torch.Tensor) -> None:
    """Makes the dropout of an adapter in the batch at positions n `(N,)` depend on these alone."""
    if config.finetune.dropout:
        torch.manual_seed(int(generator(config.run.seed, "adapter dropout", int(n[0])).integers(2**63)))
