"""Tiled encode and decode: large images in little memory, with the result of the untiled function, and no blending.

Low resolutions, and with them attention, run untiled. Each higher resolution level runs in tiles before the next one
begins. A tile is cropped with a halo as wide as the receptive field of its level, so that its core equals the untiled
result; cores are placed side by side. There is no halo at the image's own borders, where the untiled function pads with
zeros too. Memory holds one tile's activations, and a level's input and output: at most the image at half its side.

GroupNorm needs the mean and variance of the whole image (a tile's own would shift its colours). They are measured norm
by norm: all tiles run as far as the first norm whose statistics are unknown. That is exact, and a level of n norms
takes about n/2 + 1 times as long. Estimating all statistics at once and iterating is no faster for an error of a tenth
of a grey level, and slower on plain backgrounds.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product, zip_longest
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.attention_processor import Attention, SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.autoencoder_dc import DCDownBlock2d, DCUpBlock2d
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from ldm.utils.errors import UserError

Layer = Callable[..., torch.Tensor]
Span = tuple[int, int, int, int]  # a tile along one side: halo from, core from, core to, halo to
ScaleShifts = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # a norm is x·scale + shift, (N, C, 1, 1) float32 each


@torch.no_grad()
def decode(model: Any, z: torch.Tensor, tile: int) -> torch.Tensor:
    """`model.decode(z).sample` in about one tile's memory.

    `z` `(N, C, h, w)` in the model's own scale, device and dtype → `(N, 3, h·factor, w·factor)`. `tile` is the side
    of a tile's core in pixels, rounded up to a multiple of the factor. UserError for a model that can't be tiled.
    """
    layers, widths = _decoder(model)
    top = len(widths) - 1
    tile = math.ceil(tile / 2**top) << top
    levels = _levels(layers, top)
    untiled = _first_untiled(levels, widths, z.shape[-2] * z.shape[-1] * 4**top, tile)
    x = _run([layer for level in range(top, untiled - 1, -1) for layer in levels[level]], z)
    for level in range(untiled - 1, -1, -1):  # from pixels of level + 1, twice as wide
        x = _in_tiles(levels[level], x, tile >> level + 1, math.ceil(_halo(levels[level]) / 2))
    return x


@torch.no_grad()
def encode(model: Any, pixels: torch.Tensor, tile: int) -> torch.Tensor:
    """The latents of `model.encode(pixels)`, for an AutoencoderKL the moments, in about one tile's memory.

    `pixels` `(N, 3, H, W)` on the model's device, in its dtype, sides multiples of the factor → `(N, C, h, w)` in the
    model's own scale; moments are means and log-variances, so twice the channels. `tile` and errors as for `decode`.
    """
    layers, widths = _encoder(model)
    top = len(widths) - 1
    tile = math.ceil(tile / 2**top) << top
    levels = _levels(layers, 0)
    untiled = _first_untiled(levels, widths, pixels.shape[-2] * pixels.shape[-1], tile)
    x = pixels
    for level in range(untiled):  # to pixels of level + 1: an even halo keeps strides aligned with the untiled ones
        x = _in_tiles(levels[level], x, tile >> level, math.ceil(_halo(levels[level]) / 2) * 2)
    return _run([layer for level in range(untiled, top + 1) for layer in levels[level]], x)


def _decoder(model: Any) -> tuple[list[Layer], list[int]]:
    """The decoder's layers from latents to image, and the channels of each level, from the image's level on."""
    _check(model)
    config, decoder = model.config, model.decoder
    if isinstance(model, AutoencoderTiny):
        layers = [lambda z: torch.tanh(z / 3) * 3, *decoder.layers, lambda x: x.mul(2).sub(1)]
        return layers, config.decoder_block_out_channels[::-1]
    if isinstance(model, AutoencoderDC):
        blocks = [layer for block in reversed(decoder.up_blocks) for layer in block]
        last: list[Layer] = [partial(_dc_norm, decoder), decoder.conv_act, decoder.conv_out]
        return [partial(_dc_in, decoder), *blocks, *last], config.decoder_block_out_channels
    first: list[Layer | None] = [model.post_quant_conv, decoder.conv_in, decoder.mid_block]
    if isinstance(model, VQModel):  # in strips: all distances to codes at once may exceed the image's memory
        first.insert(0, lambda z: torch.cat([model.quantize(strip)[0] for strip in z.split(16, dim=2)], dim=2))
    blocks = [layer for block in decoder.up_blocks for layer in _parts(block, block.upsamplers)]
    layers = [*first, *blocks, decoder.conv_norm_out, decoder.conv_act, decoder.conv_out]
    return [layer for layer in layers if layer is not None], config.block_out_channels


def _encoder(model: Any) -> tuple[list[Layer], list[int]]:
    """The encoder's layers from image to latents, and the channels of each level, from the image's level on."""
    _check(model)
    config, encoder = model.config, model.encoder
    if isinstance(model, AutoencoderTiny):
        return [lambda x: x.add(1).div(2), *encoder.layers], config.encoder_block_out_channels
    if isinstance(model, AutoencoderDC):
        blocks = [layer for block in encoder.down_blocks for layer in block]
        return [encoder.conv_in, *blocks, partial(_dc_out, encoder)], config.encoder_block_out_channels
    blocks = [layer for block in encoder.down_blocks for layer in _parts(block, block.downsamplers)]
    last = [encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, model.quant_conv]
    return [layer for layer in (encoder.conv_in, *blocks, *last) if layer is not None], config.block_out_channels


def _check(model: Any) -> None:
    """UserError for norms that depend on the latents, for upsampling that interpolates, and for other classes."""
    known_class = isinstance(model, AutoencoderKL | VQModel | AutoencoderTiny | AutoencoderDC)
    supported = {"norm_type": "group", "upsampling_scaling_factor": 2, "upsample_fn": "nearest"}
    if not known_class or any(model.config.get(key, value) != value for key, value in supported.items()):
        raise UserError(f"this {type(model).__name__} can't be tiled; encode and decode it whole")


def _parts(block: Any, scalers: nn.ModuleList | None) -> list[Layer]:
    """A block's ResNet blocks, each followed by its attention if it has one, and its up- or downsamplers."""
    pairs = zip_longest(block.resnets, getattr(block, "attentions", ()))
    return [*(layer for pair in pairs for layer in pair if layer is not None), *(scalers or ())]


