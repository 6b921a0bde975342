"""Metrics of generated images against torch-fidelity, torchmetrics, and sets whose figures are known."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch_fidelity import calculate_metrics, register_feature_extractor
from torch_fidelity.feature_extractor_base import FeatureExtractorBase
from torchmetrics.image import FrechetInceptionDistance, KernelInceptionDistance

from ldm.evaluation.distances import METRICS, compare, measure
from ldm.evaluation.features import Features
from ldm.utils.errors import UserError


def normal(seed: int, n: int, width: int, shift: float = 0.0, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)) * scale + shift


def value(name: str, real: torch.Tensor, generated: torch.Tensor, **others: Any) -> float:
    return measure([name], Features(real), Features(generated), bootstrap=0, **others)[name].value


class MeanColors(FeatureExtractorBase):
    """Images `(N, 3, 8, 8)` uint8 → their colours, averaged over 2 × 2 pixels, and as logits the first ten."""

    def __init__(self, name: str = "mean-colors", features_list: Any = ("colors",), **_: Any):
        super().__init__(name, list(features_list))

    @staticmethod
    def get_provided_features_list() -> tuple[str, ...]:
        return "colors", "logits"

    @staticmethod
    def get_default_feature_layer_for_metric(metric: str) -> str:
        return "logits" if metric == "isc" else "colors"

    @staticmethod
    def can_be_compiled() -> bool:
        return False

    @staticmethod
    def get_dummy_input_for_compile() -> torch.Tensor:
        return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        colors = torch.nn.functional.avg_pool2d(images.double() / 255, 2).flatten(1)
        layers = {"colors": colors, "logits": colors[:, :10] * 20}
        return tuple(layers[name] for name in self.features_list)

    def features(self, folder: Path) -> Features:
        arrays = [np.asarray(Image.open(path)) for path in sorted(folder.iterdir())]
        colors, logits = MeanColors(features_list=("colors", "logits"))(
            torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
        )
        return Features(colors, logits=logits)


def test_figures_equal_torch_fidelitys_on_the_same_folders(tmp_path: Path) -> None:
    for name, low in (("real", 0), ("generated", 30)):
        (tmp_path / name).mkdir()
        pixels = np.random.default_rng(low).integers(low, 256, (64, 8, 8, 3), dtype=np.uint8)
        for i, image in enumerate(pixels):
            Image.fromarray(image).save(tmp_path / name / f"{i:03}.png")
    register_feature_extractor("mean-colors", MeanColors)
    theirs = calculate_metrics(
        input1=str(tmp_path / "generated"),
        input2=str(tmp_path / "real"),
        feature_extractor="mean-colors",
        fid=True,
        kid=True,
        isc=True,
        prc=True,
        kid_subset_size=64,
        kid_subsets=1,
        isc_splits=1,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
    )
    real, generated = (MeanColors().features(tmp_path / name) for name in ("real", "generated"))
    ours = measure(["fid", "kid", "is", "precision", "recall"], real, generated, bootstrap=0)
    for name, key in (
        ("fid", "frechet_inception_distance"),
        ("kid", "kernel_inception_distance_mean"),
        ("is", "inception_score_mean"),
        ("precision", "precision"),
        ("recall", "recall"),
    ):
        assert ours[name].value == pytest.approx(theirs[key], rel=1e-5), name


@pytest.mark.filterwarnings("ignore:Metric `Kernel Inception Distance`")
def test_figures_equal_torchmetrics() -> None:
    class Same(torch.nn.Module):
        num_features = 12

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            return features

    real, generated = normal(0, 60, 12).double(), normal(1, 60, 12, 0.3).double()
    for name, metric in (
        ("fid", FrechetInceptionDistance(Same(), input_img_size=(12,)).set_dtype(torch.float64)),
        ("kid", KernelInceptionDistance(Same(), subsets=1, subset_size=60)),
    ):
        metric.update(real, real=True)
        metric.update(generated, real=False)
        theirs = metric.compute()
        theirs = theirs[0] if name == "kid" else theirs
        assert value(name, real, generated) == pytest.approx(float(theirs), rel=1e-6), name


def test_fid_of_known_moments_is_its_closed_form() -> None:
    """Equal and opposite points have a mean of 0 and axes of known variance; scaled and shifted, so does the copy."""
    points = torch.cat([torch.eye(6), -torch.eye(6)]).double() * torch.arange(1, 7)
    variance = 2 * torch.arange(1.0, 7).square() / 11
    expected = 6 * 0.5**2 + float((variance.sqrt() * (3 - 1)).square().sum())
    assert value("fid", points, 3 * points + 0.5) == pytest.approx(expected)


def test_fid_of_equal_distributions_is_its_known_bias() -> None:
    """To the first order in 1/N, of D features of variance 1: 2·D/N of the means and D·(D + 1)/(2·N) of covariances."""
    values = [value("fid", normal(2 * i, 200, 4), normal(2 * i + 1, 200, 4)) for i in range(100)]
    assert np.mean(values) == pytest.approx((4 * 5 / 2 + 2 * 4) / 200, rel=0.15)


def test_fid_is_the_same_with_fewer_images_than_features_as_in_the_basis_of_the_images() -> None:
    """A rotation into the images' own space changes no distance; there, features are fewer than images."""
    real, generated = normal(0, 20, 200).double(), normal(1, 20, 200, 0.2).double()
    basis = torch.linalg.qr(torch.cat([real, generated]).T).Q[:, :40]
    padded = (
        torch.cat([torch.zeros(30, 40).double(), real @ basis]),
        torch.cat([torch.zeros(30, 40).double(), generated @ basis]),
    )
    wide = [torch.cat([torch.zeros(30, 200).double(), x]) for x in (real, generated)]
    assert value("fid", real, generated) == pytest.approx(value("fid", real @ basis, generated @ basis))
    assert value("fid", wide[0], wide[1]) == pytest.approx(value("fid", *padded))


