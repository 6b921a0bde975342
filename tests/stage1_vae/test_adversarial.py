"""The adversarial loss of the autoencoder: gradients, weights, the discriminator and its augmentation."""

from pathlib import Path

import pytest
import torch
from torch import nn

from ldm.config.schema import GanConfig, RunConfig, Training
from ldm.training.trainer import Trainer
from stage1_vae.adversarial import AdversarialLoss
from stage1_vae.augment import augment
from stage1_vae.discriminator import PatchDiscriminator

IMAGES = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
POSITIONS = torch.arange(4)


def build_adversarial(folder: Path, gan: GanConfig) -> tuple[AdversarialLoss, Trainer, nn.Module, nn.Module]:
    """The loss, its trainer, and the networks: a convolution for a decoder, and a small discriminator."""
    torch.manual_seed(0)
    decoder, discriminator = nn.Conv2d(3, 3, 3, padding=1), PatchDiscriminator(16, 2)
    config = RunConfig(dir=folder, precision="no", device="cpu", tracker="none")
    trainer = Trainer(config, Training(steps=10), "stage1", decoder, discriminator=(discriminator, 1e-4))
    return AdversarialLoss(gan, 10, 0, trainer), trainer, decoder, discriminator


def gradients(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("loss", ["hinge", "vanilla", "non_saturating"])
def test_each_loss_leaves_no_gradient_in_the_other_network(tmp_path: Path, loss: str) -> None:
    adversarial, trainer, decoder, discriminator = build_adversarial(
        tmp_path, GanConfig(start=0, warmup=0, loss=loss, r1=1.0, augment=("color",))
    )
    fake = trainer.model(IMAGES)
    loss, logs = adversarial.generator(fake, (fake - IMAGES).abs().mean(), decoder.weight, POSITIONS)
    trainer.backward(loss)
    assert gradients(decoder) > 0
    assert all(p.grad is None for p in discriminator.parameters())
    decoder.zero_grad()
    loss, discriminator_logs = adversarial.discriminator(IMAGES, fake, POSITIONS)
    trainer.backward(loss)
    assert gradients(discriminator) > 0
    assert all(p.grad is None for p in decoder.parameters())
    assert (logs | discriminator_logs).keys() == {
        "generator",
        "adaptive_weight",
        "discriminator",
        "discriminator_accuracy",
        "r1",
    }


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer(tmp_path: Path) -> None:
    adversarial, trainer, decoder, discriminator = build_adversarial(
        tmp_path, GanConfig(start=0, warmup=0, ramp=1, weight=1.0, cap=1e9)
    )
    norms = []
    for part in ("error", "generator"):
        decoder.zero_grad()
        fake = decoder(IMAGES)
        ((fake - IMAGES).abs().mean() if part == "error" else -discriminator(fake).mean()).backward()
        norms.append(decoder.weight.grad.norm())
    fake = trainer.model(IMAGES)
    loss, logs = adversarial.generator(fake, (fake - IMAGES).abs().mean(), decoder.weight, POSITIONS)
    torch.testing.assert_close(logs["adaptive_weight"], norms[0] / norms[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, logs["adaptive_weight"] * -discriminator(fake).mean())


def test_the_discriminator_trains_alone_before_its_weight_ramps_up(tmp_path: Path) -> None:
    adversarial, *_ = build_adversarial(tmp_path, GanConfig(start=0.4, warmup=2, ramp=4, weight=0.8))
    assert [step for step in range(10) if adversarial.active(step)] == [4, 5, 6, 7, 8, 9]
    assert [adversarial.weight(step) for step in range(4, 12)] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    later, *_ = build_adversarial(tmp_path, GanConfig(start=7))
    assert [step for step in range(10) if later.active(step)] == [7, 8, 9]


def test_without_a_gan_section_the_loss_is_never_active(tmp_path: Path) -> None:
    _, trainer, *_ = build_adversarial(tmp_path, GanConfig())
    assert not any(AdversarialLoss(None, 10, 0, trainer).active(step) for step in range(11))


def test_the_receptive_field_of_a_patch_is_70_pixels() -> None:
    discriminator = PatchDiscriminator(8, 3).double()
    assert discriminator(torch.zeros(1, 3, 256, 256).double()).shape == (1, 1, 30, 30)  # as pix2pix has it
    x = torch.zeros(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    for module in discriminator.modules():  # a norm over the image would let every patch see all of it
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    (gradient,) = torch.autograd.grad(discriminator(x)[0, 0, 15, 15], x)
    rows = gradient.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_augmentation_depends_on_the_position_only_and_passes_gradients() -> None:
    kinds = ("color", "translation", "cutout")
    batched = augment(IMAGES, kinds, 0, POSITIONS)
    single = torch.cat([augment(IMAGES[i : i + 1], kinds, 0, POSITIONS[i : i + 1]) for i in range(4)])
    assert torch.equal(batched, single)
    assert not torch.equal(batched, augment(IMAGES, kinds, 0, POSITIONS + 4))
    x = IMAGES.clone().requires_grad_()
    augment(x, kinds[1:], 0, POSITIONS).sum().backward()
    assert 0.4 < float((x.grad != 0).float().mean()) < 1  # pixels cut out or shifted out of the image have none


def test_translation_shifts_an_image_by_up_to_an_eighth_of_its_side() -> None:
    x = torch.zeros(16, 3, 32, 32)
    x[:, :, 16, 16] = 1.0
    shifted = augment(x, ("translation",), 0, torch.arange(16))
    peaks = shifted[:, 0].flatten(1).argmax(1)
    assert torch.equal(shifted.sum((2, 3)), torch.ones(16, 3))
    offsets = torch.stack([peaks // 32 - 16, peaks % 32 - 16])
    assert int(offsets.abs().max()) == 4
    assert len(set(offsets[0].tolist())) > 4
