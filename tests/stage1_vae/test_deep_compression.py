"""AutoencoderDC in training: its presets, its own decoder, statistics, resuming, and plain diffusers' pixels."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderDC
from diffusers.models.autoencoders.autoencoder_dc import EfficientViTBlock
from safetensors.torch import load_file
from torch import nn

from ldm.config.schema import Config, Stage1Config
from ldm.data.dataset import iter_images
from ldm.data.index import Index
from ldm.models import autoencoder
from stage1_vae.model import LatentTransform, Reconstruction
from stage1_vae.train import train

Drawings = Callable[..., tuple[Config, Index]]
SMALL = (
    "stage1={model: dc-f4-small, channels: [4, 8, 8], decoder_channels: [8, 8, 16], decoder_layers: 2}",
    "stage1.latent_channels=4",
    "stage1.batch=4",
    "stage1.gan={start: 1, warmup: 1, ramp: 1, channels: 8, layers: 1}",
    "stage1.checkpoint_every=3",
    "run.precision=no",
)


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "autoencoder/diffusion_pytorch_model.safetensors")


def test_plain_diffusers_opens_what_was_trained_with_the_same_latents_and_pixels(
    tmp_path: Path, drawings: Drawings
) -> None:
    settings, index = drawings(*SMALL, "stage1.steps=4")
    images = index.select("train").first(8)
    train(settings, images)
    ours = autoencoder.load(tmp_path / "run/autoencoder")
    plain = AutoencoderDC.from_pretrained(tmp_path / "run/autoencoder")
    scale, x = plain.config.scaling_factor, next(iter_images(images))
    with torch.no_grad():
        latents = plain.encode(x).latent * scale
        pixels = plain.decode(latents / scale).sample
    assert torch.equal(ours.encode(x), latents)
    assert torch.equal(ours.decode(latents), pixels)
    assert pixels.shape == x.shape
    torch.testing.assert_close(latents.std(correction=0), torch.tensor(1.0), atol=1e-3, rtol=0)
    assert json.loads((tmp_path / "run/autoencoder/latents.json").read_text())["images"] == 8


def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path: Path, drawings: Drawings) -> None:
    settings, index = drawings(*SMALL, "stage1.steps=6")
    images = index.select("train").first(8)
    train(settings, images)
    run = tmp_path / "run"
    expected = weights(run)
    shutil.rmtree(run / "stage1/checkpoints/step-000006")
    shutil.rmtree(run / "autoencoder")
    train(settings, images)
    resumed = weights(run)
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in expected.items())


def test_training_only_the_decoder_leaves_the_latents(tmp_path: Path, drawings: Drawings) -> None:
    shape = {"channels": (4, 8, 8), "latent_channels": 4, "layers": 1, "mid_attention": False}
    start = autoencoder.Autoencoder(autoencoder.build(Stage1Config(model="dc-f32", **shape), 16))
    start.save(tmp_path / "start")
    settings, index = drawings(
        "stage1={model: dc-f4-small, channels: [4, 8, 8], latent_channels: 4, train: decoder, batch: 4, steps: 2}",
        f"stage1.init_from={tmp_path / 'start'}",
    )
    images = index.select("train").first(8)
    train(settings, images)
    tuned, x = autoencoder.load(tmp_path / "run/autoencoder"), next(iter_images(images))
    assert torch.equal(tuned.encode(x), start.encode(x))
    assert not torch.equal(tuned.decode(tuned.encode(x)), start.decode(start.encode(x)))


@pytest.mark.parametrize("model", ["dc-f4-small", "dc-f8-small"])
def test_small_presets_have_residual_blocks_only_and_at_most_two_million_parameters(
    model: str, drawings: Drawings
) -> None:
    stage = drawings(f"stage1.model={model}")[0].stage1
    with torch.device("meta"):
        vae = autoencoder.build(stage, 64)
        attending = autoencoder.build(stage.model_copy(update={"mid_attention": True}), 64)
    assert not any(isinstance(module, EfficientViTBlock) for module in vae.modules())
    assert isinstance(attending.encoder.down_blocks[-1][0], EfficientViTBlock)
    assert isinstance(attending.decoder.up_blocks[-1][0], EfficientViTBlock)
    assert 0.7e6 < sum(p.numel() for p in vae.parameters()) < 2e6
    assert (stage.factor, stage.latent_channels) == {"dc-f4-small": (4, 8), "dc-f8-small": (8, 16)}[model]


def test_decoder_keys_change_the_decoder_and_leave_the_encoder() -> None:
    shape = {"model": "dc-f32", "channels": (4, 8), "layers": 1, "latent_channels": 4, "mid_attention": False}
    changes = [{}, {"decoder_channels": (8, 16)}, {"decoder_layers": 3}]
    plain, wider, deeper = (autoencoder.build(Stage1Config(**shape, **change), 16) for change in changes)

    def shapes(module: nn.Module) -> dict[str, torch.Size]:
        return {name: p.shape for name, p in module.named_parameters()}

    assert shapes(plain.encoder) == shapes(wider.encoder) == shapes(deeper.encoder)
    assert wider.decoder.conv_out.in_channels == 2 * plain.decoder.conv_out.in_channels == 8
    assert [len(block) for block in deeper.decoder.up_blocks] == [1 + 3, 3]  # an upsampler leads to the image's level
    assert autoencoder.factor(wider) == 2


@pytest.mark.parametrize("layers", [(1, 1), (0, 1)])  # without blocks at the image's level, the last one upsamples
def test_the_last_layer_is_the_convolution_that_gives_pixels(layers: tuple[int, int]) -> None:
    options = {
        "block_out_channels": (8, 8),
        "layers_per_block": layers,
        "qkv_multiscales": ((), ()),
    }
    sides = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in options.items()}
    model = Reconstruction(AutoencoderDC(latent_channels=4, **sides), Stage1Config())
    rebuilt = model(torch.zeros(1, 3, 8, 8), torch.zeros(1, 4, 4, 4)).pixels
    (gradient,) = torch.autograd.grad(rebuilt.sum(), model.last_layer)
    assert float(gradient.abs().sum()) > 0
    assert rebuilt.shape == (1, 3, 8, 8)


def test_transformed_latents_decode_to_images_of_their_size() -> None:
    stage = Stage1Config(model="dc-f4-small", channels=(4, 8, 8), latent_channels=4, layers=1, mid_attention=False)
    model, x = Reconstruction(autoencoder.build(stage, 16), stage), torch.rand(2, 3, 16, 24) * 2 - 1
    eps = torch.randn(2, 4, 4, 6)
    rebuilt = model(x, eps, LatentTransform(1, 3, 5))
    assert rebuilt.pixels.shape == (2, 3, 20, 12)
    torch.testing.assert_close(model(x, eps).pixels, model.vae(x).sample)  # the latents are no distribution
