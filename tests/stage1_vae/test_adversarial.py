"""The autoencoder against the discriminator."""

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


def players(folder: Path, gan: GanConfig) -> tuple[AdversarialLoss, Trainer, nn.Module, nn.Module]:
    """The loss at its first step, of a convolution and a small discriminator."""
    torch.manual_seed(0)
    decoder, critic = nn.Conv2d(3, 3, 3, padding=1), PatchDiscriminator(16, 2)
    config = RunConfig(dir=folder, precision="no", device="cpu", tracker="none")
    run = Trainer(config, Training(steps=10), "stage1", decoder, discriminator=(critic, 1e-4))
    return AdversarialLoss(gan, 10, 0, run), run, decoder, critic


def gradients(module: nn.Module) -> float:
    return sum(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)


@pytest.mark.parametrize("loss", ["hinge", "vanilla", "non_saturating"])
def test_each_side_leaves_no_gradient_in_the_other(tmp_path: Path, loss: str) -> None:
    adversarial, run, decoder, critic = players(
        tmp_path, GanConfig(start=0, warmup=0, loss=loss, r1=1.0, augment=("color",))
    )
    fake = run.model(IMAGES)
    loss, logs = adversarial.generator(fake, (fake - IMAGES).abs().mean(), decoder.weight, POSITIONS)
    run.backward(loss)
    assert gradients(decoder) > 0
    assert all(p.grad is None for p in critic.parameters())
    decoder.zero_grad()
    loss, discriminator_logs = adversarial.discriminator(IMAGES, fake, POSITIONS)
    run.backward(loss)
    assert gradients(critic) > 0
    assert all(p.grad is None for p in decoder.parameters())
    assert (logs | discriminator_logs).keys() == {
        "generator",
        "adaptive_weight",
        "discriminator",
        "discriminator_accuracy",
        "r1",
    }


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer(tmp_path: Path) -> None:
    adversarial, run, decoder, critic = players(tmp_path, GanConfig(start=0, warmup=0, ramp=1, weight=1.0, cap=1e9))
    norms = []
    for part in ("error", "generator"):
        decoder.zero_grad()
        fake = decoder(IMAGES)
        ((fake - IMAGES).abs().mean() if part == "error" else -critic(fake).mean()).backward()
        norms.append(decoder.weight.grad.norm())
    fake = run.model(IMAGES)
    loss, logs = adversarial.generator(fake, (fake - IMAGES).abs().mean(), decoder.weight, POSITIONS)
    torch.testing.assert_close(logs["adaptive_weight"], norms[0] / norms[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(loss, logs["adaptive_weight"] * -critic(fake).mean())


def test_the_discriminator_learns_alone_and_then_its_weight_rises(tmp_path: Path) -> None:
    adversarial, *_ = players(tmp_path, GanConfig(start=0.4, warmup=2, ramp=4, weight=0.8))
    assert [step for step in range(10) if adversarial.active(step)] == [4, 5, 6, 7, 8, 9]
    assert [adversarial.weight(step) for step in range(4, 12)] == pytest.approx([0, 0, 0.2, 0.4, 0.6, 0.8, 0.8, 0.8])
    later, *_ = players(tmp_path, GanConfig(start=7))
    assert [step for step in range(10) if later.active(step)] == [7, 8, 9]


def test_without_a_configuration_it_is_never_active(tmp_path: Path) -> None:
    _, run, *_ = players(tmp_path, GanConfig())
    assert not any(AdversarialLoss(None, 10, 0, run).active(step) for step in range(11))


def test_a_patch_is_seventy_pixels() -> None:
    critic = PatchDiscriminator(8, 3).double()
    assert critic(torch.zeros(1, 3, 256, 256).double()).shape == (1, 1, 30, 30)  # as pix2pix has it
    x = torch.zeros(1, 3, 256, 256, dtype=torch.float64, requires_grad=True)
    for module in critic.modules():  # a norm over the picture would let a patch see all of it
        if isinstance(module, nn.GroupNorm):
            module.forward = lambda x: x  # type: ignore[method-assign]
    (seen,) = torch.autograd.grad(critic(x)[0, 0, 15, 15], x)
    rows = seen.abs().sum((0, 1, 3)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70


def test_augmentation_depends_on_the_position_only_and_lets_gradients_through() -> None:
    kinds = ("color", "translation", "cutout")
    together = augment(IMAGES, kinds, 0, POSITIONS)
    apart = torch.cat([augment(IMAGES[i : i + 1], kinds, 0, POSITIONS[i : i + 1]) for i in range(4)])
    assert torch.equal(together, apart)
    assert not torch.equal(together, augment(IMAGES, kinds, 0, POSITIONS + 4))
    x = IMAGES.clone().requires_grad_()
    augment(x, kinds[1:], 0, POSITIONS).sum().backward()
    assert 0.4 < float((x.grad != 0).float().mean()) < 1  # what was cut out or pushed over the edge has none


def test_a_shift_moves_every_pixel_by_up_to_an_eighth() -> None:
    x = torch.zeros(16, 3, 32, 32)
    x[:, :, 16, 16] = 1.0
    moved = augment(x, ("translation",), 0, torch.arange(16))
    places = moved[:, 0].flatten(1).argmax(1)
    assert torch.equal(moved.sum((2, 3)), torch.ones(16, 3))
    offsets = torch.stack([places // 32 - 16, places % 32 - 16])
    assert int(offsets.abs().max()) == 4
    assert len(set(offsets[0].tolist())) > 4
