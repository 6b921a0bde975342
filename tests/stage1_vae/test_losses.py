"""The autoencoder's losses against closed forms, other libraries and numerical gradients."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from cases import for_each
from torch.distributions import Laplace, Normal, kl_divergence

from stage1_vae import losses

X, Y = torch.rand(2, 2, 3, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
MEAN, LOGVAR = torch.randn(2, 2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
LOGITS = torch.randn(2, 4, 1, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_kl_is_that_of_torch_distributions() -> None:
    reference = kl_divergence(Normal(MEAN, (0.5 * LOGVAR).exp()), Normal(0, 1))
    torch.testing.assert_close(losses.kl_loss(MEAN, LOGVAR), reference.mean())


def test_a_channel_below_its_free_bits_gets_no_gradient() -> None:
    reference = kl_divergence(Normal(MEAN, (0.5 * LOGVAR).exp()), Normal(0, 1)).mean((2, 3))  # (N, C)
    free = float(reference.flatten().median())
    mean = MEAN.clone().requires_grad_()
    loss = losses.kl_loss(mean, LOGVAR, free)
    torch.testing.assert_close(
        loss, torch.stack([r if r > free else torch.tensor(free) for r in reference.flatten()]).mean()
    )
    loss.backward()
    assert torch.equal(mean.grad.abs().sum((2, 3)) > 0, reference > free)


def test_charbonnier_lies_between_l1_and_l1_minus_epsilon() -> None:
    error = losses.charbonnier_loss(X, Y)
    torch.testing.assert_close(error, torch.hypot(X - Y, torch.tensor(1e-3)).mean() - 1e-3)
    assert F.l1_loss(X, Y) - 1e-3 < error < F.l1_loss(X, Y)
    assert losses.charbonnier_loss(X, X) == pytest.approx(0, abs=1e-12)


def test_the_gradient_loss_is_that_of_finite_differences_at_three_scales() -> None:
    total = 0.0
    for scale in (1, 2, 4):
        scaled = [x.unfold(2, scale, scale).unfold(3, scale, scale).mean((4, 5)) for x in (X, Y)]
        down, right = ([x[:, :, 1:] - x[:, :, :-1], x[..., 1:] - x[..., :-1]] for x in scaled)
        total += sum(float((a - b).abs().mean()) for a, b in zip(down, right, strict=True))
    assert float(losses.gradient_loss(X, Y)) == pytest.approx(total / 3)


def test_the_gradient_loss_penalizes_blur_and_not_brightness() -> None:
    torch.testing.assert_close(losses.gradient_loss(X + 0.3, X), torch.tensor(0.0, dtype=X.dtype), atol=1e-6, rtol=0)
    assert losses.gradient_loss(F.avg_pool2d(X, 3, 1, 1), X) > 0.1


def test_losses_do_not_depend_on_the_resolution() -> None:
    tiled = [image.repeat(1, 1, 4, 4) for image in (X, Y)]
    torch.testing.assert_close(
        losses.kl_loss(MEAN.repeat(1, 1, 4, 4), LOGVAR.repeat(1, 1, 4, 4)), losses.kl_loss(MEAN, LOGVAR)
    )
    torch.testing.assert_close(losses.charbonnier_loss(*tiled), losses.charbonnier_loss(X, Y))
    torch.testing.assert_close(losses.gradient_loss(*tiled), losses.gradient_loss(X, Y), atol=0.08, rtol=0.2)
    weight = torch.rand(3, 16, 16, dtype=X.dtype)
    for repeats in (1, 4):  # a linear discriminator that sees single pixels
        real = X.repeat(1, 1, repeats, repeats).requires_grad_()
        logits = (real * weight.repeat(1, repeats, repeats)).sum(1)
        torch.testing.assert_close(losses.r1_penalty(logits, real), 0.5 * weight.square().mean())


def test_the_learned_scale_is_that_of_a_laplace_distribution_and_converges_to_the_error() -> None:
    scale = torch.tensor(-1.3, dtype=X.dtype, requires_grad=True)
    loss = losses.likelihood((X - Y).abs().mean(), scale)
    reference = -Laplace(Y, scale.exp()).log_prob(X).mean()
    torch.testing.assert_close(loss, reference - torch.log(torch.tensor(2.0, dtype=X.dtype)))
    optimizer = torch.optim.Adam([scale], 0.05)
    for _ in range(400):
        optimizer.zero_grad()
        losses.likelihood((X - Y).abs().mean(), scale).backward()
        optimizer.step()
    torch.testing.assert_close(scale.exp(), (X - Y).abs().mean(), rtol=1e-3, atol=0)


def test_beta_weighs_the_commitment_term() -> None:
    """van den Oord et al.: β weighs the pull on the encoder; the codes' own term has weight 1."""
    z, codes = MEAN.clone().requires_grad_(), LOGVAR.clone().requires_grad_()
    losses.vq_loss(z, codes, beta=0.25).backward()
    gradient = 2 * (MEAN - LOGVAR) / MEAN.numel()
    torch.testing.assert_close(z.grad, 0.25 * gradient)
    torch.testing.assert_close(codes.grad, -gradient)


