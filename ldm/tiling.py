"""Tiled encode and decode: large pictures on little memory, equal to the whole function, with nothing to blend.

What is small runs whole: the low resolutions, and with them attention. Each larger level of resolution runs in tiles
before the next begins. A tile is cut with a halo as wide as the receptive field of its level, so that its core is what
the whole picture would give there; cores are cropped and placed side by side. At the picture's own borders there is no
halo: the zeros that convolutions see there are the whole picture's too.

GroupNorm needs the mean and variance of the whole picture (a tile's own would shift its colours). They are measured
norm by norm: all tiles run as far as the first norm whose statistics are unknown. That is exact, and makes a level of n
norms take about n/2 + 1 times as long. To guess all statistics at once and repeat takes as long for an error of a tenth
of a grey level, and longer for pictures with plain backgrounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product, zip_longest
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.attention_processor import Attention, SanaMultiscaleLinearAttention
from diffusers.models.autoencoders.autoencoder_dc import DCUpBlock2d
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ldm.errors import UserError

Layer = Callable[..., torch.Tensor]
Layers = list[tuple[int, Layer]]  # in order, each with its level: it works at 1/2^level of the picture's side
Span = tuple[int, int, int, int]  # of a tile along one side: halo from, core from, core to, halo to
Known = dict[nn.Module, tuple[torch.Tensor, torch.Tensor]]  # a norm is x·scale + shift, each (N, C, 1, 1) float32


@torch.no_grad()
def decode(model: Any, z: torch.Tensor, tile: int) -> torch.Tensor:
    """`model.decode(z).sample` with about one tile's memory.

    `z` `(N, C, h, w)` in the model's own scale, on its device, in its dtype → `(N, 3, h·factor, w·factor)`. `tile` is
    the side of a tile's core in pixels, rounded up to a multiple of the factor. Raises UserError for a model that
    can't be tiled.
    """
    layers, widths = _decoder(model)
    factor = 2 ** (len(widths) - 1)
    tile = math.ceil(tile / factor) * factor
    whole = _first_whole(layers, widths, z.shape[-2] * z.shape[-1] * factor**2, tile)
    x = _run([layer for at, layer in layers if at >= whole], z)
    for level in range(whole - 1, -1, -1):  # from pixels of level + 1, twice as wide
        stage = [layer for at, layer in layers if at == level]
        x = _in_tiles(stage, x, tile >> level + 1, math.ceil(_reach(stage) / 2))
    return x


@torch.no_grad()
def encode(model: Any, pixels: torch.Tensor, tile: int) -> torch.Tensor:
    """The latents of `model.encode(pixels)`, of an AutoencoderKL the moments, with about one tile's memory.

    `pixels` `(N, 3, H, W)` on the model's device, in its dtype, sides multiples of the factor → `(N, C, h, w)` in the
    model's own scale; moments are means and log-variances, so twice the channels. The rest as for `decode`.
    """
    layers, widths = _encoder(model)
    factor = 2 ** (len(widths) - 1)
    tile = math.ceil(tile / factor) * factor
    whole = _first_whole(layers, widths, pixels.shape[-2] * pixels.shape[-1], tile)
    x = pixels
    for level in range(whole):  # to pixels of level + 1: an even halo, for strides to fall where the whole's do
        stage = [layer for at, layer in layers if at == level]
        x = _in_tiles(stage, x, tile >> level, math.ceil(_reach(stage) / 2) * 2)
    return _run([layer for at, layer in layers if at >= whole], x)


def _decoder(model: Any) -> tuple[Layers, list[int]]:
    """The decoder's layers from the latents to the picture, and the channels of each level from 0."""
    _check(model)
    config, decoder = model.config, model.decoder
    if isinstance(model, AutoencoderTiny):
        level = len(config.num_decoder_blocks) - 1
        layers: Layers = [(level, lambda z: torch.tanh(z / 3) * 3)]
        for layer in decoder.layers:
            level -= isinstance(layer, nn.Upsample)
            layers.append((level, layer))
        return [*layers, (0, lambda x: x.mul(2).sub(1))], config.decoder_block_out_channels[::-1]
    top = len(decoder.up_blocks) - 1
    if isinstance(model, AutoencoderDC):
        layers = [(top, partial(_dc_in, decoder))]
        layers += [(level, layer) for level in range(top, -1, -1) for layer in decoder.up_blocks[level]]
        last = (lambda x: decoder.norm_out(x.movedim(1, -1)).movedim(-1, 1), decoder.conv_act, decoder.conv_out)
        return [*layers, *((0, layer) for layer in last)], config.decoder_block_out_channels
    # Codes are looked up in strips: the distances to all of them at once may be larger than the picture.
    quantize = [lambda z: torch.cat([model.quantize(s)[0] for s in z.split(16, 2)], 2)] * isinstance(model, VQModel)
    first = (*quantize, model.post_quant_conv, decoder.conv_in, decoder.mid_block)
    layers = [(top, layer) for layer in first if layer is not None]
    for i, block in enumerate(decoder.up_blocks):
        layers += [(top - i, layer) for layer in _interleaved(block)]
        layers += [(top - i - 1, layer) for layer in block.upsamplers or ()]
    last = (decoder.conv_norm_out, decoder.conv_act, decoder.conv_out)
    return [*layers, *((0, layer) for layer in last)], config.block_out_channels


