"""The latent report: statistics against numpy and closed forms, warnings, merging."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ldm.models.latent_plots import plot_latents
from ldm.models.latent_statistics import LatentStatistics
from ldm.utils.errors import UserError


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def report(*batches: torch.Tensor) -> LatentStatistics:
    statistics = LatentStatistics(batches[0].shape[1])
    for batch in batches:
        statistics.add(batch)
    return statistics


def mixed() -> torch.Tensor:
    """Gaussian noise whose three channels have means -1, 0 and 2, differing scales, and r = 0.6 between 0 and 2."""
    x = noise(20, 3, 16, 16)
    x[:, 2] = 0.6 * x[:, 0] + 0.8 * x[:, 2]
    return x * torch.tensor([0.5, 1, 3])[:, None, None] + torch.tensor([-1.0, 0, 2])[:, None, None]


def test_mean_std_and_correlation_equal_numpy() -> None:
    x = mixed()
    statistics, flat = report(x), x.transpose(0, 1).flatten(1).double().numpy()
    np.testing.assert_allclose(statistics.mean(), flat.mean(1), atol=1e-9)
    np.testing.assert_allclose(statistics.std(), flat.std(1), atol=1e-9)
    np.testing.assert_allclose(statistics.correlation(), np.corrcoef(flat), atol=1e-9)
    assert statistics.correlation()[0, 2] == pytest.approx(0.6, abs=0.03)


def test_the_histogram_sums_to_the_count_with_outliers_in_its_last_bins() -> None:
    x = noise(4, 2, 8, 8) * 5
    statistics = report(x)
    assert statistics.histogram.sum(1).tolist() == [4 * 64] * 2 == [int(statistics.count)] * 2
    assert statistics.histogram[:, -1].tolist() == [int((x[:, c] >= 6 - 1 / 8).sum()) for c in (0, 1)]


def test_the_power_of_white_noise_is_its_variance_at_every_frequency() -> None:
    frequency, power = report(2 * noise(64, 2, 32, 32)).spectrum()
    assert frequency[0] == 1 / 16 and frequency[-1] == 1
    torch.testing.assert_close(power, torch.full_like(power, 4), rtol=0.15, atol=0)


def test_a_cosine_wave_has_its_power_at_its_frequency() -> None:
    """cos(2π·4x/32) lies at 4/16 of Nyquist's frequency, and its mean power over the image is 1/2 (Parseval)."""
    wave = torch.cos(2 * torch.pi * 4 * torch.arange(32) / 32).expand(1, 1, 32, 32)
    statistics = report(wave + 7)  # the constant doesn't count
    assert float(statistics.power[0, 3]) / 32**2 == pytest.approx(0.5, rel=1e-6)
    assert float(statistics.power.sum()) == pytest.approx(float(statistics.power[0, 3]), rel=1e-6)


def test_blurred_noise_has_a_falling_spectrum() -> None:
    blurred = torch.nn.functional.avg_pool2d(noise(64, 1, 34, 34), 3, 1)
    power = report(blurred).spectrum()[1][0]
    assert (power[:9].diff() < 0).all() and power[0] > 10 * power[9]


def test_gaussian_latents_have_no_warnings() -> None:
    statistics = report(noise(64, 4, 16, 16))
    assert statistics.warnings() == [] and statistics.dead() == []
    assert (statistics.distance() < 0.02).all()


def test_the_distance_is_large_for_binary_latents_and_independent_of_scale() -> None:
    binary = noise(64, 1, 16, 16).sign()
    statistics = report(torch.cat([binary, noise(64, 1, 16, 16, seed=1) * 1.7 + 0.4], 1))
    assert statistics.distance()[0] > 0.8 and statistics.distance()[1] < 0.03
    assert [text[:33] for text in statistics.warnings()] == ["channel 0 is far from Gaussian: t"]
    both = report(torch.cat([binary, -binary, noise(64, 1, 16, 16, seed=1)], 1))
    distance = f"total variation distance {float(both.distance().max()):.2f}, above 0.15"
    assert both.warnings()[0] == f"channels 0, 1 are far from Gaussian: {distance}"


def test_dead_channels_and_correlated_pairs_are_named_with_their_values() -> None:
    x = noise(16, 5, 16, 16)
    x[:, 1] *= 0.01
    x[:, 2] = 0.5
    x[:, 4] = -x[:, 3]
    statistics = report(x)
    assert statistics.dead() == [1, 2]
    dead, constant, pair = statistics.warnings()
    assert dead.startswith("channel 1 is dead: its std is 0.01,") and constant.startswith("channel 2 is dead")
    assert pair == "channels 3 and 4 are strongly correlated: r = -1.00"
    assert statistics.facts()["strongest_correlation"] == {"channels": [3, 4], "r": -1.0}


def test_a_dead_channel_of_two_is_detected() -> None:
    assert report(noise(8, 2, 8, 8) * torch.tensor([1, 0.001])[:, None, None]).dead() == [1]


def test_means_and_scales_out_of_bounds_are_named() -> None:
    assert report(noise(8, 1, 16, 16) - 1).warnings()[0].startswith("channel 0 is off centre: its mean is -0.9")
    assert report(noise(8, 1, 16, 16) * 3).warnings()[0].startswith("channel 0 is out of scale: its std is 3.0")
    assert report(noise(8, 1, 16, 16) * 0.4).warnings()[0].startswith("channel 0 is out of scale: its std is 0.4")


def test_many_correlated_pairs_are_summarized() -> None:
    warnings = report(noise(4, 1, 8, 8).expand(4, 8, 8, 8)).warnings()
    assert len(warnings) == 6 and warnings[-1].startswith("23 more pairs")


def test_merged_reports_of_different_sizes_equal_a_single_report() -> None:
    batches = [mixed(), noise(3, 3, 8, 24, seed=1), noise(1, 3, 12, 10, seed=2)]
    full, first, second = report(*batches), report(batches[0]), report(*batches[1:])
    first.merge(second)
    for name, tensor in full.tensors().items():
        torch.testing.assert_close(first.tensors()[name], tensor)
    assert first.facts() == full.facts()


def test_changing_the_tensors_changes_the_report() -> None:
    """A caller sums them over processes in place."""
    single, twice = report(mixed()), report(mixed(), mixed())
    for tensor in single.tensors().values():
        tensor *= 2
    assert single.facts() == twice.facts()


def test_facts_are_valid_json_even_of_tiny_and_constant_latents() -> None:
    for latents in (mixed(), noise(2, 2, 1, 1), torch.zeros(2, 2, 4, 4), noise(2, 1, 4, 4)):
        facts = report(latents).facts()
        assert json.loads(json.dumps(facts, allow_nan=False)) == facts
        assert len(facts["spectrum"]["power"]) == 16


def test_nonfinite_latents_are_refused() -> None:
    with pytest.raises(UserError, match="not finite"):
        report(torch.full((1, 2, 4, 4), torch.nan))


@pytest.mark.parametrize("channels", [1, 4, 16])
def test_the_plot_is_a_single_png(tmp_path: Path, channels: int) -> None:
    x = noise(4, channels, 8, 8)
    x[:, 0] = 1
    plot_latents(report(x), tmp_path / "latents.png")
    assert [path.name for path in tmp_path.iterdir()] == ["latents.png"]
    with Image.open(tmp_path / "latents.png") as plot:
        assert plot.format == "PNG" and plot.width > 1000
