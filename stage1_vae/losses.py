"""The autoencoder's losses. Each is a mean, so that the learning rate does not depend on the resolution."""

from __future__ import annotations

import torch
import torch.nn.functional as F

Logs = dict[str, torch.Tensor]
"""Scalars by name, for the metrics."""

# ------------------------------------------------------------------------------------------------------ reconstruction


def charbonnier_loss(rebuilt: torch.Tensor, real: torch.Tensor, epsilon: float = 1e-3) -> torch.Tensor:
    """mean √((x̂ - x)² + ε²) - ε: an absolute error that is smooth at 0. Lai et al., arXiv 1704.03915, section 3.3."""
    return ((rebuilt - real).square() + epsilon**2).sqrt().mean() - epsilon


def gradient_loss(rebuilt: torch.Tensor, real: torch.Tensor, scales: int = 3) -> torch.Tensor:
    """Mean absolute error of horizontal and vertical differences, over an average pyramid: edges stay sharp.

    `(N, C, H, W)` each → scalar. After the gradient difference loss of Mathieu et al., arXiv 1511.05440, eq. 6.
    """
    loss = rebuilt.new_zeros(())
    for scale in range(scales):
        error = F.avg_pool2d(rebuilt - real, 2**scale)  # averages and differences are linear: the error's are the same
        loss = loss + error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
    return loss / scales


def likelihood(error: torch.Tensor, logvar: torch.Tensor) -> torch.Tensor:
    """The negative log-likelihood of an absolute error under a Laplace distribution of scale exp(s): e / exp(s) + s.

    Up to a constant. Its minimum over s is at exp(s) = e.
    """
    return error * (-logvar).exp() + logvar


# ------------------------------------------------------------------------------------------------------------- latents


def kl_loss(mean: torch.Tensor, logvar: torch.Tensor, free: float = 0.0) -> torch.Tensor:
    """KL(N(mean, exp logvar) ‖ N(0, 1)), mean over elements. Kingma & Welling, arXiv 1312.6114, appendix B.

    `(N, C, h, w)` each → scalar. `free` nats an element, mean over each image's channel, cost nothing and have no
    gradient: free bits, Kingma et al., arXiv 1606.04934 (there over the batch, which processes would have to share).
    """
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar)
    return kl.mean((2, 3)).clamp_min(free).mean() if free else kl.mean()


def vq_loss(z: torch.Tensor, codes: torch.Tensor, beta: float) -> torch.Tensor:
    """‖sg(z) - e‖² + β ‖z - sg(e)‖², mean over elements: van den Oord et al., arXiv 1711.00937, eq. 3.

    β is on the commitment, which draws z to the codes; taming-transformers had it on the other term.
    """
    return F.mse_loss(codes, z.detach()) + beta * F.mse_loss(z, codes.detach())


def alignment_loss(
    z: torch.Tensor, projected: torch.Tensor, features: torch.Tensor, margin: float = 0.5, pair_margin: float = 0.25
) -> torch.Tensor:
    """Aligns latents with a pretrained encoder's features, position by position and in their pairwise similarities.

    z `(N, C, h, w)`, the same projected to D channels `(N, D, h, w)`, features `(N, D, h, w)` → scalar. Yao et al.,
    arXiv 2501.01423, section 3.2: marginal cosine similarity, and marginal distance matrix similarity.
    """
    marginal = F.relu(1 - margin - F.cosine_similarity(projected, features, dim=1)).mean()
    units = [F.normalize(x.flatten(2), dim=1) for x in (z, features)]  # (N, C, h·w), (N, D, h·w)
    of_latents, of_features = (unit.transpose(1, 2) @ unit for unit in units)  # (N, h·w, h·w) each
    return marginal + F.relu((of_latents - of_features).abs() - pair_margin).mean()


# --------------------------------------------------------------------------------------------------------- adversarial


def discriminator_loss(real: torch.Tensor, fake: torch.Tensor, kind: str) -> torch.Tensor:
    """The discriminator's loss, of logits of any one shape.

    hinge: ½ E[max(0, 1 - D(x)) + max(0, 1 + D(x̂))], Lim & Ye, arXiv 1705.02894. vanilla, non_saturating: half the
    binary cross-entropy, Goodfellow et al., arXiv 1406.2661, eq. 1.
    """
    if kind == "hinge":
        return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: torch.Tensor, kind: str) -> torch.Tensor:
    """The autoencoder's loss: -log D(x̂) (non_saturating), or the logit itself, -D(x̂) (hinge, vanilla)."""
    return F.softplus(-fake).mean() if kind == "non_saturating" else -fake.mean()


def r1_penalty(logits: torch.Tensor, real: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """½ E[(∂ ΣD(x) / ∂x)²], mean over pixels; `real` needs gradients. Mescheder et al., arXiv 1801.04406, eq. 9.

    The inner gradient is computed `scale` times as large, for half precision.
    """
    (gradient,) = torch.autograd.grad(scale * logits.sum(), real, create_graph=True)
    return 0.5 * (gradient / scale).square().mean()


def adaptive_weight(gradients: torch.Tensor, cap: float) -> torch.Tensor:
    """‖∇ reconstruction‖ / ‖∇ adversarial‖ at the decoder's last layer, at most `cap`: arXiv 2012.09841, eq. 7.

    `gradients` `(2, …)` are both, so that several processes can average them first.
    """
    reconstruction, adversarial = gradients.flatten(1).norm(dim=1)
    return (reconstruction / (adversarial + 1e-6)).clamp_max(cap)
