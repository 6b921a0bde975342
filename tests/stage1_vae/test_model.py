"""The model that stage one trains: the codebook, scaled and rotated latents, a frozen encoder, features."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from transformers import Dinov2Config, Dinov2Model, ViTConfig, ViTModel

from ldm.config.schema import Stage1Config
from ldm.models.autoencoder import build
from ldm.utils.errors import UserError
from stage1_vae.alignment import Features
from stage1_vae.model import LatentTransform, Reconstruction, draw_transform, quantise, revive

SMALL = {"channels": (16, 16), "layers": 1, "norm_num_groups": 8, "mid_attention": False}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_quantisation_matches_diffusers_and_gradients_pass_straight_through() -> None:
    torch.manual_seed(0)
    model = Reconstruction(
        build(Stage1Config(model="vq-f4", codes=16, **SMALL), 16), Stage1Config(model="vq-f4", **SMALL)
    )
    rebuilt = model(IMAGES, torch.zeros(2, 4, 8, 8))
    codes, _, (_, _, numbers) = model.vae.quantize(rebuilt.mean)
    torch.testing.assert_close(rebuilt.codes, codes)
    assert torch.equal(rebuilt.chosen, numbers)
    torch.testing.assert_close(rebuilt.pixels, model.vae.decode(rebuilt.mean).sample)
    rebuilt.pixels.mean().backward()
    assert float(model.vae.quant_conv.weight.grad.abs().sum()) > 0
    assert model.vae.quantize.embedding.weight.grad is None or not model.vae.quantize.embedding.weight.grad.any()


def test_the_nearest_code_is_chosen() -> None:
    codebook = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
    z = torch.tensor([[0.9, 0.1], [0.1, 1.5], [-3.0, 0.2]]).T.reshape(1, 2, 1, 3)
    codes, chosen = quantise(z, codebook)
    assert chosen.tolist() == [1, 2, 0]
    assert torch.equal(codes[0, :, 0].T, codebook[[1, 2, 0]])


def test_unused_codes_move_to_latents_and_used_ones_stay() -> None:
    torch.manual_seed(0)
    stage = Stage1Config(model="vq-f4", codes=8, **SMALL)
    model = Reconstruction(build(stage, 16), stage)
    codebook, shadow = model.vae.quantize.embedding.weight, torch.zeros(8, 4)
    before, mean = codebook.detach().clone(), torch.randn(2, 4, 8, 8)
    model.used[:5] = 1
    assert revive(model, mean, 0, 200, lambda _: [shadow]) == 3
    assert torch.equal(codebook[:5], before[:5])
    vectors = mean.permute(0, 2, 3, 1).reshape(-1, 4)
    assert all((vectors == code).all(1).any() for code in codebook[5:])
    assert torch.equal(shadow[5:], codebook[5:])
    assert not model.used.any()


def test_a_transform_rotates_and_shrinks_images_and_latents_alike() -> None:
    transform = LatentTransform(1, 4, 6)
    latents, pixels = torch.randn(1, 4, 8, 12), torch.randn(1, 3, 16, 24)
    assert transform(latents).shape == (1, 4, 6, 4)
    assert transform(pixels, 2).shape == (1, 3, 12, 8)
    rotation = LatentTransform(1, 8, 12)
    assert torch.equal(rotation(latents), torch.rot90(latents, 1, (2, 3)))
    down = F.interpolate(pixels, (8, 12), mode="bicubic", antialias=True)
    torch.testing.assert_close(LatentTransform(0, 4, 6)(pixels, 2), down)


def test_transforms_are_drawn_in_the_configured_share_of_steps() -> None:
    drawn = [draw_transform(0.25, 0, step, 16, 16) for step in range(400)]
    transforms = [transform for transform in drawn if transform]
    assert 70 < len(transforms) < 130
    assert {transform.turns for transform in transforms} == {0, 1, 2, 3}
    assert (
        4 <= min(transform.height for transform in transforms) < max(transform.height for transform in transforms) <= 16
    )
    assert drawn == [draw_transform(0.25, 0, step, 16, 16) for step in range(400)]
    assert not any(draw_transform(0.0, 0, step, 16, 16) for step in range(400))


def test_a_frozen_encoder_gets_no_gradient() -> None:
    stage = Stage1Config(train="decoder", init_from="x", **SMALL)
    model = Reconstruction(build(stage, 16), stage)
    model(IMAGES, torch.zeros(2, 4, 8, 8)).pixels.mean().backward()
    assert all(p.grad is None for part in (model.vae.encoder, model.vae.quant_conv) for p in part.parameters())
    assert all(p.grad is not None for part in (model.vae.decoder, model.vae.post_quant_conv) for p in part.parameters())


def test_recomputed_activations_give_the_same_gradients() -> None:
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        vae = build(Stage1Config(**SMALL), 16)
        if checkpointing:
            vae.enable_gradient_checkpointing()
        model = Reconstruction(vae, Stage1Config(**SMALL))
        model(IMAGES, torch.zeros(2, 4, 8, 8)).pixels.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("kind", ["vit", "dinov2"])
def test_features_are_the_encoders_patch_tokens_at_their_positions(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": 32,
        "patch_size": 8,
    }
    model = ViTModel(ViTConfig(**shape)) if kind == "vit" else Dinov2Model(Dinov2Config(**shape))
    model.eval().save_pretrained(tmp_path)
    features = Features(str(tmp_path))
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 1, 3, 1, 1)
    tokens = model(pixel_values=(x / 2 + 0.5 - mean) / std).last_hidden_state
    grid = features(x, 4, 4)
    assert features.width == 16
    torch.testing.assert_close(grid[:, :, 2, 1], tokens[:, 1 + 2 * 4 + 1].detach(), atol=1e-5, rtol=1e-4)
    assert features(x, 2, 2).shape == (2, 16, 2, 2)


def test_a_folder_without_a_feature_encoder_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"stage1\.align\.model: can't load"):
        Features(str(tmp_path))