def _encoder(model: Any) -> tuple[Layers, list[int]]:
    """The encoder's layers from the picture to the latents, and the channels of each level from 0."""
    _check(model)
    config, encoder = model.config, model.encoder
    if isinstance(model, AutoencoderTiny):
        level, layers = 0, [(0, lambda x: x.add(1).div(2))]
        for layer in encoder.layers:
            layers.append((level, layer))
            level += isinstance(layer, nn.Conv2d) and layer.stride == (2, 2)
        return layers, config.encoder_block_out_channels
    top = len(encoder.down_blocks) - 1
    layers = [(0, encoder.conv_in)]
    if isinstance(model, AutoencoderDC):
        layers += [(level, layer) for level, block in enumerate(encoder.down_blocks) for layer in block]
        return [*layers, (top, partial(_dc_out, encoder))], config.encoder_block_out_channels
    for level, block in enumerate(encoder.down_blocks):
        layers += [(level, layer) for layer in (*_interleaved(block), *(block.downsamplers or ()))]
    last = (encoder.mid_block, encoder.conv_norm_out, encoder.conv_act, encoder.conv_out, model.quant_conv)
    return [*layers, *((top, layer) for layer in last if layer is not None)], config.block_out_channels


def _check(model: Any) -> None:
    """Refuses what the layers above would not say of it: norms that look at the latents too, other upsampling."""
    known = isinstance(model, AutoencoderKL | VQModel | AutoencoderTiny | AutoencoderDC)
    usual = {"norm_type": "group", "upsampling_scaling_factor": 2, "upsample_fn": "nearest"}
    unusual = [
        f" with {key} {model.config[key]!r}"
        for key in usual
        if known and model.config.get(key, usual[key]) != usual[key]
    ]
    if not known or unusual:
        raise UserError(f"{type(model).__name__}{''.join(unusual)} can't be tiled; encode and decode it whole")


def _interleaved(block: nn.Module) -> list[nn.Module]:
    """A block's ResNet blocks, each followed by its attention if it has one."""
    pairs = zip_longest(block.resnets, getattr(block, "attentions", ()))
    return [layer for pair in pairs for layer in pair if layer is not None]


def _dc_in(decoder: Any, z: torch.Tensor) -> torch.Tensor:
    x = decoder.conv_in(z)
    return x + z.repeat_interleave(decoder.in_shortcut_repeats, dim=1) if decoder.in_shortcut else x


def _dc_out(encoder: Any, x: torch.Tensor) -> torch.Tensor:
    z = encoder.conv_out(x)
    return z + x.unflatten(1, (z.shape[1], -1)).mean(dim=2) if encoder.out_shortcut else z


def _first_whole(layers: Layers, widths: list[int], area: int, tile: int) -> int:
    """The first level that runs whole, as all after it do: the latents', of attention, or no larger than a tile of 0."""
    attention = (Attention, SanaMultiscaleLinearAttention)
    levels = [at for at, layer in layers if any(isinstance(m, attention) for m in _modules(layer))]
    for level in range(len(widths)):
        if max(widths[max(level - 1, 0) : level + 2]) * area <= max(widths[:2]) * tile**2 * 4**level:
            levels.append(level)
    return min([len(widths) - 1, *levels])