def _dc_in(decoder: Any, z: torch.Tensor) -> torch.Tensor:
    x = decoder.conv_in(z)
    return x + z.repeat_interleave(decoder.in_shortcut_repeats, dim=1) if decoder.in_shortcut else x


def _dc_norm(decoder: Any, x: torch.Tensor) -> torch.Tensor:
    return decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1)  # over the channels of each pixel


def _dc_out(encoder: Any, x: torch.Tensor) -> torch.Tensor:
    z = encoder.conv_out(x)
    return z + x.unflatten(1, (z.shape[1], -1)).mean(dim=2) if encoder.out_shortcut else z


def _levels(layers: list[Layer], level: int) -> defaultdict[int, list[Layer]]:
    """The layers of each level, which work at 1/2^level of the image's side; the first layer is of `level`."""
    levels = defaultdict(list)
    for layer in layers:
        level -= isinstance(layer, Upsample2D | nn.Upsample | DCUpBlock2d)
        levels[level].append(layer)
        strided = isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)  # AutoencoderTiny's
        level += strided or isinstance(layer, Downsample2D | DCDownBlock2d)
    return levels


def _first_untiled(levels: dict[int, list[Layer]], widths: list[int], area: int, tile: int) -> int:
    """The first level that runs untiled, as do all after it: it has attention, or needs no more memory than a tile."""
    attention = (Attention, SanaMultiscaleLinearAttention)
    untiled = [level for level, layers in levels.items() if any(_modules(layers, attention))]
    for level in range(len(widths)):
        if max(widths[max(level - 1, 0) : level + 2]) * area <= max(widths[:2]) * tile**2 * 4**level:
            untiled.append(level)
    return min([len(widths) - 1, *untiled])  # the latents' level always


