"""The conditions that the U-Net is trained with, and how often they are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ldm.config import loader
from ldm.data.draws import draw_batch
from ldm.models.autoencoder import Autoencoder
from ldm.models.conditioning import MAX_NOISE_LEVEL, Condition, TextEmbedding, downsample, mask_and_masked_latents
from ldm.utils.rng import generator
from stage2_diffusion.conditions import Conditions
from stage2_diffusion.masks import random_mask

N, CLASSES = 20_000, 5
BuildConditions = Callable[..., Conditions]


@pytest.fixture
def conditions(root: Path, vae: Autoencoder) -> BuildConditions:
    def build_conditions(*overrides: str) -> Conditions:
        keys = [f"stage2.{override}" for override in overrides]
        return Conditions(loader.load(root / "configs/tiny.yaml", ["data.size=16", *keys]), vae, None, CLASSES)

    return build_conditions


def batch(n: torch.Tensor, side: int = 1, rate: float = 0.0) -> dict[str, Any]:
    """Samples that follow from their positions; every seventh has no class."""
    pixels = torch.sin(n[:, None].double() * 12.9898 + torch.arange(3 * side * side) * 78.233) * 43758.5453
    pixels = (pixels - pixels.floor()).float().view(len(n), 3, side, side)  # as good as random
    label = torch.where(n % 7 == 0, -1, n % CLASSES)
    sizes = {"original_size": torch.stack([n + 100, n + 200], 1), "crop": torch.stack([n % 3, n % 4], 1)}
    return {"position": n, "class": label, "dropout": torch.full((len(n),), rate), "pixels": pixels * 2 - 1, **sizes}


def apply(conditions: Conditions, n: torch.Tensor, **options: Any) -> tuple[Condition, Any, dict[str, torch.Tensor]]:
    samples = draw_batch(batch(n, **options), conditions.draws)
    return conditions(samples, torch.zeros(len(n), 4, 8, 8), TextEmbedding(torch.ones(len(n), 2, 3)))


@pytest.mark.parametrize("rate", [0.0, pytest.param(0.1, marks=pytest.mark.drill), 0.5])
def test_captions_and_classes_are_dropped_at_the_same_positions_and_at_their_rate(
    conditions: BuildConditions, rate: float
) -> None:
    n = torch.arange(N)
    condition, dropped, rates = apply(conditions("conditions=[text, class]"), n, rate=rate)
    assert abs(float(dropped.float().mean()) - rate) <= 4 * math.sqrt(rate * (1 - rate) / N)
    assert rates.keys() == {"dropped"}
    assert float(rates["dropped"]) == pytest.approx(float(dropped.float().mean()))
    assert torch.equal(condition.label, torch.where(dropped | (n % 7 == 0), CLASSES, n % CLASSES))


def test_dropout_each_drops_captions_and_classes_independently(conditions: BuildConditions) -> None:
    n, rate = torch.arange(N), 0.2
    condition, dropped, rates = apply(conditions("conditions=[text, class]", "dropout_each=true"), n, rate=rate)
    labelled = n % 7 != 0
    unlabelled = condition.label == CLASSES
    for drops in (dropped, unlabelled[labelled]):
        assert abs(float(drops.float().mean()) - rate) <= 4 * math.sqrt(rate * (1 - rate) / len(drops))
    pair = torch.stack([dropped[labelled], unlabelled[labelled]]).double()
    assert abs(float(torch.corrcoef(pair)[0, 1])) <= 4 / math.sqrt(pair.shape[1])
    assert float(rates["dropped"]) == pytest.approx(float(dropped.float().mean()))
    assert abs(float(rates["dropped_class"]) - rate) <= 4 * math.sqrt(rate * (1 - rate) / N)


def test_a_sample_is_dropped_at_its_own_rate(conditions: BuildConditions) -> None:
    samples = batch(torch.arange(N))
    samples["dropout"] = torch.where(torch.arange(N) % 2 == 0, 0.0, 0.4)
    conditioning = conditions("conditions=[text]")
    samples = draw_batch(samples, conditioning.draws)
    _, dropped, _ = conditioning(samples, torch.zeros(N, 4, 1, 1), TextEmbedding(torch.ones(N, 1, 1)))
    assert not bool(dropped[::2].any())
    assert abs(float(dropped[1::2].float().mean()) - 0.4) <= 4 * math.sqrt(0.24 / (N / 2))


@pytest.mark.parametrize(
    "conditions_of",
    ["[text, class]", "[text, size]", "[text, inpaint]", "[text, upscale]", "[text, class, size, inpaint]"],
)
def test_the_conditions_of_a_batch_are_those_of_its_parts(conditions: BuildConditions, conditions_of: str) -> None:
    conditioning = conditions(f"conditions={conditions_of}")
    n = torch.arange(100, 112)
    full_batch, dropped, _ = apply(conditioning, n, side=16, rate=0.5)
    for part in (slice(0, 6), slice(6, 12), slice(3, 4)):
        condition, missing, _ = apply(conditioning, n[part], side=16, rate=0.5)
        assert torch.equal(missing, dropped[part])
        for tensor, of_full_batch in zip(condition, full_batch, strict=True):
            assert (tensor is None) == (of_full_batch is None)
            if tensor is not None:  # convolutions round by the batch's size
                torch.testing.assert_close(tensor, of_full_batch[part], atol=1e-5, rtol=1e-5)


def test_sizes_are_height_before_width_and_crops_top_before_left(conditions: BuildConditions) -> None:
    n = torch.tensor([1, 2])
    condition, _, _ = apply(conditions("conditions=[text, size]"), n)
    assert condition.sizes.tolist() == [[201, 101, 1, 1, 16, 16], [202, 102, 2, 2, 16, 16]]
    assert condition.sizes.dtype == torch.float32


def test_an_inpainting_model_sees_the_mask_and_the_masked_image(conditions: BuildConditions, vae: Autoencoder) -> None:
    n = torch.arange(6)
    condition, _, _ = apply(conditions("conditions=[text, inpaint]"), n, side=16)
    mask = torch.stack([random_mask(generator(0, "hole", int(i)), 16, 16) for i in n])
    pixels = batch(n, side=16)["pixels"]
    assert torch.equal(condition.image, mask_and_masked_latents(mask, vae.encode(pixels * (1 - mask))))
    assert condition.image.shape == (6, 5, 8, 8)
    altered = torch.where(mask.bool(), torch.randn_like(pixels), pixels)
    conditioning = conditions("conditions=[text, inpaint]")
    samples = draw_batch({**batch(n), "pixels": altered}, conditioning.draws)
    other, _, _ = conditioning(samples, torch.zeros(6, 4, 8, 8), None)
    assert torch.equal(other.image, condition.image)  # the masked pixels have no influence


def test_an_upscaler_sees_the_small_image_with_noise_of_its_noise_level(conditions: BuildConditions) -> None:
    n = torch.arange(2000)
    condition, _, _ = apply(conditions("conditions=[text, upscale]"), n, side=4)
    level = condition.label
    assert 0 <= int(level.min()) <= 5
    assert MAX_NOISE_LEVEL - 5 <= int(level.max()) < MAX_NOISE_LEVEL
    assert abs(float(level.float().mean()) - (MAX_NOISE_LEVEL - 1) / 2) <= 4 * MAX_NOISE_LEVEL / math.sqrt(12 * len(n))
    error = (condition.image - downsample(batch(n, side=4)["pixels"], 2)).square().flatten(1).mean(1)
    quiet, loud = error[level < 20].mean(), error[level > MAX_NOISE_LEVEL - 20].mean()
    assert float(quiet) < 0.05 < float(loud)


@pytest.mark.parametrize(("height", "width"), [(8, 8), (64, 64), (40, 96)])
def test_masks_have_every_size_and_are_never_empty(height: int, width: int) -> None:
    masks = torch.stack([random_mask(generator(0, "hole", i), height, width) for i in range(600)])
    assert masks.shape == (600, 1, height, width)
    assert set(masks.unique().tolist()) == {0.0, 1.0}
    shares = masks.flatten(1).mean(1)
    assert float(shares.min()) >= 0.01
    full = shares == 1  # a tenth are drawn full; a few boxes or strokes also cover the image
    assert 0.05 < float(full.float().mean()) < 0.2
    rows, columns = masks[:, 0].amax(2), masks[:, 0].amax(1)  # rows and columns that are masked anywhere
    filled = shares == rows.mean(1) * columns.mean(1)
    box = filled & ~full
    side = box & ((rows.mean(1) == 1) | (columns.mean(1) == 1))
    strokes = ~filled
    for kind in (box & ~side, side, strokes):
        assert float(kind.float().mean()) > 0.04