def _reach(layers: list[Layer]) -> int:
    """How far the layers of one level look beyond a pixel, in its pixels."""
    reach = 0
    for layer in layers:
        coarse = isinstance(layer, DCUpBlock2d) and not layer.interpolate  # it convolves first, in pixels twice as wide
        reach += sum(m.kernel_size[0] // 2 << coarse for m in _modules(layer) if isinstance(m, nn.Conv2d))
    return reach


def _in_tiles(layers: list[Layer], x: torch.Tensor, step: int, halo: int) -> torch.Tensor:
    """The layers' output for the whole of `x`, by tiles of `step` with `halo` more on every side."""
    tiles = list(product(_spans(x.shape[-2], step, halo), _spans(x.shape[-1], step, halo)))
    if len(tiles) == 1:
        return _run(layers, x)
    norms = [m for layer in layers for m in _modules(layer) if isinstance(m, nn.GroupNorm)]
    known: Known = {}
    out = None
    with _normalising(norms, known):
        while len(known) < len(norms):
            moments = []
            for rows, columns in tiles:
                try:
                    _run(layers, x[..., rows[0] : rows[3], columns[0] : columns[3]])
                except _UnknownError as reached:
                    norm, core = reached.norm, _core(reached.x, rows, columns)
                    moments.append(_moments(core, norm.num_groups))
            known[norm] = _affine(norm, *torch.stack(moments).sum(0), x.device)
        for rows, columns in tiles:
            y = _run(layers, x[..., rows[0] : rows[3], columns[0] : columns[3]])
            if out is None:
                height = x.shape[-2] * y.shape[-2] // (rows[3] - rows[0])
                width = x.shape[-1] * y.shape[-1] // (columns[3] - columns[0])
                out = y.new_empty(*y.shape[:2], height, width)
            place = _core(out, (0, rows[1], rows[2], x.shape[-2]), (0, columns[1], columns[2], x.shape[-1]))
            place.copy_(_core(y, rows, columns))
    assert out is not None
    return out


def _spans(side: int, step: int, halo: int) -> Iterator[Span]:
    for start in range(0, side, step):
        end = min(start + step, side)
        yield max(start - halo, 0), start, end, min(end + halo, side)


def _core(y: torch.Tensor, rows: Span, columns: Span) -> torch.Tensor:
    """Of `y`, which covers the spans at whatever scale, the part that covers their cores."""
    for dim, (begin, start, end, stop) in ((-2, rows), (-1, columns)):
        first, last = ((edge - begin) * y.shape[dim] // (stop - begin) for edge in (start, end))
        y = y.narrow(dim, first, last - first)
    return y


class _UnknownError(Exception):
    """A norm whose statistics are still to be measured was reached, by `x`."""

    def __init__(self, norm: nn.GroupNorm, x: torch.Tensor):
        self.norm, self.x = norm, x


@contextmanager
def _normalising(norms: list[nn.GroupNorm], known: Known) -> Iterator[None]:
    """Within it a norm does what is known of it, and one of which nothing is known ends the run."""

    def forward(norm: nn.GroupNorm, x: torch.Tensor) -> torch.Tensor:
        if norm not in known:
            raise _UnknownError(norm, x)
        scale, shift = known[norm]
        return torch.addcmul(shift, x, scale).to(x.dtype)

    try:
        for norm in norms:
            norm.forward = partial(forward, norm)  # hides the class's own
        yield
    finally:
        for norm in norms:
            del norm.forward


def _moments(x: torch.Tensor, groups: int) -> torch.Tensor:
    """Count, sum and sum of squares over each sample's groups: `(3, N, groups)` float64, on the CPU: MPS has none."""
    x = x.float().unflatten(1, (groups, -1))  # (N, groups, C/groups, h, w)
    var, mean = (each.cpu().double() for each in torch.var_mean(x, dim=(2, 3, 4), correction=0))
    return torch.stack([torch.ones_like(mean), mean, var + mean.square()]) * x[0, 0].numel()


def _affine(
    norm: nn.GroupNorm, count: torch.Tensor, total: torch.Tensor, squares: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    mean = total / count
    scale = (squares / count - mean.square() + norm.eps).rsqrt()[
        ..., None
    ]  # (N, groups, 1), then (N, groups, C/groups)
    weight, bias = (each.double().cpu().view(norm.num_groups, -1) for each in (norm.weight, norm.bias))
    scale, shift = weight * scale, bias - weight * scale * mean[..., None]
    return tuple(each.flatten(1)[..., None, None].to(device, torch.float32) for each in (scale, shift))