def test_sfid_is_fid_of_the_spatial_features() -> None:
    real, generated = (Features(normal(seed, 40, 3), normal(seed + 2, 40, 5, seed)) for seed in (0, 1))
    assert (
        measure(["sfid"], real, generated)["sfid"]
        == measure(["fid"], Features(real.spatial), Features(generated.spatial))["fid"]
    )


def test_cmmd_of_two_points_is_its_closed_form() -> None:
    """Unit vectors at a right angle are √2 apart: 1000·2·(1 − exp(−2/(2·10²))); the length does not matter."""
    x, y = torch.zeros(5, 3), torch.zeros(7, 3)
    x[:, 0], y[:, 1] = 4, 0.1
    assert value("cmmd", x, y) == pytest.approx(2000 * (1 - math.exp(-0.01)))


def test_cmmd_of_equal_distributions_is_20_over_n_at_most() -> None:
    """Its diagonal adds E(1 − k)/N of each set, and 1 − k ≤ ‖x − y‖²/200, whose mean is 2 at most."""
    values = [value("cmmd", normal(2 * i, 50, 32), normal(2 * i + 1, 50, 32)) for i in range(200)]
    assert np.mean(values) == pytest.approx(20 / 50, rel=0.05)  # of directions that are even, nearly the most


def test_the_score_of_certain_and_even_classes_is_their_number_and_of_one_class_is_1() -> None:
    certain = 1000 * torch.eye(8).repeat(3, 1)
    for logits, score in ((certain, 8), (certain[:1].repeat(9, 1), 1)):
        features = Features(torch.zeros(len(logits), 2), logits=logits)
        assert measure(["is"], features, features)["is"].value == pytest.approx(score)


def test_shares_of_equal_and_disjoint_sets_and_of_half_the_modes() -> None:
    """Modes far apart: what is drawn of one of two is all precise, and recalls and covers half."""
    modes = torch.cat([normal(0, 60, 4), normal(1, 60, 4, 1000.0)])
    names = ("precision", "recall", "density", "coverage")
    for generated, expected in (
        (modes, (1, 1, 1, 1)),
        (modes + 300, (0, 0, 0, 0)),
        (modes[:60].repeat(2, 1), (1, 0.5, 1, 0.5)),
        (modes[:60], (1, 0.5, 1, 0.5)),
    ):
        figures = measure(names, Features(modes), Features(generated), bootstrap=0)
        drawn_twice = len(generated) == 120 and torch.equal(generated[:60], generated[60:])
        for name, share in zip(names, expected, strict=True):
            if not (drawn_twice and name == "recall"):
                assert figures[name].value == pytest.approx(share), name


