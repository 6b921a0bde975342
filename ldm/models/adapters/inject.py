"""Adapters in a network, through peft: LoRA (arXiv 2106.09685), DoRA (2402.09353), LoKr and LoHa (LyCORIS, 2309.14859).

A layer's weight W becomes W + scale · ΔW with a ΔW of few parameters; scale is alpha / rank.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, cast

import torch
from peft import LoHaConfig, LoKrConfig, LoraConfig, PeftConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import nn

from ldm.config.schema import FinetuneConfig
from ldm.utils.errors import UserError

Kind = Literal["lora", "dora", "lokr", "loha"]
NAME = "default"  # of the adapter, in peft
ATTENTION = (  # of diffusers, CLIP, BERT, T5
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("q_proj", "k_proj", "v_proj", "out_proj"),
    *("query", "key", "value", "attention.output.dense"),
    *("SelfAttention.q", "SelfAttention.k", "SelfAttention.v", "SelfAttention.o"),
)
TRANSFORMERS = ("Transformer2DModel", "Attention", "CLIPEncoderLayer", "BertLayer", "T5Block")
CONVOLUTIONS = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
"""Classes whose layers kohya's names can express; time embedding, first and last convolution stay as they are."""


@dataclass(frozen=True)
class AdapterSpec:
    """An adapter's form. `alpha` None: as the rank, so that the change is not scaled."""

    kind: Kind = "lora"
    rank: int = 16
    alpha: float | None = None
    dropout: float = 0.0
    targets: str = "attention"
    rank_pattern: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, finetune: FinetuneConfig) -> AdapterSpec:
        """The adapter that a section `finetune`, whose kind is one, describes."""
        assert finetune.kind in ("lora", "dora", "lokr", "loha"), finetune.kind
        fields = (finetune.rank, finetune.alpha, finetune.dropout, finetune.targets, finetune.rank_pattern)
        return cls(finetune.kind, *fields)


def target_layers(network: nn.Module, targets: str) -> list[str]:
    """Names of the layers that `targets` (`attention`, `linear`, `all`) mean, in the network's order.

    `attention`: the projections of attention layers. `linear`: all linear layers and 1×1 convolutions of transformers.
    `all`: the convolutions and projections of residual blocks and resampling too.
    """
    names = dict(network.named_modules())

    def within(name: str, kinds: tuple[str, ...]) -> bool:
        parts = name.split(".")
        parents = (".".join(parts[:i]) for i in range(len(parts)))
        return any(type(names[parent]).__name__ in kinds for parent in parents if parent in names)

    def fits(name: str, layer: nn.Module) -> bool:
        if not isinstance(layer, nn.Linear | nn.Conv2d):
            return False
        if targets == "attention":
            return isinstance(layer, nn.Linear) and name.endswith(tuple(f".{part}" for part in ATTENTION))
        return within(name, TRANSFORMERS if targets == "linear" else TRANSFORMERS + CONVOLUTIONS)

    return [name for name, layer in names.items() if fits(name, layer)]


def layer_ranks(network: nn.Module, spec: AdapterSpec) -> dict[str, int]:
    """The rank of each layer that gets an adapter, in the network's order; of several patterns, the last counts."""
    ranks = dict.fromkeys(target_layers(network, spec.targets), spec.rank)
    for pattern, rank in spec.rank_pattern.items():
        ranks.update({name: rank for name in ranks if re.search(pattern, name)})
    return ranks


def check_targets(networks: Iterable[nn.Module], spec: AdapterSpec) -> None:
    """UserError where a network has no layer for an adapter, or a pattern matches no layer of any network."""
    names: list[str] = []
    for network in networks:
        if not (layers := target_layers(network, spec.targets)):
            kind = type(network).__name__
            raise UserError(f"finetune.targets: {spec.targets} matches no layer of the {kind}; set another")
        names += layers
    for pattern in spec.rank_pattern:
        if not any(re.search(pattern, name) for name in names):
            raise UserError(f"finetune.rank_pattern: {pattern!r} matches no layer; one is {names[0]}")


def add_adapter(network: nn.Module, spec: AdapterSpec) -> list[str]:
    """Freezes a network, gives its target layers an adapter in float32, and returns their names. Only it is trained.

    The change is 0 at the start; its random factors are drawn from torch's generator. `check_targets` finds mistakes.
    """
    ranks = layer_ranks(network, spec)
    network.requires_grad_(False)
    inject_adapter_in_model(peft_config(spec, ranks), network, NAME)
    for parameter in network.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    for layer in network.modules():  # peft has rounded DoRA's magnitudes to the type of the weights
        if isinstance(layer, LoraLayer) and NAME in layer.lora_magnitude_vector:
            weight, magnitude = cast(Any, layer.get_base_layer()).weight, layer.lora_magnitude_vector[NAME].weight
            if weight.dtype != torch.float32:
                magnitude.data = weight.float().flatten(1).norm(dim=1).reshape(magnitude.shape)
    return list(ranks)


def peft_config(spec: AdapterSpec, ranks: Mapping[str, int]) -> PeftConfig:
    """peft's configuration for layers of these ranks."""
    others = {name: rank for name, rank in ranks.items() if rank != spec.rank}
    alpha = spec.alpha or spec.rank
    alphas = {} if spec.alpha else dict(others)  # scale 1 everywhere
    options: dict[str, Any] = {
        ("lora_alpha" if spec.kind in ("lora", "dora") else "alpha"): alpha,
        "r": spec.rank,
        "target_modules": list(ranks),
        "rank_pattern": {f"^{re.escape(name)}$": rank for name, rank in others.items()},
        "alpha_pattern": {f"^{re.escape(name)}$": rank for name, rank in alphas.items()},
    }
    if spec.kind in ("lora", "dora"):
        dora = spec.kind == "dora"
        return LoraConfig(lora_dropout=spec.dropout, use_dora=dora, **options)
    return (LoKrConfig if spec.kind == "lokr" else LoHaConfig)(**options)


def adapter_parameters(network: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """The adapter's tensors in a network, by their names in it."""
    return ((name, parameter) for name, parameter in network.named_parameters() if f".{NAME}" in name)
