"""Fixed batches of images, and the cache of real images' features."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import cast

import pytest
import torch

from ldm.data.index import Index
from ldm.evaluation import networks
from ldm.evaluation.features import FeatureNetwork, Features
from ldm.evaluation.generation import GenerationPlan, generated_features, real_features
from ldm.evaluation.model_figures import RealImages, prompt_following
from ldm.sampling.options import Sampling
from ldm.sampling.pipeline import LatentDiffusion
from ldm.utils.errors import UserError

Drawings = Callable[..., tuple[object, Index]]


class Mean:
    """A network that sees the mean colour, and counts its calls."""

    name = "mean"
    label = "mean, 3"

    def __init__(self, fingerprint: str = "0"):
        self.fingerprint, self.batches = fingerprint, list[int]()

    def __call__(self, images: torch.Tensor) -> Features:
        self.batches.append(len(images))
        return Features(images.float().mean((2, 3)), logits=images.float().amax((2, 3)))


def test_prompts_are_captions_of_held_out_images_then_of_training_images_then_these_again(drawings: Drawings) -> None:
    _, data = drawings()
    few = Index(data.table, data.sources, data.data, data.rows[::100])
    held, train = few.select("reconstruction", "combination"), few.select("train")
    assert len(held) and len(train)
    count = len(few) + 2
    plan = GenerationPlan.of(few, ("text", "class"), count)
    own = [*held, *train]
    assert plan.prompts == tuple(entry.captions[0] for entry in own) + tuple(
        entry.captions[1 % len(entry.captions)] for entry in own[:2]
    )
    assert plan.labels == tuple(entry.label for entry in (*own, *own[:2]))
    assert GenerationPlan.of(few, (), 3).prompts is None


def test_images_are_those_of_their_numbers_and_the_values_of_a_png(
    random_model: Callable[..., LatentDiffusion], drawings: Drawings
) -> None:
    model, (_, data) = random_model("text"), drawings()
    plan = GenerationPlan.of(data, ("text",), 5, seed=7, batch=2, options=Sampling(num_inference_steps=2))
    assert plan.prompts
    network = Mean()
    features = generated_features(plan, model, network)
    assert network.batches == [2, 2, 1]
    image = model(plan.prompts[3], seed=10, num_inference_steps=2)[0]
    mean = torch.tensor(list(image.getdata())).float().mean(0)
    torch.testing.assert_close(features.pooled[3], mean, rtol=0, atol=0.5)  # alone: last bits may round otherwise


def test_features_of_real_images_are_computed_once_for_their_content_and_network(
    drawings: Drawings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, data = drawings()
    few, network = data.first(40), Mean()
    first = real_features(few, 16, network, tmp_path)
    again = real_features(few, 16, network, tmp_path)
    assert first and again
    assert network.batches == [32, 8]
    assert torch.equal(again.pooled, first.pooled)
    assert again.logits is not None and first.logits is not None
    assert torch.equal(again.logits, first.logits)
    assert again.spatial is None
    for other in (
        lambda: real_features(data.first(39), 16, network, tmp_path),
        lambda: real_features(few, 8, network, tmp_path),
        lambda: real_features(few, 16, Mean("1"), tmp_path),
    ):
        other()
    assert len(list((tmp_path / "features").iterdir())) == 4
    assert not capsys.readouterr().err


def test_a_damaged_file_of_features_is_named_and_computed_again(
    drawings: Drawings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few, network = drawings()[1].first(3), Mean()
    sound = real_features(few, 16, network, tmp_path)
    (path,) = (tmp_path / "features").iterdir()
    whole = path.read_bytes()
    for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        mended = real_features(few, 16, network, tmp_path)
        assert f"{path} is damaged" in capsys.readouterr().err
        assert sound and mended
        assert torch.equal(mended.pooled, sound.pooled)
        assert path.read_bytes() == whole


def test_real_images_follow_their_prompts_and_never_shuffled_ones_though_prompts_come_again(
    drawings: Drawings, tmp_path: Path
) -> None:
    few, network = drawings()[1].first(4), Mean()
    plan = GenerationPlan.of(few, ("text",), 8)  # twice as many: half of the list later are the same prompts
    assert plan.described is not None
    described = real_features(plan.described, 16, network, tmp_path)
    assert described is not None
    following = prompt_following(
        plan, Features.cat([described, described]), RealImages(few, 16, tmp_path), cast(FeatureNetwork, network)
    )
    assert following.ranks.figures()["R@1"].value == 1
    assert following.shuffled and following.shuffled.figures()["R@1"].value == 0

    one = few.first(1)
    plan = GenerationPlan.of(one, ("text",), 2)
    alone = prompt_following(
        plan, Features.cat([described[:1]] * 2), RealImages(one, 16, tmp_path), cast(FeatureNetwork, network)
    )
    assert alone.shuffled is None and set(alone.figures(cast(FeatureNetwork, network))) == {"mean"}


def test_images_that_are_not_finite_are_named(random_model: Callable[..., LatentDiffusion], drawings: Drawings) -> None:
    model = random_model("text")
    with torch.no_grad():
        model.unet.conv_out.bias.fill_(float("nan"))
    plan = GenerationPlan.of(drawings()[1], ("text",), 3)
    with pytest.raises(UserError, match="the U-Net's output is NaN or infinite for 3 of 3 images"):
        generated_features(plan, model, Mean())


def test_without_timm_the_default_network_is_the_runs_own_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: set[str] = set()

    def version(package: str) -> str:
        if package in missing:
            raise PackageNotFoundError(package)
        return "1"

    monkeypatch.setattr(networks, "version", version)
    assert networks.default_network() == "efficientnet-lite0"
    for package in ("timm", networks.WHEEL):
        missing = {package}
        assert networks.default_network() == "latents"
