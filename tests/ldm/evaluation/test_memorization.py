"""Copies of training images are found, and real images are not taken for copies."""

from __future__ import annotations

import json

import pytest
import torch

from ldm.evaluation.features import Features
from ldm.evaluation.memorization import memorization, missed_modes, nearest
from ldm.utils.errors import UserError


def drawn(seed: int, n: int) -> torch.Tensor:
    return torch.randn(n, 8, generator=torch.Generator().manual_seed(seed))


TRAINING, HELD_OUT, OTHERS = drawn(0, 300), drawn(1, 200), drawn(2, 200)


@pytest.mark.parametrize("held_out", [Features(HELD_OUT), None])
def test_near_copies_are_counted_and_other_images_no_more_than_real_ones(held_out: Features | None) -> None:
    copies = TRAINING[20:80] + 0.01 * drawn(3, 60)
    result = memorization(Features(TRAINING), Features(torch.cat([OTHERS[:140], copies])), held_out)
    honest = memorization(Features(TRAINING), Features(OTHERS), held_out)
    assert result.threshold == honest.threshold
    assert 0 < result.floor <= 0.05
    assert 0.3 <= result.share.value <= 0.3 + 0.7 * 0.1
    assert honest.share.low < 0.05
    assert {(pair.generated - 140, pair.training - 20) for pair in result.pairs} <= {(i, i) for i in range(60)}
    assert [pair.ratio for pair in result.pairs] == sorted(pair.ratio for pair in result.pairs)
    assert len(result.pairs) == 10


def test_a_copy_has_a_ratio_of_0_and_goes_into_json() -> None:
    result = memorization(Features(TRAINING), Features(TRAINING[5:7]), Features(HELD_OUT))
    assert [(pair.training, pair.ratio) for pair in result.pairs] == [(5, 0), (6, 0)]
    assert json.loads(json.dumps(result.to_json()))["share"]["value"] == 1


def test_nothing_is_told_of_training_images_with_many_twins() -> None:
    result = memorization(Features(TRAINING[:30].repeat(3, 1)), Features(OTHERS))
    assert result.threshold == 0
    assert str(result).startswith("can't be told")


def test_without_held_out_images_the_ratios_of_training_images_are_those_of_leaving_each_out() -> None:
    """Each taken out in turn and compared as a generated one; the threshold is that of the second smallest of 30."""
    train = TRAINING[:30]
    ratios = []
    for i in range(30):
        rest = torch.cat([train[:i], train[i + 1 :]])
        ratios.append(memorization(Features(rest), Features(train[i : i + 1])).pairs[0].ratio)
    assert memorization(Features(train), Features(OTHERS)).threshold == pytest.approx(sorted(ratios)[1])


def test_few_held_out_images_do_not_set_the_threshold() -> None:
    """Honest models; by 10 held-out images, the share of one in three is above 0.10, and of the worst 0.38."""
    assert memorization(Features(TRAINING), Features(OTHERS), Features(HELD_OUT[:100])).calibration == "held-out images"
    results = []
    for i in range(30):
        training, others, few = (Features(drawn(100 + 3 * i + k, n)) for k, n in enumerate((300, 300, 10)))
        results.append(memorization(training, others, few))
        assert results[-1] == memorization(training, others)
    assert {result.calibration for result in results} == {"training images"}
    shares = [result.share.value for result in results]
    assert 0.03 < sum(shares) / len(shares) < 0.07 and max(shares) < 0.15


def test_a_model_of_half_the_modes_misses_the_other_half() -> None:
    modes = torch.cat([TRAINING[:100], TRAINING[:100] + 100])
    result = missed_modes(Features(modes), Features(TRAINING[:100].repeat(2, 1)), Features(modes))
    assert (result.share, result.real, result.images, result.real_images) == (0.5, 0, 200, 200)
    assert result.expected == pytest.approx((199 / 200) ** 200)
    with_few = missed_modes(Features(modes), Features(modes), Features(modes[:50]))
    assert (with_few.share, with_few.images) == (0, 200)  # of all images
    assert (with_few.share_of_as_many, with_few.real, with_few.real_images) == (0.75, 0.75, 50)
    without = missed_modes(Features(modes), Features(modes))
    assert (without.share, without.real, without.share_of_as_many) == (0, None, None)


def test_the_nearest_are_those_of_plain_distances() -> None:
    distances, indices = nearest(OTHERS, TRAINING, 3)
    expected = (OTHERS[:, None].double() - TRAINING.double()).norm(dim=2).topk(3, largest=False)
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(distances, expected.values)


def test_too_few_images_and_other_widths_are_one_line() -> None:
    with pytest.raises(UserError, match="memorization: 2 training"):
        memorization(Features(TRAINING[:2]), Features(OTHERS))
    with pytest.raises(UserError, match="features of 7 and 8"):
        memorization(Features(TRAINING), Features(OTHERS[:, :7]))
    with pytest.raises(UserError, match="missed modes"):
        missed_modes(Features(TRAINING), Features(OTHERS[:0]))
