"""A GAN, a VAE and a latent diffusion model on the same images: their losses, and the script that compares them."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import compare_families
import families_models
import families_report
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from ldm.evaluation.features import Features

STEPS = {"gan": 2, "vae": 2, "autoencoder": 2, "unet": 2}


class CoarsePixels:
    """A feature network of no weights: the mean colours of a 4 × 4 grid."""

    name, label, fingerprint = "pixels", "4 × 4 pixels, 48", "none"

    def __call__(self, images: torch.Tensor) -> Features:
        return Features(F.adaptive_avg_pool2d(images.float() / 255, 4).flatten(1))


@pytest.fixture
def compare(three_shapes: Callable[[list[str]], Path], tmp_path: Path) -> Callable[..., dict]:
    images = three_shapes(["a drawing"] * 32)

    def run(out: str, *families: str, **steps: int) -> dict:
        arguments = [
            "--out",
            str(tmp_path / out),
            "--source",
            str(images),
            "--size",
            "16",
            "--seeds",
            "1",
            "--families",
        ]
        arguments += [*(families or families_models.FAMILIES), "--steps"]
        args = compare_families.parse([*arguments, *(f"{part}={n}" for part, n in (STEPS | steps).items())])
        compare_families.compare(args, CoarsePixels)
        return json.loads((tmp_path / out / "families.json").read_text("utf-8"))

    return run


def test_three_families_are_trained_once_and_the_same_steps_draw_the_same_images(
    compare: Callable[..., dict], tmp_path: Path
) -> None:
    record = compare("a")
    assert record["steps"] == STEPS and record["compared"] == 16
    for name, own in (("gan", set()), ("vae", {"bits"}), ("ldm", {"bits"})):
        (figures,) = record["families"][name]
        assert set(figures) == {"train_seconds", "parameters", "draw_seconds", *own, *record["real"]}
        assert all(math.isfinite(value) for value in figures.values()) and figures["train_seconds"] > 0
    assert {*families_report.OF_SETS, "diversity", "modes_missed"} == set(record["real"])
    assert "one seed, no verdict" in record["verdicts"][0]
    table = (tmp_path / "a/families.md").read_text("utf-8")
    assert "| bits/dim, at most ↓ | none |" in table and (tmp_path / "a/families.png").exists()

    files = sorted((tmp_path / "a").glob("*-seed0/*.*"))
    written = {file: file.stat().st_mtime_ns for file in files}
    assert compare("a") == record
    assert {file: file.stat().st_mtime_ns for file in files} == written  # nothing was trained or measured again

    compare("b", "gan", "vae")  # a run's own tests show the same of the third
    for name in ("gan", "vae"):
        first, second = (load_file(tmp_path / out / f"{name}-seed0/samples.safetensors") for out in "ab")
        assert torch.equal(first["images"], second["images"]), name
        assert first["images"].shape == (16, 3, 16, 16) and first["images"].float().std() > 1
    with pytest.raises(ValueError, match="has gan=2, not 3; give another --out"):
        compare("a", gan=3)


def test_a_stopped_comparison_belongs_to_its_images(three_shapes: Callable[[list[str]], Path], tmp_path: Path) -> None:
    def stop() -> Features:
        raise KeyboardInterrupt

    call = ["--out", str(tmp_path / "out"), "--size", "16", "--families", "gan", "gan", "--steps", "gan=2", "--source"]
    args = compare_families.parse([*call, str(three_shapes(["a drawing"] * 32))])
    assert args.families == ["gan"]
    with pytest.raises(KeyboardInterrupt):
        compare_families.compare(args, stop)  # type: ignore[arg-type]
    args.source = str(tmp_path)
    with pytest.raises(ValueError, match="was made with source"):
        compare_families.compare(args, CoarsePixels)


def test_steps_are_as_many_as_fit_into_the_time() -> None:
    later = 0.0

    def train(images: families_models.Images, steps: dict[str, int], seed: int, folder: Path) -> None:
        first, second = (steps[part] + later * max(0, steps[part] - compare_families.TIMED) for part in steps)
        compare_families.time.spent += 1 + 0.1 * first + 0.2 * second

    class Clock:
        spent = 0.0

        def process_time(self) -> float:
            return self.spent

    family = families_models.Family("", {"first": 0.25, "second": 0.75}, train)  # type: ignore[arg-type]
    images = families_models.Images(torch.zeros(1), Path())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_families, "time", Clock())
        steps = compare_families.steps_within(1002.2, family, images)
        # 1 s besides, and 4 steps of each part, take 2.2 s; 250 s and 750 s are left
        assert steps == {"first": pytest.approx(2504, abs=1), "second": pytest.approx(3754, abs=1)}
        later = 0.25  # a step takes longer than the first ones show
        steps = compare_families.steps_within(1002.2, family, images)
        compare_families.time.spent = 0
        train(images, steps, 0, Path())
        assert compare_families.time.process_time() == pytest.approx(1002.2, rel=0.02)


def test_r1_of_a_linear_discriminator_is_half_gamma_times_its_squared_weights() -> None:
    torch.manual_seed(0)
    discriminator = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    real, fake = torch.randn(2, 5, 3, 2, 2)
    without, with_r1 = (families_models.discriminator_loss(discriminator, real, fake, gamma) for gamma in (0.0, 0.7))
    penalty = 0.35 * discriminator[1].weight.square().sum()
    torch.testing.assert_close(with_r1 - without, penalty)


def test_the_elbo_is_the_decoders_density_less_the_closed_form_of_the_kl() -> None:
    torch.manual_seed(0)
    vae = families_models.VAE(16)
    mean, log_variance = torch.randn(families_models.NOISE), torch.randn(families_models.NOISE)
    for layer in (vae.encoder[-1], vae.decoder[-1]):
        nn.init.zeros_(layer.weight)
    with torch.no_grad():
        vae.encoder[-1].bias.copy_(torch.cat([mean, log_variance]))
        vae.decoder[-1].bias.fill_(0.2)
        vae.log_variance.fill_(math.log(0.3**2))
    x = (torch.randint(-60, 60, (4, 3, 16, 16)) * 2 + 1) / 255  # 8-bit values, none the first or last one
    bits = vae.negative_elbo(x, torch.randn(4, families_models.NOISE))
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum()
    density = torch.distributions.Normal(0.2, 0.3).log_prob(x).flatten(1).sum(1)
    nll = -density - x[0].numel() * math.log(2 / 255)  # a bin's width
    torch.testing.assert_close(bits, (nll + kl) / (x[0].numel() * math.log(2)), atol=1e-4, rtol=0)


def test_only_a_significant_lead_is_called_a_win() -> None:
    conclusion = families_report.conclusion
    a, b = [10.0, 11, 12], [13.0, 14, 15]  # Welch: t = 3.67, 4 degrees, p = 0.021
    assert conclusion("fid", {"a": a, "b": b, "c": [20, 22, 24]}, 5) == "Fréchet distance: the a wins"
    tie = conclusion("recall", {"a": [0.5, 0.6, 0.7], "b": [0.3, 0.4, 0.5], "c": [0.0, 0.1, 0.2]}, 0.9)  # p = 0.07
    assert tie == "recall: the a and the b tie; the a is ahead of the c"
    assert conclusion("diversity", {"a": b, "b": a}, 9.5) == "diversity: the b wins"  # nearer to real images
    assert conclusion("recall", {"a": [0.0] * 3, "b": [0.0] * 3}, 0.9) == "recall: the a and the b tie"
    assert conclusion("bits", {"b": a}, None) == "bits/dim, at most: only the b has one"
    assert conclusion("bits", {"a": [3.0], "b": [4.0]}, None) == "bits/dim, at most: one seed, no verdict"


def test_unequal_times_of_training_are_called_so() -> None:
    times = [
        [{"train_seconds": 99.0}, {"train_seconds": 101.0}],
        [{"train_seconds": 108.0}],
        [{"train_seconds": 115.0}],
    ]
    text = "The longest training took"
    assert families_report.equal_compute(dict(zip("ab", times, strict=False))) == f"{text} 1.08 times the shortest"
    unequal = f"{text} 1.15 times the shortest: this is not equal compute"
    assert families_report.equal_compute(dict(zip("abc", times, strict=True))) == unequal


def test_a_diverged_model_is_named_not_measured(tmp_path: Path) -> None:
    nan = families_models.Trained(1, lambda numbers: torch.full((len(numbers), 3, 4, 4), torch.nan), None)
    family = families_models.Family("GAN", {"gan": 1.0}, lambda *_: nan)
    images = families_models.Images(torch.zeros(2, 3, 4, 4), tmp_path)
    with pytest.raises(ValueError, match="GAN, seed 0: its training diverged"):
        compare_families.train_and_draw(family, images, images.pixels, {"gan": 1}, 0, tmp_path / "gan")


def test_mistakes_are_named_in_one_line(
    call: Callable[..., str], three_shapes: Callable[[list[str]], Path], tmp_path: Path
) -> None:
    out, images = tmp_path / "out", three_shapes(["a drawing"] * 3)
    for arguments, message in (
        (["--seconds", 0], "error: --seconds: 0; give 1 or more"),
        (["--size", 33], "error: --size: 33; give 16, 32, 64 or 128"),
        (["--steps", "gan=0"], "'gan=0'; give PART=N with a part of gan, vae, autoencoder, unet and at least 1 step"),
        (["--source", images], f"error: --source: {images} has 3 images; one half is trained on, the other"),
    ):
        printed = call(compare_families.main, "--out", out, *arguments, status=2)
        assert message in printed and printed.count("error: ") == 1, printed
