"""Order and noise are functions of the seed and the position."""

import itertools
import pickle
from collections import Counter

import numpy as np
import pytest
import torch

from ldm.data.draw_table import Draws, DrawTable
from ldm.data.sampler import Order, Positions
from ldm.distributed.accumulation import accumulation
from ldm.utils.rng import normal, uniform


def test_an_epoch_of_equal_weights_shows_every_sample_once() -> None:
    order = Order([1.0] * 103, seed=3)
    for epoch in range(3):
        assert sorted(order[epoch * 103 + n] for n in range(103)) == list(range(103))


def test_epochs_differ_and_the_order_is_a_pure_function_of_seed_and_position() -> None:
    order = Order([1.0] * 50, seed=3)
    first_epoch, second_epoch = ([order[n] for n in range(a, a + 50)] for a in (0, 50))
    assert first_epoch != second_epoch
    assert [Order([1.0] * 50, seed=3)[n] for n in range(50, 100)] == second_epoch
    assert [Order([1.0] * 50, seed=4)[n] for n in range(50)] != first_epoch


def test_an_order_can_be_pickled_for_loader_processes() -> None:
    order = Order([1.0] * 50, seed=3)
    assert [pickle.loads(pickle.dumps(order))[n] for n in range(100)] == [order[n] for n in range(100)]


def test_samples_are_drawn_in_proportion_to_their_weights() -> None:
    weights = [1.0] * 20 + [0.5] * 40
    order = Order(weights, seed=0)
    seen = Counter(order[n] for n in range(60 * 50))
    for i, weight in enumerate(weights):
        assert abs(seen[i] - 50 * weight * 60 / 40) <= 50
    total = sum(seen[i] for i in range(20))
    assert abs(total - 1500) < 60


@pytest.mark.parametrize(("subject", "of_class"), [(5, 12), (5, 3), (4, 4)])
def test_the_subject_and_its_class_take_turns_and_each_image_of_either_comes_up_equally_often(
    subject: int, of_class: int
) -> None:
    prior = np.arange(subject + of_class) >= subject
    order = Order(np.ones(subject + of_class), seed=3, batch=2, prior=prior)
    samples = [order[n] for n in range(2 * subject * of_class)]
    assert [bool(prior[i]) for i in samples] == [False, True] * (subject * of_class)
    assert Counter(samples) == {i: subject if prior[i] else of_class for i in range(subject + of_class)}


def test_an_epoch_of_buckets_has_as_many_samples_of_the_class_as_of_the_subject() -> None:
    prior, repeats = np.array([False] * 6 + [True] * 11), [3] * 6 + [1] * 11
    for buckets in ([0] * 4 + [1] * 4 + [2] * 9, [0] * 6 + [1] * 11):
        order = Order(np.ones(17), 0, 1, buckets, repeats, prior)  # in batches of 1, epochs end exactly
        for epoch in range(3):
            seen = Counter(order[n] for n in range(order.first_step(epoch), order.first_step(epoch + 1)))
            assert [seen[i] for i in range(6)] == [3] * 6
            assert sum(seen[i] for i in range(6, 17)) == 18
            assert all(seen[i] for i in range(6, 17))


def test_an_order_without_images_of_the_class_is_that_of_before() -> None:
    buckets = [i % 3 for i in range(30)]
    orders = [Order(np.ones(30), 1, 4, buckets, prior=prior) for prior in (None, np.zeros(30, bool))]
    assert [orders[0][n] for n in range(100)] == [orders[1][n] for n in range(100)]


def test_the_global_batch_is_the_same_for_any_number_of_processes_and_passes() -> None:
    def step_sets(processes: int, passes: int) -> list[list[int]]:
        shares = [list(Positions(2, 5, 24, passes, rank, processes)) for rank in range(processes)]
        return [sorted(n for s in shares for part in s[i * passes : (i + 1) * passes] for n in part) for i in range(3)]

    assert step_sets(1, 1) == step_sets(2, 1) == step_sets(2, 3) == step_sets(4, 2)


def test_a_device_batch_is_as_large_as_allowed() -> None:
    assert accumulation(256, 1, 32) == (8, 32)
    assert accumulation(256, 8, 32) == (1, 32)
    assert accumulation(256, 64, 32) == (1, 4)
    assert accumulation(24, 2) == (1, 12)
    for batch, processes, device_batch in itertools.product(range(1, 41), (1, 2, 3), range(1, 14)):
        if batch % processes == 0:
            steps, images = accumulation(batch, processes, device_batch)
            assert steps * images * processes == batch
            assert images <= device_batch
            larger = range(images + 1, device_batch + 1)
            assert not any(batch // processes % more == 0 for more in larger)


def test_a_batch_that_can_not_be_shared_is_an_error_that_names_the_nearest() -> None:
    with pytest.raises(ValueError, match="256 can't be shared evenly by 48 processes; 240 can"):
        accumulation(256, 48, 32)
    with pytest.raises(ValueError, match="2 can't be shared evenly by 8 processes; 8 can"):
        accumulation(2, 8)


def test_noise_depends_on_the_position_not_on_the_batch() -> None:
    batched = normal(7, "noise", torch.tensor([4, 5, 6]), (2, 3))
    single = normal(7, "noise", torch.tensor([5]), (2, 3))
    assert torch.equal(batched[1], single[0])
    assert not torch.equal(normal(7, "other", torch.tensor([5]), (2, 3)), single)
    assert not torch.equal(normal(8, "noise", torch.tensor([5]), (2, 3)), single)


def test_noise_is_standard_normal_and_uniform_is_uniform() -> None:
    positions = torch.arange(400)
    noise = normal(0, "noise", positions, (64,))
    assert abs(float(noise.mean())) < 0.03
    assert abs(float(noise.std()) - 1) < 0.02
    u = uniform(0, "time", positions)
    assert abs(float(u.mean()) - 0.5) < 0.05
    assert 0 <= float(u.min()) < float(u.max()) < 1


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_bucket_draws_each_index_as_its_weight_and_repeats_say(weighted: bool, repeats: int) -> None:
    rng = np.random.default_rng(0)
    buckets, weights = rng.integers(0, 3, 60), rng.uniform(1, 5, 60) if weighted else np.ones(60)
    many = np.where(np.arange(60) < 20, repeats, 1)
    order, epochs = Order(weights, seed=5, batch=1, buckets=buckets, repeats=many), 40
    seen = Counter(order[n] for n in range(order.first_step(epochs)))
    for bucket in range(3):
        members = np.flatnonzero(buckets == bucket)
        draws = sum(seen[i] for i in members)
        expected = weights * many * draws / (weights * many)[members].sum()
        assert all(abs(seen[i] - expected[i]) <= (epochs if weighted else 1e-9) for i in members)
    total = many.sum() * epochs
    assert abs(sum(seen.values()) - total) <= 2 * epochs  # each bucket's draws are rounded


def test_an_order_of_a_hundred_million_starts_at_once_and_keeps_nothing_of_that_size() -> None:
    order = Order.of(DrawTable([Draws(0, 0, 0, 10**8, 10**8)], None, None), seed=1, batch=256)
    positions = range(73 * 10**6, 73 * 10**6 + 1000)
    assert len({order[n] for n in positions}) == 1000
    assert len(pickle.dumps(order)) < 5000
