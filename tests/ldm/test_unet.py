"""The U-Net that a configuration describes."""

from pathlib import Path

import pytest
import torch

from ldm import config, unet
from ldm.diffusion import Process
from ldm.errors import UserError
from ldm.sampling import scheduler


def test_attention_backends_agree(root: Path) -> None:
    torch.manual_seed(0)
    stage = config.load(root / "configs/tiny.yaml").stage2
    model = unet.build(stage, 4, 16, 384).eval()
    x, t, text = torch.randn(2, 4, 16, 16), torch.tensor([3.0, 700.0]), torch.randn(2, 16, 384)
    answers = []
    for backend in ("eager", "sdpa"):
        unet.use_attention(model, backend, torch.device("cpu"))
        with torch.no_grad():
            answers.append(model(x, t, text).sample)
    torch.testing.assert_close(*answers, atol=1e-5, rtol=1e-4)


def test_a_backend_that_is_not_there_is_an_error(root: Path) -> None:
    model = unet.build(config.load(root / "configs/tiny.yaml").stage2, 4, 16, 384)
    with pytest.raises(UserError, match="xformers"):
        unet.use_attention(model, "xformers", torch.device("cpu"))


def test_latents_too_small_for_the_levels_are_refused(root: Path) -> None:
    stage = config.load(root / "configs/openmoji.yaml").stage2
    with pytest.raises(UserError, match=r"stage2\.channels: 3 levels"):
        unet.build(stage, 4, 6, 384)


def test_a_unet_that_does_not_fit_the_latents_is_refused(root: Path, tmp_path: Path) -> None:
    unet.build(config.load(root / "configs/tiny.yaml").stage2, 4, 16, 384).save_pretrained(tmp_path / "unet")
    loaded = unet.load(str(tmp_path), 4, 32, 384, "flow")
    assert (loaded.config.in_channels, loaded.config.sample_size) == (4, 32)
    with pytest.raises(UserError, match="in_channels 4"):
        unet.load(str(tmp_path), 8, 16, 384, "flow")
    scheduler(Process("eps"), "ddim").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(UserError, match=r"stage2\.target: 'v', but .* set stage2\.target=eps"):
        unet.load(str(tmp_path), 4, 16, 384, "v")