def test_the_score_of_images_that_point_with_and_across_and_against_their_prompts() -> None:
    image = torch.eye(4)
    for text, score in (
        (3 * image, 100),
        (image.roll(1, 0), 0),
        (-image, 0),
        (image + image.roll(1, 0), 100 / math.sqrt(2)),
    ):
        assert value("clip_score", image, image, text=text) == pytest.approx(score)


@pytest.mark.parametrize(
    ("shift", "names"),
    [
        (0.7, ("fid", "kid", "precision")),
        pytest.param(0.7, ("recall", "density", "coverage", "cmmd"), marks=pytest.mark.drill),
        pytest.param(0.0, ("fid", "kid", "cmmd"), marks=pytest.mark.drill),
    ],
)
def test_95_percent_intervals_hold_the_expected_figure_19_times_in_20(shift: float, names: tuple[str, ...]) -> None:
    """Of FID the expectation is that of FID at this number of images, its bias included; of KID, with equal sets, 0.

    Shares that reach 1 in many runs, as coverage of equal sets does, are left out: their error is not symmetric.
    """
    runs = [
        measure(
            names,
            Features(normal(2 * seed, 60, 4)),
            Features(normal(2 * seed + 1, 60, 4, shift)),
            bootstrap=10,
            seed=seed,
        )
        for seed in range(80)
    ]
    for name in names:
        expected = float(np.mean([run[name].value for run in runs]))
        held = np.mean([run[name].low <= expected <= run[name].high for run in runs])
        assert held >= 0.88, name  # 0.95 less three standard errors of 80 runs
    if shift == 0:
        kid = [run["kid"].value for run in runs]
        assert abs(np.mean(kid)) < 3 * np.std(kid) / math.sqrt(len(kid))


def test_paired_runs_are_told_apart_where_unpaired_ones_are_not() -> None:
    """Two models that draw alike but for a small shift, from the same noise."""
    real, a = Features(normal(0, 200, 4)), Features(normal(1, 200, 4, 0.3))
    b, other = Features(a.pooled + 0.05), Features(normal(2, 200, 4, 0.35))
    assert str(compare(["kid"], real, a, b)["kid"]).startswith("better")
    assert str(compare(["kid"], real, b, a)["kid"]).startswith("worse")
    assert str(compare(["kid"], real, a, other)["kid"]).startswith("can't be told apart")
    assert compare(["fid"], real, a, a)["fid"].p == 1


def test_intervals_do_not_depend_on_what_else_is_measured() -> None:
    real, generated = Features(normal(0, 30, 4)), Features(normal(1, 30, 4, 0.3))
    together = measure(["kid", "coverage", "fid"], real, generated, bootstrap=8, seed=3)
    assert together["fid"] == measure(["fid"], real, generated, bootstrap=8, seed=3)["fid"]
    assert together["fid"] != measure(["fid"], real, generated, bootstrap=8, seed=4)["fid"]


@pytest.mark.parametrize(
    ("name", "changes", "line"),
    [
        ("FID", {}, "metric: 'FID'"),
        ("fid", {"generated": Features(torch.ones(1, 4))}, "fid: 1 generated images; it needs 2"),
        ("coverage", {"real": Features(torch.ones(5, 4))}, "coverage: 5 real images; it needs 6"),
        (
            "kid",
            {"generated": Features(torch.full((9, 4), math.nan))},
            "kid: features of the generated images have NaN",
        ),
        ("fid", {"generated": Features(torch.ones(9, 5))}, "fid: features of 4 and 5 numbers"),
        ("sfid", {}, "sfid: the network has no spatial features"),
        ("is", {}, "is: the network does not classify"),
        ("clip_score", {}, "clip_score: needs CLIP's features"),
    ],
)
def test_what_cant_be_measured_is_one_line(name: str, changes: dict[str, Features], line: str) -> None:
    features = {"real": Features(normal(0, 9, 4)), "generated": Features(normal(1, 9, 4)), **changes}
    with pytest.raises(UserError, match=line) as error:
        measure([name], **features)
    assert "\n" not in str(error.value)
    assert set(METRICS) == {
        "fid",
        "sfid",
        "kid",
        "is",
        "precision",
        "recall",
        "density",
        "coverage",
        "cmmd",
        "clip_score",
    }
