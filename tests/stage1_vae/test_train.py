"""Training stage one on a few images."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Decoder
from of_config import images_of
from torch import nn
from torchmetrics.image import LearnedPerceptualImagePatchSimilarity
from torchvision.models import alexnet
from transformers import ViTConfig, ViTModel

from ldm.config.schema import Config, Stage1Config
from ldm.data.dataset import iter_images
from ldm.data.index import Index
from ldm.models import feature_networks
from ldm.models.autoencoder import build
from ldm.models.autoencoder import load as load_autoencoder
from ldm.models.feature_networks.shift_tolerant import ShiftTolerantNet
from ldm.utils.errors import UserError
from stage1_vae.model import Reconstruction
from stage1_vae.objective import Objective
from stage1_vae.train import train


def test_training_reconstructs_its_images_and_normalises_latents(
    tmp_path: Path, drawings: Callable[..., tuple[Config, Index]]
) -> None:
    settings, index = drawings("stage1.steps=100", "stage1.batch=8", "stage1.channels=[8, 16]")
    few = np.concatenate([index.select("train").rows[:8], index.select("combination").rows[:4]])
    index = Index(index.table, index.sources, index.data, few)
    train(settings, index)
    trained = load_autoencoder(tmp_path / "run/autoencoder")
    losses = [json.loads(line).get("l1") for line in (tmp_path / "run/stage1/metrics.jsonl").read_text().splitlines()]
    losses = [loss for loss in losses if loss]  # other lines are of held-out images
    assert losses[-1] < 0.5 * losses[0]
    facts = json.loads((tmp_path / "run/autoencoder/latents.json").read_text())
    assert facts["images"] == 8  # not the held-out ones
    assert facts["combination"]["psnr"] > 8
    latents = trained.encode(next(iter_images(index.select("train")))).transpose(0, 1).flatten(1)
    torch.testing.assert_close(latents.mean(1), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std(1), torch.ones(4), atol=1e-2, rtol=0)
    assert AutoencoderKL.from_pretrained(tmp_path / "run/autoencoder").config.scaling_factor == 1.0


def test_lpips_matches_torchmetrics_and_gives_the_encoder_a_gradient(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub/checkpoints" / feature_networks.BACKBONES["alex"].rpartition("/")[2]
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(alexnet(weights=None).state_dict(), file)
    stage = Stage1Config(channels=(16, 16), layers=1, norm_num_groups=8, l1=0, gradient=0, lpips=0.5, lpips_net="alex")
    model = Reconstruction(build(stage, 32), stage)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    rebuilt = model(x, torch.zeros(2, 4, 16, 16)).pixels.clamp(-1, 1)
    objective = Objective(stage, model, None, 32, torch.device("cpu"))
    loss, logs = objective.reconstruction(rebuilt, x)
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.vae.encoder.conv_in.parameters())
    reference = LearnedPerceptualImagePatchSimilarity("alex")(rebuilt.detach(), x)
    torch.testing.assert_close(logs["lpips"], reference)
    torch.testing.assert_close(loss, 0.5 * reference)


def test_shift_tolerant_lpips_needs_no_download_and_gives_the_encoder_a_gradient() -> None:
    stage = Stage1Config(channels=(16, 16), layers=1, norm_num_groups=8, l1=0, gradient=0, lpips=2, lpips_net="st-alex")
    model = Reconstruction(build(stage, 32), stage)
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    objective = Objective(stage, model, None, 32, torch.device("cpu"))
    rebuilt = model(x, torch.zeros(2, 4, 16, 16)).pixels
    loss, _ = objective.reconstruction(rebuilt, x)
    loss.backward()
    assert all(float(p.grad.abs().sum()) > 0 for p in model.vae.encoder.conv_in.parameters())
    torch.testing.assert_close(loss, 2 * ShiftTolerantNet("st-alex")(rebuilt, x).mean())


def test_shift_tolerant_lpips_has_a_finite_gradient_where_no_channel_is_active() -> None:
    net = ShiftTolerantNet("st-alex")
    net.features[0].bias.fill_(-1e3)  # so that the first activation is 0 everywhere
    x = torch.rand(1, 3, 32, 32).requires_grad_()
    (gradient,) = torch.autograd.grad(net(x, torch.rand(1, 3, 32, 32)).sum(), x)
    assert gradient.isfinite().all()


def test_a_nonfinite_sample_is_named_and_its_step_skipped(
    drawings: Callable[..., tuple[Config, Index]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, index = drawings("stage1.steps=3", "stage1.batch=4", "run.log_every=1", "run.max_skipped=2")
    calls: list[int] = []

    def overflow(module: nn.Module, _: object, pixels: torch.Tensor) -> torch.Tensor | None:
        """Makes the third image of each batch but the first overflow, as it may in half precision."""
        if not isinstance(module, Decoder):
            return None
        calls.append(0)
        return (
            torch.where(torch.arange(len(pixels))[:, None, None, None] == 2, torch.inf, pixels) if calls[1:] else None
        )

    plan = images_of(index.select("train"), settings, 4).plan
    hook = nn.modules.module.register_module_forward_hook(overflow)
    try:
        with pytest.raises(
            UserError, match=f"at step 3, of sample 10, {re.escape(plan.index[plan[10].number].key)}; 2 steps in a row"
        ):
            train(settings, index)
    finally:
        hook.remove()
    name = plan.index[plan[6].number].key
    assert f"not finite at step 2, of sample 6, {name}; the step is skipped" in capsys.readouterr().out


def test_alignment_to_a_pretrained_encoder_improves_and_codebook_statistics_are_logged(
    tmp_path: Path, drawings: Callable[..., tuple[Config, Index]]
) -> None:
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    ViTModel(ViTConfig(**shape)).save_pretrained(tmp_path / "vit")
    settings, index = drawings(
        "stage1.steps=40",
        "stage1.batch=8",
        "stage1.model=vq-f4-small",
        "stage1.channels=[8, 16]",
        "stage1.norm_num_groups=8",
        "stage1.codes=32",
        "stage1.revive=20",
        "run.log_every=20",
        f"stage1.align.model={tmp_path / 'vit'}",
        "stage1.align.weight=1",
        "stage1.gradient_checkpointing=false",
    )
    train(settings, index.select("train").first(64))
    logs = [json.loads(line) for line in (tmp_path / "run/stage1/metrics.jsonl").read_text().splitlines()]
    logs = [line for line in logs if "l1" in line]
    assert logs[-1]["align"] < logs[0]["align"]
    assert {"vq", "codes_used", "code_perplexity", "codes_revived"} <= logs[0].keys()
    assert logs[-1]["codes_used"] > 0.2
    assert load_autoencoder(tmp_path / "run/autoencoder").vae.config.num_vq_embeddings == 32
