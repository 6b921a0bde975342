"""The autoencoder's losses."""

import torch
from torch.distributions import Normal, kl_divergence

from stage1_vae.losses import gradient_loss, kl_loss


def test_kl_is_that_of_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    reference = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0, 1)).mean()
    torch.testing.assert_close(kl_loss(mean, logvar), reference)


def test_the_gradient_loss_sees_edges_and_not_brightness() -> None:
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(gradient_loss(x + 0.3, x), torch.tensor(0.0), atol=1e-6, rtol=0)
    blurred = torch.nn.functional.avg_pool2d(x, 3, 1, 1)
    assert gradient_loss(blurred, x) > 0.1


def test_losses_do_not_depend_on_the_resolution() -> None:
    x, y = torch.rand(2, 1, 3, 16, 16)
    tiled = [picture.repeat(1, 1, 4, 4) for picture in (x, y)]
    mean, logvar = torch.randn(1, 2, 4, 4), torch.randn(1, 2, 4, 4)
    torch.testing.assert_close(kl_loss(mean.repeat(1, 1, 4, 4), logvar.repeat(1, 1, 4, 4)), kl_loss(mean, logvar))
    torch.testing.assert_close(gradient_loss(*tiled), gradient_loss(x, y), atol=0.08, rtol=0.2)
