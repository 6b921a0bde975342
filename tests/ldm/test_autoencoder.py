"""Latents and their scale."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from ldm import autoencoder
from ldm.errors import UserError


def small(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    options = {
        "block_out_channels": (16, 16), "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1, "latent_channels": 3,
        "norm_num_groups": 8, "sample_size": 16, "scaling_factor": 1.0,
    }  # fmt: skip
    return AutoencoderKL(**{**options, **changes}).eval()


PICTURES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("convolutions", [True, False])
def test_folding_normalises_latents_and_changes_no_picture(convolutions: bool) -> None:
    vae = small(use_quant_conv=convolutions, use_post_quant_conv=convolutions)
    mean, std = autoencoder.statistics(vae, PICTURES.split(4))
    folded = autoencoder.fold(vae, mean, std)
    with torch.no_grad():
        old, new = vae.encode(PICTURES).latent_dist, folded.encode(PICTURES).latent_dist
        per_channel = new.mean.transpose(0, 1).flatten(1)
        torch.testing.assert_close(per_channel.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(per_channel.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(new.std * std[:, None, None], old.std, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(folded.decode(new.mean).sample, vae.decode(old.mean).sample, atol=1e-4, rtol=1e-4)


def test_statistics_are_those_of_all_pictures_at_once() -> None:
    vae = small()
    mean, std = autoencoder.statistics(vae, PICTURES.split(1))
    z = vae.encode(PICTURES).latent_dist.mean.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, z.mean(1))
    torch.testing.assert_close(std, z.std(1, correction=0))


def test_scale_and_shift_are_undone_by_decoding() -> None:
    plain = autoencoder.Autoencoder(small())
    scaled = autoencoder.Autoencoder(small(scaling_factor=0.5, shift_factor=0.25))
    assert not scaled.vae.config.shift_factor
    torch.testing.assert_close(scaled.encode(PICTURES), (plain.encode(PICTURES) - 0.25) * 0.5, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        scaled.decode(scaled.encode(PICTURES)), plain.decode(plain.encode(PICTURES)), atol=1e-4, rtol=1e-4
    )


def test_the_saved_folder_is_diffusers_own_and_keeps_the_fingerprint(tmp_path: Path) -> None:
    one = autoencoder.Autoencoder(small())
    one.save(tmp_path / "autoencoder", psnr=1.0)
    assert autoencoder.load(tmp_path / "autoencoder").fingerprint() == one.fingerprint()
    plain = AutoencoderKL.from_pretrained(tmp_path / "autoencoder")
    torch.testing.assert_close(plain.encode(PICTURES).latent_dist.mean, one.encode(PICTURES))


def test_what_is_no_autoencoder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage1\.pretrained"):
        autoencoder.load(tmp_path)
