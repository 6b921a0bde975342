"""Residual paths of a new autoencoder: what they add to an image, and what they leave as it was."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, VQModel
from torch import nn

from ldm.config.schema import Stage1Config
from ldm.models import autoencoder
from ldm.models.identity_paths import add_identity_paths, channel_map

X = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=["kl", "vq-f4-small"])
def vae(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    return autoencoder.build(Stage1Config(model=request.param, channels=(16, 32), layers=1, norm_num_groups=8), 16)


@pytest.fixture
def identities(vae: nn.Module) -> nn.Module:
    """The autoencoder with the identities alone."""
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.zero_()
    add_identity_paths(vae)
    return vae


def test_down_is_the_mean_and_up_the_copy_of_pixels(identities: nn.Module) -> None:
    down = identities.encoder.down_blocks[0].downsamplers[0]
    up = identities.decoder.up_blocks[0].upsamplers[0]
    torch.testing.assert_close(down(X), F.avg_pool2d(X, 2))
    torch.testing.assert_close(up(X.repeat(1, 2, 1, 1)), F.interpolate(X.repeat(1, 2, 1, 1), scale_factor=2.0))


def test_wider_is_a_copy_of_channels_and_narrower_keeps_their_variance(identities: nn.Module) -> None:
    wider = identities.encoder.down_blocks[1].resnets[0].conv_shortcut
    narrower = identities.decoder.up_blocks[1].resnets[0].conv_shortcut
    torch.testing.assert_close(wider(X), torch.cat([X, X], 1))
    many = torch.randn(4, 32, 64, 64, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(narrower(many), (many[:, :16] + many[:, 16:]) / 2**0.5)
    torch.testing.assert_close(narrower(many).std(), many.std(), rtol=0.01, atol=0)


@pytest.mark.parametrize(("inputs", "outputs"), [(12, 16), (16, 12), (16, 16), (1, 5), (5, 1)])
def test_every_input_is_used_and_every_output_has_unit_variance(inputs: int, outputs: int) -> None:
    mapped = channel_map(nn.Conv2d(inputs, outputs, 1))
    torch.testing.assert_close(mapped.square().sum(1), torch.ones(outputs))
    assert bool(mapped.any(0).all())


def test_other_weights_are_those_of_diffusers(vae: AutoencoderKL | VQModel) -> None:
    torch.manual_seed(0)
    plain = type(vae).from_config(vae.config).state_dict()
    changed = {name for name, value in vae.state_dict().items() if not torch.equal(value, plain[name])}
    assert changed
    assert all(any(part in name for part in ("samplers", "conv_shortcut")) for name in changed)