def test_alignment_is_zero_for_latents_parallel_to_the_features_and_ignores_errors_within_the_margins() -> None:
    z = MEAN
    assert losses.alignment_loss(z, 3 * z, 2 * z) == 0
    opposite = losses.alignment_loss(z, -z, z)  # at every position: 1 - 0.5 + 1
    torch.testing.assert_close(opposite, torch.tensor(1.5, dtype=z.dtype))
    cosine = torch.stack([F.cosine_similarity(a[:, :, None], a[:, None, :], dim=0) for a in z.flatten(2)])
    other = torch.stack([F.cosine_similarity(a[:, :, None], a[:, None, :], dim=0) for a in LOGVAR.flatten(2)])
    pairs = ((cosine - other).abs() - 0.25).clamp_min(0).mean()
    torch.testing.assert_close(losses.alignment_loss(z, LOGVAR, LOGVAR), pairs)


@for_each("kind", ["vanilla", "non_saturating"])
def test_the_discriminators_loss_is_half_the_binary_cross_entropy(kind: str) -> None:
    real, fake = LOGITS
    ones, zeros = torch.ones_like(real), torch.zeros_like(real)
    entropy = F.binary_cross_entropy_with_logits(real, ones) + F.binary_cross_entropy_with_logits(fake, zeros)
    torch.testing.assert_close(losses.discriminator_loss(real, fake, kind), entropy / 2)


def test_the_generators_loss_is_the_cross_entropy_with_real_labels_or_the_negated_logit() -> None:
    fake = LOGITS[1]
    entropy = F.binary_cross_entropy_with_logits(fake, torch.ones_like(fake))
    torch.testing.assert_close(losses.generator_loss(fake, "non_saturating"), entropy)
    for kind in ("hinge", "vanilla"):
        torch.testing.assert_close(losses.generator_loss(fake, kind), -fake.mean())


def test_the_hinge_loss_is_torchs_hinge_embedding_loss() -> None:
    real, fake = LOGITS
    reference = [
        F.hinge_embedding_loss(sign * x, -torch.ones_like(x), margin=1.0) for x, sign in ((real, 1), (fake, -1))
    ]
    torch.testing.assert_close(losses.discriminator_loss(real, fake, "hinge"), sum(reference) / 2)


def test_r1_is_half_the_squared_gradient_norm() -> None:
    weight = torch.randn(3, 16, 16, dtype=X.dtype)
    real = X.clone().requires_grad_()
    logits = (real.square() * weight).sum((1, 2, 3))  # ∂ = 2·x·weight
    torch.testing.assert_close(losses.r1_penalty(logits, real), 0.5 * (2 * X * weight).square().mean())


def test_the_adaptive_weight_is_the_ratio_of_gradient_norms_up_to_its_cap() -> None:
    gradients = torch.stack([torch.full((4, 4), 3.0), torch.full((4, 4), 0.5)])
    torch.testing.assert_close(losses.adaptive_weight(gradients, 100.0), torch.tensor(6.0))
    assert losses.adaptive_weight(gradients, 2.0) == 2


DIFFERENTIABLE: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "charbonnier": losses.charbonnier_loss,
    "gradient": losses.gradient_loss,
    "kl": losses.kl_loss,
    "kl with free bits": lambda a, b: losses.kl_loss(a, b, 0.4),
    "alignment": lambda a, b: losses.alignment_loss(a, b, LOGVAR[:, :, :2, :2]),
    "hinge": lambda a, b: losses.discriminator_loss(a, b, "hinge"),
    "vanilla": lambda a, b: losses.discriminator_loss(a, b, "vanilla"),
    "likelihood": lambda a, b: losses.likelihood(a.abs().mean(), b.mean()),
    "r1": lambda a, b: losses.r1_penalty((a.sin() * b).sum((1, 2, 3)), a),
}


@for_each("name", DIFFERENTIABLE)
def test_gradients_match_finite_differences(name: str) -> None:
    side = 8 if name == "gradient" else 2
    a, b = (x[:, :, :side, :side].clone().requires_grad_() for x in ((X, Y) if side == 8 else (MEAN, LOGVAR)))
    assert torch.autograd.gradcheck(DIFFERENTIABLE[name], (a, b), check_batched_grad=False)
