"""Tiled encoding and decoding equal the untiled functions, for every kind of autoencoder."""

from typing import Any

import pytest
import torch
from cases import for_each
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderTiny, VQModel
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from ldm.models import vae_tiling
from ldm.utils.errors import UserError

FACTOR, HEIGHT, WIDTH, TILE = 4, 104, 84, 32  # sides are multiples of the factor, and not of the tile


def convolutional(kind: type, **changes: Any) -> Any:
    options = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 4,
    }
    return kind(**{**options, **changes})


def deep_compression(layers: tuple[int, ...], **changes: Any) -> AutoencoderDC:
    """Linear attention at level 2 of 0, 1, 2."""
    both = {
        "block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16, 16),
        "layers_per_block": layers,
        "qkv_multiscales": ((), (), (5,)),
    }
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in both.items()}
    return AutoencoderDC(latent_channels=4, attention_head_dim=4, **(sides | changes))


MODELS = {
    "kl": lambda: convolutional(AutoencoderKL),
    "kl without attention and quant convolutions": lambda: convolutional(
        AutoencoderKL, mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False
    ),
    "vq": lambda: convolutional(VQModel, num_vq_embeddings=32),
    "vq with attention before the latents": lambda: convolutional(
        VQModel,
        num_vq_embeddings=32,
        down_block_types=("DownEncoderBlock2D", "AttnDownEncoderBlock2D", "DownEncoderBlock2D"),
        up_block_types=("UpDecoderBlock2D", "AttnUpDecoderBlock2D", "UpDecoderBlock2D"),
    ),
    "tiny": lambda: AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 2, 1),
        num_decoder_blocks=(1, 2, 1),
    ),
    "dc": lambda: deep_compression((1, 1, 1)),
    "dc that scales first": lambda: deep_compression((0, 1, 1), downsample_block_type="Conv"),
    "dc with a wider and deeper decoder": lambda: deep_compression(
        (1, 1, 1), decoder_block_out_channels=(16, 32, 32), decoder_layers_per_block=(2, 1, 2)
    ),
    "dc that interpolates": lambda: deep_compression((0, 1, 1), upsample_block_type="interpolate"),
}


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(0)
    vae = MODELS[request.param]().eval()
    if isinstance(vae, VQModel):  # its initial codes are so similar that the images differ by rounding errors only
        nn.init.normal_(vae.quantize.embedding.weight)
    return vae


def pixels() -> torch.Tensor:
    """Two images of noise on a slope: tiles differ in mean and variance, as in photographs; `(2, 3, HEIGHT, WIDTH)`."""
    slope = torch.linspace(-1, 1, HEIGHT)[:, None] * torch.linspace(0, 1, WIDTH)
    return (slope + torch.randn(2, 3, HEIGHT, WIDTH) * slope.abs() * 0.3).clamp(-1, 1)


def latents() -> torch.Tensor:
    return nn.functional.avg_pool2d(pixels(), FACTOR).repeat(1, 2, 1, 1)[:, :4] * 3


@torch.no_grad()
def untiled_latents(model: Any, x: torch.Tensor) -> torch.Tensor:
    encoded = model.encode(x)
    return encoded.latent_dist.parameters if "latent_dist" in encoded else encoded[0]


@torch.no_grad()
def untiled_pixels(model: Any, z: torch.Tensor) -> torch.Tensor:
    return model.decode(z).sample


@pytest.mark.parametrize("tile", [30, 48])  # 30 is rounded up to 32; with 48 only level 0 runs in tiles
def test_tiled_decode_equals_untiled_decode(model: Any, tile: int) -> None:
    z = latents()
    torch.testing.assert_close(vae_tiling.decode(model, z, tile), untiled_pixels(model, z), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("tile", [30, 48])
def test_tiled_encode_equals_untiled_encode(model: Any, tile: int) -> None:
    x = pixels()
    torch.testing.assert_close(vae_tiling.encode(model, x, tile), untiled_latents(model, x), atol=1e-4, rtol=1e-4)


def test_an_image_within_a_tile_equals_the_untiled_function_bit_for_bit(model: Any) -> None:
    z, x = latents(), pixels()
    assert torch.equal(vae_tiling.decode(model, z, HEIGHT), untiled_pixels(model, z))
    assert torch.equal(vae_tiling.encode(model, x, HEIGHT), untiled_latents(model, x))


@for_each("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_differs_by_rounding_only_also_along_tile_borders(dtype: torch.dtype) -> None:
    model, z = convolutional(AutoencoderKL).eval(), latents()
    exact = untiled_pixels(model, z)
    model, z = model.to(dtype), z.to(dtype)
    tiled = vae_tiling.decode(model, z, TILE)
    assert tiled.dtype == dtype
    assert (tiled - exact).abs().mean() <= 1.1 * (untiled_pixels(model, z) - exact).abs().mean()
    difference = (tiled - untiled_pixels(model, z)).float().abs().mean(dim=(0, 1, 2))  # of each column
    border = torch.arange(1, WIDTH + 1) % TILE <= 1  # on both sides
    assert difference[border].mean() <= 1.2 * difference[~border].mean()


def test_no_activation_is_larger_than_a_tile_with_its_halo() -> None:
    model = convolutional(AutoencoderKL).eval()
    largest = {"decoder": 0, "encoder": 0}

    def record(side: str, output: torch.Tensor) -> None:
        largest[side] = max(largest[side], output[0].numel())

    for side in largest:
        for module in getattr(model, side).modules():
            if isinstance(module, nn.Conv2d | nn.SiLU | ResnetBlock2D):
                module.register_forward_hook(lambda _module, _inputs, output, side=side: record(side, output))
    vae_tiling.decode(model, latents(), TILE)
    vae_tiling.encode(model, pixels(), TILE)
    # Level 0's halo is 6 pixels: an upsampler, two ResNet blocks (a single one in the encoder) and a last convolution.
    assert largest["decoder"] <= 16 * (TILE + 12) ** 2
    assert largest["encoder"] <= 16 * (TILE + 12) ** 2
    untiled_pixels(model, latents())
    assert largest["decoder"] == 16 * HEIGHT * WIDTH


def test_a_model_is_unchanged_after_tiling_even_after_an_error() -> None:
    model, z = convolutional(AutoencoderKL).eval(), latents()
    before = untiled_pixels(model, z)
    stop = model.decoder.conv_out.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        vae_tiling.decode(model, z, TILE)
    stop.remove()
    vae_tiling.decode(model, z, TILE)
    assert torch.equal(untiled_pixels(model, z), before)
    assert not any("forward" in vars(module) for module in model.modules())


@for_each(
    "model",
    [
        nn.Identity(),
        AutoencoderTiny(upsample_fn="bilinear"),
        VQModel(block_out_channels=(32,), norm_type="spatial"),
    ],
)
def test_a_model_that_cannot_be_tiled_is_refused(model: nn.Module) -> None:
    with pytest.raises(UserError, match=f"this {type(model).__name__} can't be tiled"):
        vae_tiling.decode(model, torch.zeros(1, 4, 8, 8), TILE)
