"""Whose caption is an image's best, and is the best caption its own?"""

from __future__ import annotations

import pytest
import torch

from ldm.evaluation.retrieval import by_images, by_text
from ldm.utils.errors import UserError

CAPTIONS = [f"animal {i}" for i in range(10)]
FEATURES = torch.eye(10)


def test_images_of_their_captions_rank_first_and_those_of_others_score_0() -> None:
    right = by_text(3 * FEATURES, CAPTIONS, FEATURES, CAPTIONS)
    assert right.ranks.tolist() == [1] * 10
    figures = right.figures("CLIP")
    assert figures["R@1"].value == figures["R@5"].value == 1
    assert figures["R@1"].low == pytest.approx(1 / (1 + 1.959964**2 / 10))  # Wilson's interval
    wrong = by_text(FEATURES.roll(1, 0) + 0.1 * FEATURES, CAPTIONS, FEATURES, CAPTIONS)
    assert wrong.ranks.tolist() == [2] * 10
    assert (wrong.scores(1).sum(), wrong.scores(5).sum()) == (0, 10)


def test_equal_captions_count_once_and_ties_count_as_wrong() -> None:
    doubled = by_text(FEATURES, CAPTIONS, FEATURES.repeat(2, 1), CAPTIONS * 2)
    assert (doubled.ranks.tolist(), doubled.candidates) == ([1] * 10, 10)
    collapsed = by_text(torch.ones(10, 10), CAPTIONS, torch.ones(10, 10), CAPTIONS)
    assert collapsed.ranks.tolist() == [10] * 10
    assert collapsed.chance(1) == pytest.approx(0.1)
    assert collapsed.chance(5) == pytest.approx(0.5)


def test_real_images_with_the_same_caption_are_right() -> None:
    """Two real images a caption; each generated one is the second of its caption, and the first of another is next."""
    captions = [caption for caption in CAPTIONS for _ in range(2)]
    real = torch.arange(20.0)[:, None]
    result = by_images(real[1::2], CAPTIONS, real, captions)
    assert result.ranks.tolist() == [1] * 10
    assert result.chance(1) == pytest.approx(2 / 20)
    assert by_images(real[1::2], CAPTIONS[1:] + CAPTIONS[:1], real, captions).ranks[:9].tolist() == [3] * 9


def test_a_prompt_that_is_no_caption_is_one_line() -> None:
    with pytest.raises(UserError, match="'a cat' is none of the captions"):
        by_text(FEATURES[:1], ["a cat"], FEATURES, CAPTIONS)
    with pytest.raises(UserError, match="use one network"):
        by_images(FEATURES, CAPTIONS, FEATURES[:, :3], CAPTIONS)