def _halo(layers: list[Layer]) -> int:
    """The radius of the layers' receptive field, in pixels of their level."""
    # The convolution before a pixel shuffle works on pixels twice as wide, so it counts twice.
    shuffled = [
        conv for up in _modules(layers, DCUpBlock2d) if not up.interpolate for conv in _modules([up], nn.Conv2d)
    ]
    return sum(conv.kernel_size[0] // 2 for conv in (*_modules(layers, nn.Conv2d), *shuffled))


def _in_tiles(layers: list[Layer], x: torch.Tensor, step: int, halo: int) -> torch.Tensor:
    """The layers' output for `x`, computed in tiles of `step` with `halo` more on every side."""
    tiles = list(product(_spans(x.shape[-2], step, halo), _spans(x.shape[-1], step, halo)))
    if len(tiles) == 1:
        return _run(layers, x)
    norms = _modules(layers, nn.GroupNorm)
    affines: ScaleShifts = {}
    out = None
    with _with_statistics(norms, affines):
        while len(affines) < len(norms):
            moments = []
            for rows, columns in tiles:
                try:
                    _run(layers, x[..., rows[0] : rows[3], columns[0] : columns[3]])
                except _UnknownError as reached:
                    norm = reached.norm
                    moments.append(_moments(_core(reached.x, rows, columns), norm.num_groups))
            affines[norm] = _affine(norm, torch.stack(moments).sum(0), x.device)
        for rows, columns in tiles:
            y = _run(layers, x[..., rows[0] : rows[3], columns[0] : columns[3]])
            if out is None:
                height = x.shape[-2] * y.shape[-2] // (rows[3] - rows[0])
                width = x.shape[-1] * y.shape[-1] // (columns[3] - columns[0])
                out = y.new_empty(*y.shape[:2], height, width)
            target = _core(out, (0, rows[1], rows[2], x.shape[-2]), (0, columns[1], columns[2], x.shape[-1]))
            target.copy_(_core(y, rows, columns))
    assert out is not None
    return out


def _spans(side: int, step: int, halo: int) -> Iterator[Span]:
    for start in range(0, side, step):
        end = min(start + step, side)
        yield max(start - halo, 0), start, end, min(end + halo, side)


def _core(y: torch.Tensor, rows: Span, columns: Span) -> torch.Tensor:
    """The part of `y` that covers the cores, where `y` covers the whole spans, at any scale."""
    for dim, (begin, start, end, stop) in ((-2, rows), (-1, columns)):
        first, last = ((edge - begin) * y.shape[dim] // (stop - begin) for edge in (start, end))
        y = y.narrow(dim, first, last - first)
    return y


class _UnknownError(Exception):
    """Raised when `x` reaches a norm whose statistics are not measured yet."""

    def __init__(self, norm: nn.GroupNorm, x: torch.Tensor):
        self.norm, self.x = norm, x


@contextmanager
def _with_statistics(norms: list[nn.GroupNorm], affines: ScaleShifts) -> Iterator[None]:
    """Within it, norms apply their measured scale and shift; one that has none raises `_UnknownError`."""

    def forward(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        if norm not in affines:
            raise _UnknownError(norm, x)
        scale, shift = affines[norm]
        return torch.addcmul(shift, x, scale).to(x.dtype)

    try:
        for norm in norms:
            norm.__dict__["forward"] = partial(forward, norm)  # shadows the method of the class
        yield
    finally:
        for norm in norms:
            del norm.__dict__["forward"]


def _moments(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Count, sum and sum of squares of each sample's groups, `(3, N, groups)` float64; on the CPU, as MPS has none."""
    x = x.float().unflatten(1, (groups, -1))  # (N, groups, C/groups, h, w)
    var, mean = (tensor.cpu().double() for tensor in torch.var_mean(x, dim=(2, 3, 4), correction=0))
    return torch.stack([torch.ones_like(mean), mean, var + mean.square()]) * x[0, 0].numel()


def _affine(norm: nn.GroupNorm, moments: torch.Tensor, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The scale and shift, `(N, C, 1, 1)` float32 each, that a norm applies to inputs with these moments."""
    count, total, squares = moments[..., None]  # (N, groups, 1) each
    mean = total / count
    weight, bias = (tensor.double().cpu().view(norm.num_groups, -1) for tensor in (norm.weight, norm.bias))
    scale = weight / (squares / count - mean.square() + norm.eps).sqrt()  # (N, groups, C/groups)
    shift = bias - mean * scale
    return tuple(tensor.flatten(1)[..., None, None].to(device, torch.float32) for tensor in (scale, shift))


def _run(layers: list[Layer], x: torch.Tensor) -> torch.Tensor:
    for layer in layers:
        x = layer(x, None) if isinstance(layer, ResnetBlock2D) else layer(x)  # no time embedding
    return x


def _modules(layers: list[Layer], kind: Any) -> list[Any]:
    inside = (module for layer in layers if isinstance(layer, nn.Module) for module in layer.modules())
    return [module for module in inside if isinstance(module, kind)]
