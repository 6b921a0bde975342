"""The masked loss: what a mask leaves out has no gradient, what it keeps has that of a training without masks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.config.schema import Stage2Config
from ldm.data.draws import draw_batch
from ldm.diffusion.process import DiffusionProcess
from ldm.models import unet
from stage2_diffusion.denoiser import Denoiser
from stage2_diffusion.draws import NoiseDraws
from stage2_diffusion.folder_trainer import FolderTrainer
from stage2_diffusion.objective import Objective

TINY: dict[str, Any] = {
    "conditions": (),
    "channels": (4,),
    "attention": (False,),
    "layers": 1,
    "mid_attention": False,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
    "batch": 4,
}
OBJECTIVES = [
    {"loss": "l2"},
    {"loss": "l1", "loss_weighting": "min_snr"},
    {"loss": "huber", "prediction_type": "v"},
    {"prediction_type": "flow"},
    {"variance": "learned"},
    {"loss_weighting": "learned"},
    {"beta_schedule": "learned"},
    {"timestep_sampling": "loss"},
]


def losses_and_gradient(keys: dict[str, Any], mask: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses `(N,)` of four outputs, which don't depend on the mask, and the gradient of their mean."""
    torch.manual_seed(0)
    stage = Stage2Config(**TINY, **keys)
    objective = Objective(stage, Denoiser(unet.build(stage, 2, 4), stage))
    n, x0 = torch.arange(4), torch.randn(4, 2, 4, 4)
    batch = draw_batch({"position": n, "latent": x0}, NoiseDraws(0, 2, 1))
    eps, added = objective.noise(batch)
    t, importance = objective.timesteps(batch["u"])
    x_t = objective.noising.add_noise(x0, added, t)
    output = torch.randn(4, 4 if stage.variance == "learned" else 2, 4, 4, requires_grad=True)
    losses = objective.losses(output, x0, x_t, eps, t, mask)
    (gradient,) = torch.autograd.grad((importance * losses).mean(), output)
    return losses.detach(), gradient


@pytest.mark.parametrize("keys", OBJECTIVES, ids=str)
def test_a_mask_takes_terms_out_of_the_loss_and_changes_no_other(keys: dict[str, Any]) -> None:
    mask = (torch.rand(4, 1, 4, 4, generator=torch.Generator().manual_seed(1)) < 0.5).float()
    plain, gradient = losses_and_gradient(keys, None)
    white, white_gradient = losses_and_gradient(keys, torch.ones_like(mask))
    assert torch.equal(white, plain) and torch.equal(white_gradient, gradient)

    inside, masked_gradient = losses_and_gradient(keys, mask)
    assert torch.equal(masked_gradient, torch.where(mask > 0, gradient, 0))
    outside, _ = losses_and_gradient(keys, 1 - mask)
    torch.testing.assert_close(inside + outside, plain)

    weighted, _ = losses_and_gradient({**keys, "unmasked_weight": 0.25}, mask)
    torch.testing.assert_close(weighted, inside + 0.25 * outside)
    torch.testing.assert_close(losses_and_gradient({**keys, "unmasked_weight": 0.25}, 0 * mask)[0], 0.25 * plain)
    everything, _ = losses_and_gradient({**keys, "unmasked_weight": 1.0}, mask)
    assert torch.equal(everything, plain)


def test_a_training_applies_masks_and_logs_the_share_of_samples_that_have_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(4):
        image = Image.fromarray(rng.integers(0, 255, (16, 16, 4), np.uint8), "RGBA")
        image.putalpha(Image.fromarray(np.tril(np.full((16, 16), 255, np.uint8))))
        (image.convert("RGB") if i == 0 else image).save(tmp_path / f"images/{i}.png")

    def train(name: str, **keys: Any) -> list[dict[str, Any]]:
        FolderTrainer(
            DiffusionProcess("eps", "cosine"),
            tmp_path / "images",
            size=16,
            batch=4,
            steps=2,
            precision="no",
            run=tmp_path / name,
            sample__steps=2,
            run__preflight=False,
            run__tracker="none",
            run__device="cpu",
            run__log_every=1,
            stage2__channels=[4],
            stage2__attention=[False],
            stage2__norm_num_groups=4,
            stage2__attention_head_dim=4,
            stage2__layers=1,
            **keys,
        ).train()
        lines = map(json.loads, (tmp_path / name / "stage2/metrics.jsonl").read_text().splitlines())
        return [line for line in lines if "loss" in line]

    source = {"path": str(tmp_path / "images"), "mask": "alpha"}
    plain, masked = train("plain"), train("masked", data__source=source)
    weighted = train("weighted", data__source=source, stage2__unmasked_weight=1.0)
    assert [line["masked"] for line in masked] == [0.75, 0.75] and not any("masked" in line for line in plain)
    assert [line["loss"] for line in weighted] == [line["loss"] for line in plain]  # the same bits
    assert masked[0]["loss"] < 0.75 * plain[0]["loss"]
    assert json.loads((tmp_path / "masked/data-report.json").read_text())["masks"] == {
        "images": 3,
        "without": ["0.png"],
    }
