"""torch.compile for a U-Net in training: block by block."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.utils.checkpoint import checkpoint

from ldm.models.unet import HalfPrecisionXFormers, UNet
from ldm.utils.errors import UserError

BLOCKS = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, Attention)  # nearly all that a U-Net computes
NO_XFORMERS = "stage2.compile: xformers' kernels can't be compiled; set stage2.attention_backend=sdpa"
EACH = 8  # times that one block may be compiled: torch's own limit


def compile_blocks(unet: UNet, dynamic: bool = True, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles a U-Net's repeated blocks in place, each whole and by itself, when they are first called.

    Blocks of the same shape share their code. A `dynamic` one is compiled once for images and batches of all sizes,
    another one for each size. What is between the blocks stays as it is: DDP sends the gradients of one block while the
    next one's are computed. What can't be compiled is an error of torch's, never a silent fallback.

    It goes with FSDP if called after sharding. Evaluate within `torch.compiler.set_stance("force_eager")`. UserError
    where attention can't be compiled.
    """
    if any(isinstance(m, Attention) and isinstance(m.processor, HalfPrecisionXFormers) for m in unet.modules()):
        raise UserError(NO_XFORMERS)
    # For the rest of the process. DDP's optimiser is for one graph of the whole network, which it splits.
    torch._dynamo.config.optimize_ddp = False
    if dynamic:  # two sides that are equal in the first batch need not be in the next
        torch.fx.experimental._config.use_duck_shape = False
    if unet.is_gradient_checkpointing:
        unet.enable_gradient_checkpointing(_recomputed)
    blocks = list(_blocks(unet))
    # All blocks of a class count as one, so that more must be allowed than torch does.
    options: dict[str, Any] = {"recompile_limit": EACH * len(blocks)}
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:  # torch < 2.12, for all threads
        torch._dynamo.config.recompile_limit = options.pop("recompile_limit")
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic, fullgraph=True, **options)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks within which nothing is sharded by itself."""
    for child in module.children():
        if isinstance(child, BLOCKS) and not any(isinstance(m, FSDPModule) for m in child.modules() if m is not child):
            yield child
        else:
            yield from _blocks(child)


def _recomputed(module: nn.Module, *arguments: Any) -> Any:
    """diffusers' own way of gradient checkpointing, of whose caches dynamo warns."""
    return checkpoint(module, *arguments, use_reentrant=False)
