"""Token states normalised per channel, so that a U-Net trained from scratch need not learn their scale.

Encoders' states share a large mean, and channels' deviations differ by orders of magnitude: captions that differ in a
word are nearly parallel. The mean and deviation over the training captions' tokens are folded into the encoder's last
LayerNorm: the exported pipeline computes normalised states by itself.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import nn

from ldm.models.text_encoder import NULL_PROMPT, AnyTextEncoder, TextEncoder
from ldm.utils.atomic_files import atomic_file
from ldm.utils.errors import UserError

FILE = "text_statistics.safetensors"
LEAST_DEVIATION = 0.1  # of the median channel's: a channel that hardly varies isn't blown up
BATCH = 64


def normalized(encoder: AnyTextEncoder, statistics: tuple[torch.Tensor, torch.Tensor]) -> TextEncoder:
    """A copy of an encoder whose states are `(states - mean) / deviation`; both are `(width,)`.

    UserError if no LayerNorm makes its states.
    """
    mean, deviation = statistics
    copied = copy.deepcopy(encoder)
    norm = output_norm(copied)
    assert isinstance(copied, TextEncoder)
    with torch.no_grad():
        norm.weight.div_(deviation.to(norm.weight))
        norm.bias.copy_((norm.bias - mean.to(norm.bias)) / deviation.to(norm.bias))
    return copied


def output_norm(encoder: AnyTextEncoder) -> nn.LayerNorm:
    """The LayerNorm whose output the states are; UserError where there is none, or where something else reads it."""
    refused = UserError("text.normalize: is for an encoder whose last layer is a LayerNorm; set it to false")
    if not isinstance(encoder, TextEncoder) or encoder.pooled_width:  # whose projection reads the states too
        raise refused
    outputs: dict[nn.LayerNorm, list[torch.Tensor]] = {}

    def keep(norm: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        assert isinstance(norm, nn.LayerNorm)
        outputs.setdefault(norm, []).append(output)

    norms = [
        module for module in encoder.model.modules() if isinstance(module, nn.LayerNorm) and module.bias is not None
    ]
    hooks = [norm.register_forward_hook(keep) for norm in norms]
    states = encoder.encode([NULL_PROMPT])
    for hook in hooks:
        hook.remove()
    for norm, (*earlier, last) in outputs.items():
        if not earlier and last.numel() == states.numel() and torch.equal(last.float().reshape(states.shape), states):
            return norm  # not one that several layers share
    raise refused


@torch.no_grad()
def measure(encoder: TextEncoder, captions: Iterable[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and deviation `(width,)` of the states of the captions' tokens, without padding, float32."""
    count, total, squares = 0, torch.zeros(encoder.width, dtype=torch.float64), torch.zeros(encoder.width).double()
    for batch in _batches(captions):
        tokens = encoder.token_ids(batch)
        states = encoder.embed_tokens(tokens).states[tokens[:, 1].flatten(1).bool()].double().cpu()  # (tokens, width)
        count, total, squares = count + len(states), total + states.sum(0), squares + states.square().sum(0)
    mean = total / count
    deviation = (squares / count - mean.square()).clamp(min=0).sqrt()
    return mean.float(), deviation.clamp(min=LEAST_DEVIATION * deviation.median()).float()


def _batches(captions: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(captions)
    while batch := list(itertools.islice(rest, BATCH)):
        yield batch


def statistics_of_run(
    folder: Path, encoder: AnyTextEncoder, captions: Iterable[str], data: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Those of a run, measured once for an encoder and `data`, a fingerprint of the captions' images; on one process.

    They are kept in the run's folder.
    """
    output_norm(encoder)
    assert isinstance(encoder, TextEncoder)
    file, about = folder / FILE, {"encoder": encoder.fingerprint(), "data": data}
    if file.exists():
        with safe_open(file, "pt") as kept:
            if kept.metadata() == about:
                return kept.get_tensor("mean"), kept.get_tensor("deviation")
    mean, deviation = measure(encoder, captions)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_file(file) as tmp_path:
        tmp_path.write_bytes(save({"mean": mean, "deviation": deviation}, about))
    return mean, deviation
