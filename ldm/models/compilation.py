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

from ldm.models.attention import HalfPrecisionXFormers
from ldm.models.unet import UNet
from ldm.utils.errors import UserError

BLOCKS = (ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, Attention)  # nearly all of a U-Net's computation
NO_XFORMERS = "stage2.compile: xformers' kernels can't be compiled; set stage2.attention_backend=sdpa"
RECOMPILE_LIMIT = 8  # per block: torch's own default


def compile_blocks(unet: UNet, dynamic: bool = True, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compiles a U-Net's repeated blocks in place, each as one graph, at their first call.

    Blocks of the same shape share their code. With `dynamic` a block is compiled once for images and batches of all
    sizes, otherwise once per size. The code between blocks is not compiled, so that DDP sends the gradients of one
    block while it computes the next one's. A block that can't be compiled raises torch's error, without a fallback.

    With FSDP, call it after sharding. Evaluate within `torch.compiler.set_stance("force_eager")`. UserError if
    attention can't be compiled.
    """
    if any(isinstance(m, Attention) and isinstance(m.processor, HalfPrecisionXFormers) for m in unet.modules()):
        raise UserError(NO_XFORMERS)
    # For the rest of the process. DDP's optimizer splits one graph of the whole network, of which there is none here.
    torch._dynamo.config.optimize_ddp = False
    if dynamic:  # height and width, equal in the first batch, may differ in the next
        torch.fx.experimental._config.use_duck_shape = False
    if unet.is_gradient_checkpointing:
        unet.enable_gradient_checkpointing(_recomputed)
    blocks = list(_blocks(unet))
    # torch counts compilations per forward method, which all blocks of a class share.
    options: dict[str, Any] = {"recompile_limit": RECOMPILE_LIMIT * len(blocks)}
    if "recompile_limit" not in inspect.signature(torch.compile).parameters:  # torch < 2.12, for all threads
        torch._dynamo.config.recompile_limit = options.pop("recompile_limit")
    for block in blocks:
        block.compile(backend=backend, dynamic=dynamic, fullgraph=True, **options)


def _blocks(module: nn.Module) -> Iterator[nn.Module]:
    """The outermost blocks that contain no module that is sharded by itself."""
    for child in module.children():
        if isinstance(child, BLOCKS) and not any(isinstance(m, FSDPModule) for m in child.modules() if m is not child):
            yield child
        else:
            yield from _blocks(child)


def _recomputed(module: nn.Module, *arguments: Any) -> Any:
    """Gradient checkpointing as in diffusers, whose own function makes dynamo warn about its caches."""
    return checkpoint(module, *arguments, use_reentrant=False)
