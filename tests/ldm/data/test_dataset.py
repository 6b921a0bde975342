"""The samples of a step depend on nothing but the seed and the step."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from of_config import images_of, indexed

from ldm.config import loader
from ldm.config.schema import Stage1Config
from ldm.data import index
from ldm.data.sampler import Order, Positions
from ldm.models import autoencoder, text_encoder
from ldm.utils.rng import generator
from stage2_diffusion.train import train

BUCKETS = [(1, 1)] * 50 + [(1, 2)] * 7 + [(2, 1)] * 31 + [(3, 1)]


@pytest.fixture
def shapes(root: Path, tmp_path: Path, three_shapes: Callable[[list[str]], Path]) -> Callable[..., loader.Config]:
    """Builds configurations for twenty-two images in three buckets, with two captions per image."""
    folder = three_shapes([f"image {i}\nanother {i}" for i in range(22)])

    def build(*overrides: str) -> loader.Config:
        return loader.load(
            root / "configs/tiny.yaml",
            [
                f"run.dir={tmp_path / 'run'}",
                "run.tracker=none",
                f"data.source.path={folder}",
                "data.source.lines=true",
                "data.size=16",
                "data.buckets={step: 8}",
                *overrides,
            ],
        )

    return build


def test_all_samples_of_a_step_are_of_one_bucket() -> None:
    order = Order([1.0] * 89, seed=0, batch=8, buckets=BUCKETS)
    for step in range(100):
        assert len({BUCKETS[order[8 * step + j]] for j in range(8)}) == 1


def test_after_k_epochs_every_image_was_shown_k_to_k_plus_8_times() -> None:
    order = Order([1.0] * 89, seed=0, batch=8, buckets=BUCKETS)
    for epoch in range(1, 30):
        seen = Counter(order[n] for n in range(8 * order.first_step(epoch)))
        assert min(seen[i] for i in range(89)) >= epoch
        assert max(seen.values()) <= epoch + 8  # a bucket with a single image fills a batch with it
        assert abs(sum(seen.values()) - 89 * epoch) <= 8 * 4


def test_a_batch_may_be_larger_than_the_data_set() -> None:
    order = Order([1.0] * 10, seed=0, batch=16, buckets=[(1, 1)] * 6 + [(1, 2)] * 4)
    seen = Counter(order[n] for n in range(16 * 100))
    assert all(abs(seen[i] - 160) <= 16 for i in range(10))


def test_a_bucketed_order_is_a_pure_function_of_seed_and_position() -> None:
    positions = np.random.default_rng(0).permutation(800).tolist()
    forwards = Order([1.0] * 89, seed=1, batch=8, buckets=BUCKETS)
    jumping = Order([1.0] * 89, seed=1, batch=8, buckets=BUCKETS)
    expected = [forwards[n] for n in range(800)]
    assert {n: jumping[n] for n in positions} == dict(enumerate(expected))
    assert [Order([1.0] * 89, seed=2, batch=8, buckets=BUCKETS)[n] for n in range(800)] != expected


def test_repeats_are_counted_per_epoch() -> None:
    order = Order([1.0] * 10, seed=0, repeats=[1] * 5 + [3] * 5)
    assert Counter(order[n] for n in range(20)) == Counter(
        {**dict.fromkeys(range(5), 1), **dict.fromkeys(range(5, 10), 3)}
    )


@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("workers", [0, 1, 3])
def test_the_global_batch_is_the_same_for_any_processes_and_workers(
    processes: int, workers: int, shapes: Callable[..., loader.Config]
) -> None:
    config = shapes("data.flip=true", "data.crop=random", "data.crops=3")
    samples = images_of(indexed(config), config, 4)
    order = samples.plan.order
    assert len(order.rounds) == 3
    steps = order.first_step(2)  # two epochs
    shares = []
    for rank in range(processes):
        positions = Positions(0, steps, 4, 1, rank, processes)
        shares.append(list(torch.utils.data.DataLoader(samples, batch_sampler=positions, num_workers=workers)))
    for step in range(steps):
        parts = [share[step] for share in shares]
        assert torch.equal(torch.cat([p["position"] for p in parts]), torch.arange(4 * step, 4 * step + 4))
        single_process = [samples[n] for n in range(4 * step, 4 * step + 4)]
        for key in ("pixels", "crop", "original_size"):
            assert torch.equal(torch.cat([p[key] for p in parts]), torch.stack([s[key] for s in single_process]))
        assert [caption for p in parts for caption in p["caption"]] == [s["caption"] for s in single_process]


def test_flips_crops_and_captions_vary_and_are_recorded(shapes: Callable[..., loader.Config]) -> None:
    config = shapes("data.flip=true", "data.crop=random", "data.crops=4")
    samples = images_of(indexed(config), config, 4)
    planned_samples = [samples.plan[n] for n in range(400)]
    assert 150 < sum(planned.crop.flip for planned in planned_samples) < 250
    assert {planned.crop.number for planned in planned_samples} == {0, 1, 2, 3}
    assert 150 < sum(planned.caption.startswith("another") for planned in planned_samples) < 250
    wide = [n for n, planned in enumerate(planned_samples) if planned.entry.width == 36 and not planned.crop.flip]

    def between_pixels(n: int) -> float:
        """How far the upper edge is from a whole pixel, to which the recorded corner is rounded."""
        width, height = planned_samples[n].crop.size
        top = float(generator(config.run.seed, "corner", n).random(2)[1]) * (14 * width / 36 - height)
        return abs(top - round(top))

    n = min(wide, key=between_pixels)
    sample, planned = samples[n], planned_samples[n]
    left, top = sample["crop"].tolist()
    assert sample["original_size"].tolist() == [36, 14]
    width, height = planned.crop.size
    scale = max(width / 36, height / 14)
    resized = samples.plan.index.load_image(planned.number).resize((round(36 * scale), round(14 * scale)))
    expected = np.asarray(resized.crop((left, top, left + width, top + height)), np.float32) / 127.5 - 1
    assert np.abs(expected - sample["pixels"].permute(1, 2, 0).numpy()).mean() < 0.1


@pytest.mark.slow
def test_training_from_the_cache_has_the_same_losses_as_without(
    shapes: Callable[..., loader.Config], words: Path, tmp_path: Path
) -> None:
    losses = {}
    for kind in ("disk", "none"):
        config = shapes(
            f"data.cache={kind}",
            f"run.dir={tmp_path / kind}",
            f"text.model={words}",
            "run.log_every=1",
            "run.precision=no",
            "stage2.steps=12",
            "stage2.batch=4",
            "stage2.channels=[16, 32]",
            "sample.prompts=[]",
        )
        torch.manual_seed(0)
        vae = autoencoder.Autoencoder(
            autoencoder.build(
                Stage1Config(channels=(16, 16), layers=1, latent_channels=4, norm_num_groups=8, mid_attention=False), 16
            )
        )
        train(config, indexed(config), vae, text_encoder.load(config.text.model, config.text.max_tokens))
        lines = (tmp_path / kind / "stage2/metrics.jsonl").read_text().splitlines()
        losses[kind] = [json.loads(line)["loss"] for line in lines]
    assert len(losses["disk"]) == 12
    assert losses["disk"] == pytest.approx(losses["none"], rel=1e-3)


def test_images_are_held_out_by_their_hash(drawings: Callable[..., tuple[loader.Config, index.Index]]) -> None:
    _, without_val = drawings()
    _, with_val = drawings("data.val_fraction=0.2")
    before, after = (set(built.select("train").column("sha256").tolist()) for built in (without_val, with_val))
    reconstruction = set(with_val.select("reconstruction").column("sha256").tolist())
    assert after < before
    assert not reconstruction & after
    assert 0.15 < len(before - after) / len(before) < 0.25
    assert all(int.from_bytes(sha256[:4]) < 0.2 * 2**32 for sha256 in before - after)
    assert with_val.select("combination").fingerprint() == without_val.select("combination").fingerprint()
