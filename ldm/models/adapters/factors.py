"""The change of a layer's weight as its file holds it: the factors of LoRA, DoRA, LoKr or LoHa, and their product."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from ldm.models.adapters.inject import NAME, Kind

LORA = ("lora_A", "lora_B", "lora_mid")
LOKR = ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")
LOHA = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")
MAGNITUDE = "dora_scale"
FACTORS = (*LORA, *LOKR, *LOHA, MAGNITUDE)
"""Names of factors: peft's, which LoKr and LoHa share with LyCORIS; `lora_mid` and `dora_scale` are LyCORIS'."""
NEEDED = (
    {"lora_A", "lora_B"},
    *({f"lokr_w1{a}", f"lokr_w2{b}"} for a in ("", "_a") for b in ("", "_a")),
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
)
"""One of these sets is in every complete change."""
PAIRS = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"), ("hada_t1", "hada_t2"))


@dataclass(frozen=True)
class LayerAdapter:
    """The change of one layer: factors, by their names in `FACTORS`, and the scale of their product, alpha / rank.

    `dora_scale` has the shape that LyCORIS and ComfyUI read: `(out, 1, …)` with as many axes as the weight, one
    magnitude for each output; or `(1, in, …)`, one for each input.
    """

    factors: Mapping[str, torch.Tensor]
    scale: float = 1.0

    @property
    def kind(self) -> Kind:
        if "lora_A" in self.factors:
            return "dora" if MAGNITUDE in self.factors else "lora"
        return "loha" if "hada_w1_a" in self.factors else "lokr"

    @property
    def rank(self) -> int:
        """Of LoKr without a product of matrices: the side of the larger factor, from which peft builds such factors."""
        if "lora_A" in self.factors:
            return self.factors["lora_A"].shape[0]
        for name in ("lokr_w2_b", "lokr_w1_b", "hada_w1_b"):
            if name in self.factors:
                return self.factors[name].shape[0]
        return max(self.factors["lokr_w2"].shape[:2])

    @property
    def alpha(self) -> float:
        return float(f"{self.scale * self.rank:.12g}")  # as it was before the division

    @property
    def complete(self) -> bool:
        """Whether no factor of the product is missing."""
        names = self.factors.keys()
        return any(needed <= names for needed in NEEDED) and all((a in names) == (b in names) for a, b in PAIRS)

    def to(self, dtype: torch.dtype) -> LayerAdapter:
        return replace(self, factors={name: tensor.to(dtype) for name, tensor in self.factors.items()})

    def shape(self) -> tuple[int, int]:
        """Rows and columns of the weight that it changes, a kernel's positions counted as columns.

        RuntimeError where the factors don't fit together.
        """
        rows, columns = replace(self, factors={name: t.to("meta") for name, t in self.factors.items()}).delta().shape
        return rows, columns

    def delta(self) -> torch.Tensor:
        """The unscaled product of the factors, `(out, in · kernel)`, in float32."""
        f = {name: tensor.float() for name, tensor in self.factors.items()}
        if "lora_mid" in f:
            return tucker(f["lora_mid"], f["lora_B"].flatten(1).T, f["lora_A"].flatten(1))
        if "lora_A" in f:
            return f["lora_B"].flatten(1) @ f["lora_A"].flatten(1)
        if "hada_t1" in f:
            first, second = (tucker(f[f"hada_t{i}"], f[f"hada_w{i}_a"], f[f"hada_w{i}_b"]) for i in (1, 2))
            return first * second
        if "hada_w1_a" in f:
            return (f["hada_w1_a"] @ f["hada_w1_b"]) * (f["hada_w2_a"] @ f["hada_w2_b"])
        w1 = f["lokr_w1"] if "lokr_w1" in f else f["lokr_w1_a"] @ f["lokr_w1_b"]
        if "lokr_t2" in f:
            w2 = tucker(f["lokr_t2"], f["lokr_w2_a"], f["lokr_w2_b"])
        else:
            w2 = f["lokr_w2"].flatten(1) if "lokr_w2" in f else f["lokr_w2_a"] @ f["lokr_w2_b"]
        return torch.kron(w1, w2)

    def changed(self, weight: torch.Tensor, strength: float = 1.0, others: torch.Tensor | None = None) -> torch.Tensor:
        """The weight with this change, in float32; `strength` scales the product of the factors, as in diffusers.

        `others` is the weight with the changes of other adapters before, by default `weight`. DoRA, eq. 5:
        W' = m (W + ΔW) / ‖W + ΔW‖ with a norm and a magnitude m for each output, or each input. Of several adapters peft
        computes the norm without the others, which m then scales too.
        """
        weight = weight.float()
        others = weight if others is None else others
        delta = strength * self.scale * self.delta().to(weight.device).reshape(weight.shape)
        if MAGNITUDE not in self.factors:
            return others + delta
        magnitude = self.factors[MAGNITUDE].float().to(weight.device)
        axis = 0 if magnitude.shape[0] == weight.shape[0] else 1
        norm_axes = [i for i in range(weight.dim()) if i != axis]
        return magnitude / torch.linalg.vector_norm(weight + delta, dim=norm_axes, keepdim=True) * (others + delta)


def tucker(core: torch.Tensor, out: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    """Σ core `(i, j, …)` · out `(i, p)` · into `(j, r)`, as `(p, r · kernel)`: LyCORIS' convolutions."""
    return torch.einsum("ij...,ip,jr->pr...", core, out, into).flatten(1)


def layer_adapters(network: Any) -> dict[str, LayerAdapter]:
    """The adapter that `add_adapter` gave a network, by the names that its layers have without one."""
    return {name: _layer_adapter(layer) for name, layer in network.named_modules() if isinstance(layer, BaseTunerLayer)}


def _layer_adapter(layer: Any) -> LayerAdapter:
    return LayerAdapter(dict(_factors(layer)), float(layer.scaling[NAME]))


def _factors(layer: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """The factors of a layer of peft. Its magnitudes have no axis for the inputs of a linear layer."""
    for name in (*LORA, *LOKR, *LOHA):
        if NAME in (held := getattr(layer, name, {})):
            yield name, getattr(held[NAME], "weight", held[NAME]).detach()
    if NAME in (magnitudes := getattr(layer, "lora_magnitude_vector", {})):
        axes = layer.get_base_layer().weight.dim() - 1
        yield MAGNITUDE, magnitudes[NAME].weight.detach().reshape(-1, *[1] * axes)
