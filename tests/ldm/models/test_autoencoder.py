"""Autoencoders: normalized latents, saving and loading, tiles, fingerprints."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from ldm.config.schema import Stage1Config
from ldm.models import autoencoder
from ldm.models.convert import autoencoder as single_file
from ldm.utils.errors import UserError


def small(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    options = {
        "block_out_channels": (16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 3,
        "norm_num_groups": 8,
        "sample_size": 16,
        "scaling_factor": 1.0,
    }
    return AutoencoderKL(**{**options, **changes}).eval()


IMAGES = torch.rand(6, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


@pytest.mark.parametrize("convolutions", [True, False])
def test_folding_normalizes_latents_and_leaves_reconstructions_unchanged(convolutions: bool) -> None:
    vae = small(use_quant_conv=convolutions, use_post_quant_conv=convolutions)
    mean, std = autoencoder.channel_statistics(vae, IMAGES.split(4))
    folded = autoencoder.fold(vae, mean, std)
    with torch.no_grad():
        old, new = vae.encode(IMAGES).latent_dist, folded.encode(IMAGES).latent_dist
        per_channel = new.mean.transpose(0, 1).flatten(1)
        torch.testing.assert_close(per_channel.mean(1), torch.zeros(3), atol=1e-5, rtol=0)
        torch.testing.assert_close(per_channel.std(1, correction=0), torch.ones(3), atol=1e-4, rtol=0)
        torch.testing.assert_close(new.std * std[:, None, None], old.std, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(folded.decode(new.mean).sample, vae.decode(old.mean).sample, atol=1e-4, rtol=1e-4)


def test_batched_statistics_equal_those_of_all_images() -> None:
    vae = small()
    mean, std = autoencoder.channel_statistics(vae, IMAGES.split(1))
    z = vae.encode(IMAGES).latent_dist.mean.detach().transpose(0, 1).flatten(1)
    torch.testing.assert_close(mean, z.mean(1))
    torch.testing.assert_close(std, z.std(1, correction=0))


def test_scale_and_shift_are_undone_by_decoding() -> None:
    unscaled = autoencoder.Autoencoder(small())
    scaled = autoencoder.Autoencoder(small(scaling_factor=0.5, shift_factor=0.25))
    assert not scaled.vae.config.shift_factor
    torch.testing.assert_close(scaled.encode(IMAGES), (unscaled.encode(IMAGES) - 0.25) * 0.5, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(
        scaled.decode(scaled.encode(IMAGES)), unscaled.decode(unscaled.encode(IMAGES)), atol=1e-4, rtol=1e-4
    )


def test_a_saved_folder_opens_in_diffusers_and_keeps_its_fingerprint(tmp_path: Path) -> None:
    vae = autoencoder.Autoencoder(small())
    vae.save(tmp_path / "autoencoder", psnr=1.0)
    assert autoencoder.load(tmp_path / "autoencoder").fingerprint() == vae.fingerprint()
    reference = AutoencoderKL.from_pretrained(tmp_path / "autoencoder")
    torch.testing.assert_close(reference.encode(IMAGES).latent_dist.mean, vae.encode(IMAGES))


def test_a_folder_that_is_no_autoencoder_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage1\.pretrained"):
        autoencoder.load(tmp_path)


SHAPES: dict[str, dict[str, object]] = {
    "kl": {"channels": (16, 16), "norm_num_groups": 8},
    "vq-f4": {"channels": (16, 16), "norm_num_groups": 8, "codes": 32},
    "tiny": {"channels": (16, 16)},
    "dc-f32": {"channels": (32, 32)},
    "identity": {"channels": (3,), "latent_channels": 3},
}


def build(model: str) -> autoencoder.Model:
    torch.manual_seed(0)
    return autoencoder.build(Stage1Config(model=model, layers=1, **{"latent_channels": 4, **SHAPES[model]}), 16)


@pytest.mark.parametrize("model", SHAPES)
def test_normalizing_leaves_the_reconstructions_of_every_architecture_unchanged(model: str) -> None:
    if model == "identity":
        identity = autoencoder.Autoencoder(build(model))
        assert torch.equal(identity.encode(IMAGES), IMAGES)
        assert torch.equal(identity.decode(IMAGES), IMAGES)
        assert identity.factor == 1
        return
    vae = build(model).eval()
    with torch.no_grad():
        before = vae.decode(autoencoder.encode_posterior(vae, IMAGES)[0]).sample
        mean, std = autoencoder.channel_statistics(vae, IMAGES.split(4))
    normalized = autoencoder.normalize_latents(vae, mean, std)
    z, logvar = normalized.moments(IMAGES)
    torch.testing.assert_close(normalized.decode(z), before, atol=1e-4, rtol=1e-4)
    assert z.shape == (6, 4, 8, 8)
    if model == "kl":  # each channel by itself
        torch.testing.assert_close(z.transpose(0, 1).flatten(1).std(1, correction=0), torch.ones(4), atol=1e-4, rtol=0)
    else:  # all channels together; a sample is the mean
        torch.testing.assert_close(z.std(correction=0), torch.tensor(1.0), atol=1e-4, rtol=0)
        assert float(logvar.max()) < -50
    if model in ("kl", "vq-f4"):
        torch.testing.assert_close(z.mean((0, 2, 3)), torch.zeros(4), atol=1e-5, rtol=0)


@pytest.mark.parametrize("model", [name for name in SHAPES if name != "identity"])
def test_every_architecture_loads_as_saved(model: str, tmp_path: Path) -> None:
    original = autoencoder.Autoencoder(build(model))
    original.save(tmp_path)
    loaded = autoencoder.load(tmp_path)
    assert type(loaded.vae) is type(original.vae)
    assert loaded.fingerprint() == original.fingerprint()
    assert (loaded.factor, loaded.channels) == (2, 4)
    assert torch.equal(loaded.encode(IMAGES), original.encode(IMAGES))


def test_identity_loads_by_its_name() -> None:
    assert isinstance(autoencoder.load("identity").vae, autoencoder.Identity)


@pytest.mark.parametrize("model", ["kl", "vq-f4"])
def test_a_single_file_gives_the_same_latents_and_images(model: str, tmp_path: Path) -> None:
    original = autoencoder.Autoencoder(build(model))
    single_file.write(original.vae, tmp_path / "vae.safetensors")
    loaded = autoencoder.load(tmp_path / "vae.safetensors")
    assert torch.equal(loaded.encode(IMAGES), original.encode(IMAGES))
    assert torch.equal(loaded.decode(original.encode(IMAGES)), original.decode(original.encode(IMAGES)))


@pytest.mark.parametrize(
    ("content", "message"),
    [("{}", "holds a None"), ('{"_class_name": "UNet2DModel"}', "holds a UNet2DModel; known are")],
)
def test_a_folder_of_another_model_is_refused_by_its_class(content: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=rf"stage1\.init_from: .*{message}"):
        autoencoder.load(tmp_path, "stage1.init_from")


def test_a_damaged_single_file_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "vae.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"stage1\.pretrained: .*vae\.safetensors"):
        autoencoder.load(tmp_path / "vae.safetensors")


def test_large_images_run_in_tiles_and_large_batches_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    vae = autoencoder.Autoencoder(small())
    images = torch.rand(3, 3, 64, 96, generator=torch.Generator().manual_seed(0)) * 2 - 1
    z = vae.encode(images)
    untiled = vae.decode(z)
    for name, value in (("MAX_UNTILED_SIDE", 32), ("TILE", 16), ("MAX_PIXELS", 64 * 96)):
        monkeypatch.setattr(autoencoder, name, value)
    shapes: list[tuple[int, ...]] = []
    vae.vae.decoder.conv_out.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape))
    torch.testing.assert_close(vae.encode(images), z, atol=2e-2, rtol=0)
    assert float((vae.decode(z) - untiled).abs().mean()) < 2 / 255  # images range over 2
    assert {shape[0] for shape in shapes} == {1}
    assert max(shape[2] * shape[3] for shape in shapes) < 64 * 96


def test_the_latent_fingerprint_does_not_depend_on_the_decoder() -> None:
    first, second = autoencoder.Autoencoder(small()), autoencoder.Autoencoder(small())
    with torch.no_grad():
        second.vae.decoder.conv_out.bias += 1
    assert first.latent_fingerprint(16) == second.latent_fingerprint(16)
    assert first.fingerprint() != second.fingerprint()
    with torch.no_grad():
        second.vae.quant_conv.bias += 1
    assert first.latent_fingerprint(16) != second.latent_fingerprint(16)


def test_missing_weights_are_refused_not_initialized_at_random(tmp_path: Path) -> None:
    small().save_pretrained(tmp_path)
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    del tensors["encoder.conv_in.bias"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(UserError, match=r"not its config's: encoder\.conv_in\.bias and 0 more differ"):
        autoencoder.load(tmp_path)


@pytest.mark.parametrize("config", [{"in_channels": 1, "out_channels": 1}, {"scaling_factor": None}])
def test_an_autoencoder_of_other_channels_or_without_scale_is_refused(
    config: dict[str, object], tmp_path: Path
) -> None:
    small().save_pretrained(tmp_path)
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | config))
    with pytest.raises(UserError, match=r"stage1\.pretrained: .* (for images of 1 channels|has scaling_factor null)"):
        autoencoder.load(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"_class_name": "VQModel", "vq_embed_dim": 3}, "has vq_embed_dim 3, but latent_channels None; only equal"),
        ({"_class_name": "AutoencoderKL", "out_channels": 1}, "is for images of 1 channels; ours have 3"),
    ],
)
def test_a_config_that_lacks_a_key_is_refused_in_a_line(
    config: dict[str, object], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"stage1\.pretrained: .*{message}"):
        autoencoder.load(tmp_path)


def test_statistics_in_the_config_are_folded_into_the_convolutions() -> None:
    unscaled = autoencoder.Autoencoder(small())
    normalized = autoencoder.Autoencoder(small(latents_mean=[0.1, 0.2, 0.3], latents_std=[2.0, 3.0, 4.0]))
    mean, std = torch.tensor([[0.1, 0.2, 0.3], [2.0, 3.0, 4.0]])[:, :, None, None]
    torch.testing.assert_close(normalized.encode(IMAGES), (unscaled.encode(IMAGES) - mean) / std, atol=1e-5, rtol=1e-4)
    assert normalized.vae.config.latents_mean is None


def test_a_tiny_autoencoders_shift_is_applied_and_can_be_measured_again() -> None:
    vae = autoencoder.build(Stage1Config(model="tiny", channels=(16, 16), layers=1), 16).eval()
    vae.register_to_config(shift_factor=0.7, scaling_factor=2.0)
    shifted = autoencoder.Autoencoder(vae)
    z = shifted.encode(IMAGES)
    torch.testing.assert_close(z, (autoencoder.encode_posterior(vae, IMAGES)[0] - 0.7) * 2)
    torch.testing.assert_close(shifted.decode(z), vae.decode(autoencoder.encode_posterior(vae, IMAGES)[0]).sample)
    normalized = autoencoder.normalize_latents(vae, *autoencoder.channel_statistics(vae, [IMAGES]))
    assert float(normalized.encode(IMAGES).mean().abs()) < 1
    assert normalized.shift == 0
