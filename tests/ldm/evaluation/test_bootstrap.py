"""Intervals of means and paired comparisons against their closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binomtest, ttest_1samp

from ldm.evaluation.bootstrap import compare, halves, interval_of_set, mean, standard_error
from ldm.utils.errors import UserError

SCORES = torch.rand(40, generator=torch.Generator().manual_seed(0)).double()


def test_the_interval_of_a_mean_is_students() -> None:
    figure = mean(SCORES, "CLIP")
    expected = ttest_1samp(SCORES.numpy(), 0).confidence_interval()
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high))
    assert (figure.images, figure.network) == (40, "CLIP")
    assert 0 < mean(torch.zeros(40)).high < 0.1  # of shares: not of width 0


def test_the_interval_of_repeated_prompts_is_of_the_means_per_prompt() -> None:
    prompts = [f"prompt {i % 10}" for i in range(40)]
    figure = mean(SCORES, prompts=prompts)
    expected = ttest_1samp(SCORES.reshape(4, 10).mean(0).numpy(), 0).confidence_interval()
    assert (figure.low, figure.high) == pytest.approx((expected.low, expected.high))
    assert mean(SCORES, prompts=range(40)) == mean(SCORES)
    right = torch.tensor([1.0, 0.0]).repeat_interleave(20)  # four images of a prompt, all right or all wrong: of 10
    alike = mean(right, prompts=sorted(prompts))
    assert alike.high - alike.low > 1.5 * (mean(right).high - mean(right).low)
    assert mean(torch.ones(40), prompts=prompts).low == mean(torch.ones(10)).low
    assert mean(SCORES, prompts=["one"] * 40).low is None


def test_halves_are_complementary_and_give_the_standard_error_of_a_mean() -> None:
    masks = halves(0, "images", 40, 2000)
    assert masks[0].all() and torch.equal(masks[1::2], ~masks[2::2]) and set(masks[1:].sum(1).tolist()) == {20}
    values = (masks.double() @ SCORES) / masks.sum(1)
    assert standard_error(values) == pytest.approx(float(SCORES.std()) / math.sqrt(40), rel=0.05)
    low, high = interval_of_set(values)
    assert (low + high) / 2 == pytest.approx(float(SCORES.mean()))
    assert torch.equal(masks[:5], halves(0, "images", 40, 2))  # by position, whatever their number


def test_p_of_right_and_wrong_images_is_mcnemars() -> None:
    a, b = torch.ones(50), torch.ones(50)
    a[:2], b[2:11] = 0, 0
    comparison = compare(a, b)
    assert comparison.p == pytest.approx(binomtest(2, 11).pvalue)
    assert comparison.difference == pytest.approx(7 / 50)
    assert str(comparison) == "can't be told apart (p = 0.065)"


def test_a_constant_gain_is_told_from_noise_and_equal_runs_are_not() -> None:
    b = SCORES + 0.02 * torch.rand(40, generator=torch.Generator().manual_seed(1))
    assert str(compare(b, SCORES)) == "better, p < 0.001"
    assert str(compare(b, SCORES, larger_is_better=False)) == "worse, p < 0.001"
    assert compare(SCORES, SCORES).p == 1
    assert compare(SCORES, SCORES.flip(0)).to_json()["verdict"].startswith("can't be told apart")


def test_scores_that_cant_be_compared_are_one_line() -> None:
    with pytest.raises(UserError, match="40 and 39 images"):
        compare(SCORES, SCORES[1:])
    with pytest.raises(UserError, match="finite number"):
        mean(torch.tensor([math.nan]))
