"""Mixtures: the paper's sub-batches, fair pools, and batches that only (seed, update, step) decide."""

from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fomo.datasets.mixture import POOLS, Batches, Pool, pool_of, reservoir, sub_batches
from fomo.datasets.samples import Collection, Samples
from fomo.errors import UserError
from fomo.recipe import Mixture
from tests.datasets.inputs import Drawn, Words

NO_BUFFER, NO_PRETRAINING = frozenset({"buffer"}), frozenset({"pretraining"})
PAPER = [(0.33, 0.34, 0.33), (0.5, 0.5, 0), (0.05, 0.48, 0.47), (0.8, 0.1, 0.1), (0, 0.1, 0.9)]  # P, D, B


def counts_of(mixture: Mixture, batch_size: int = 512, empty: frozenset = frozenset()) -> tuple[int, ...]:
    counts = sub_batches(batch_size, mixture, empty)
    return tuple(counts[name] for name in POOLS)


@pytest.mark.parametrize(
    ("shares", "later", "first"),
    [
        (PAPER[0], (169, 175, 168), (253, 259, 0)),
        (PAPER[1], (256, 256, 0), (256, 256, 0)),
        (PAPER[2], (26, 246, 240), (146, 366, 0)),
        (PAPER[3], (410, 51, 51), (435, 77, 0)),
        (PAPER[4], (0, 52, 460), (0, 512, 0)),
    ],
)
def test_sub_batches_of_the_papers_mixtures(shares, later, first):
    mixture = Mixture(*shares)
    assert counts_of(mixture) == later
    assert counts_of(mixture, empty=NO_BUFFER) == first


@pytest.mark.parametrize("shares", PAPER)
@pytest.mark.parametrize("batch_size", [80, 256, 512, 4096])
def test_sub_batches_follow_the_released_rule_in_exact_arithmetic(shares, batch_size):
    exact = [Fraction(str(share)) * batch_size for share in shares]
    expected = [int(count) for count in exact]
    open_pools = [i for i, share in enumerate(shares) if share]
    for slot in range(batch_size - sum(expected)):
        expected[open_pools[slot % len(open_pools)]] += 1
    assert counts_of(Mixture(*shares), batch_size) == tuple(expected)


def test_an_empty_buffers_slots_go_to_the_update_where_the_recipe_follows_the_papers_text():
    assert counts_of(Mixture(empty_buffer="update"), empty=NO_BUFFER) == (169, 343, 0)


def test_without_a_pretraining_pool_its_share_is_divided_in_proportion():
    assert counts_of(Mixture(0.5, 0.1, 0.4), 100, NO_PRETRAINING) == (0, 20, 80)
    assert counts_of(Mixture(0.5, 0.1, 0.4), 100, NO_PRETRAINING | NO_BUFFER) == (0, 100, 0)
    with pytest.raises(UserError, match=r"mixture\.pretraining"):
        counts_of(Mixture(1.0, 0.0, 0.0), 100, NO_PRETRAINING)


def test_a_mixture_without_new_data_gives_an_empty_buffers_slots_to_pretraining():
    assert counts_of(Mixture(0.4, 0.0, 0.6), 100, NO_BUFFER) == (100, 0, 0)


@st.composite
def mixtures(draw) -> Mixture:
    parts = draw(st.lists(st.integers(0, 1000), min_size=3, max_size=3).filter(any))
    return Mixture(*(part / sum(parts) for part in parts), draw(st.sampled_from(["split", "update"])))


@settings(deadline=None, max_examples=300)
@given(mixtures(), st.integers(2, 5000), st.sets(st.sampled_from(["buffer", "pretraining"])))
def test_counts_sum_to_the_batch_and_no_slot_goes_to_a_pool_without_a_share(mixture, batch_size, empty):
    if "pretraining" in empty and mixture.pretraining == 1:
        return
    counts = sub_batches(batch_size, mixture, frozenset(empty))
    assert sum(counts.values()) == batch_size
    assert set(counts) == set(POOLS) and min(counts.values()) >= 0
    assert not any(counts[name] for name in empty)
    only_the_buffer = "buffer" in empty and not counts["pretraining"]  # then the update is all there is
    for name in POOLS:
        if getattr(mixture, name) == 0 and not (name == "update" and only_the_buffer):
            assert counts[name] == 0
        if not empty:
            assert abs(counts[name] - getattr(mixture, name) * batch_size) <= 2


def tiles(name: str, count: int, first: int = 0, **fields) -> Samples:
    """Pictures of different shapes whose first pixel is their number, with one to three captions.

    A caption's tokens begin with the number of the picture; the third is which of its captions it is.
    """

    def image(index: int) -> Image.Image:
        return Image.new("RGB", (8 + index % 4, 8 + index % 3), (first + index,) * 3)

    def captions(index: int) -> list[str]:
        return [f"{first + index} caption {i}" + " long" * (index % 5) for i in range(1 + index % 3)]

    return Samples(Drawn(f"{name} {first}", [-1] * count, image, captions, **fields), Words(), 8, name)


def collection(name: str, *counts: int, first: int = 0) -> Collection:
    parts = []
    for i, count in enumerate(counts):
        parts.append(tiles(f"{name}{i}", count, first))
        first += count
    return Collection(parts)


def batches(seed: int = 0, update: int = 1, steps: int = 12) -> Batches:
    """5 of 9 P, 4 of 30 D and 3 of 20 B; pictures 0 to 8 are pretraining, 100 to 149 adaptation."""
    pretraining, adaptation = collection("p", 9), collection("a", 20, 30, first=100)
    draws = [
        ("pretraining", Pool(pretraining, np.arange(9), (seed, update, 0)), 5),
        ("update", Pool(adaptation, np.arange(20, 50), (seed, update, 1)), 4),
        ("buffer", Pool(adaptation, np.arange(20), (seed, update, 2)), 3),
    ]
    return Batches(draws, seed, update, steps)


def assert_same(batch, other):
    for name, a, b in zip(batch._fields, batch, other, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_a_pool_gives_every_sample_once_per_epoch():
    numbers = np.array([3, 14, 15, 92, 65, 35, 89])
    pool = Pool(None, numbers, (0, 1, 2))
    drawn = np.concatenate([pool.take(start, 3) for start in range(0, 70 * 3, 3)])
    epochs = drawn.reshape(30, 7)
    assert all(sorted(epoch) == sorted(numbers) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 25  # and each epoch has an order of its own
    keys = [(0, 1, 0), (0, 1, 1), (0, 2, 0), (1, 1, 0)]
    assert len({tuple(Pool(None, np.arange(20), key).take(0, 20)) for key in keys}) == 4


def test_a_pool_may_be_smaller_than_what_is_drawn_at_once():
    pool = Pool(None, np.arange(4), (0,))
    assert Counter(pool.take(0, 11).tolist()) == Counter(pool.take(0, 12).tolist()) - Counter(
        [pool.take(11, 1)[0]]
    )
    assert Counter(pool.take(0, 12).tolist()) == dict.fromkeys(range(4), 3)


def test_what_a_pool_gives_does_not_depend_on_what_was_taken_before():
    key = (4, 2, 1)
    whole = Pool(None, np.arange(10), key).take(0, 200)
    pool = Pool(None, np.arange(10), key)
    for start in (150, 3, 77, 0, 190, 42):
        np.testing.assert_array_equal(pool.take(start, 10), whole[start : start + 10])


def test_a_batch_holds_the_counts_of_each_pool_and_captions_of_its_own_pictures():
    for step in range(8):
        batch = batches()[step]
        assert batch.pools.tolist() == [0] * 5 + [1] * 4 + [2] * 3
        first_pixels = batch.canvas[:, 0, 0, 0]
        assert torch.equal(first_pixels, batch.tokens[:, 0].to(torch.uint8))
        ranges = {0: (0, 9), 1: (120, 150), 2: (100, 120)}
        for pool, number in zip(batch.pools.tolist(), batch.tokens[:, 0].tolist(), strict=True):
            assert ranges[pool][0] <= number < ranges[pool][1]
        assert batch.boxes.shape == (12, 4) and batch.boxes.dtype == torch.float32


def test_all_captions_of_a_picture_are_drawn():
    seen = Counter()
    for step in range(60):
        tokens = batches(steps=60)[step].tokens
        seen.update(map(tuple, tokens[:, [0, 2]].tolist()))
    assert {draw for number, draw in seen if number == 2} == {0, 1, 2}
    assert {draw for number, draw in seen if number == 3} == {0}
    shares = np.array([seen[2, i] for i in range(3)])
    assert shares.min() > 0.15 * shares.sum()


def test_steps_go_on_where_the_last_one_stopped():
    """9 pretraining samples at 5 a step: 9 steps are exactly 5 epochs."""
    drawn = torch.cat([batches()[step].tokens[:5, 0] for step in range(9)])
    assert all(sorted(epoch.tolist()) == list(range(9)) for epoch in drawn.view(5, 9))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 7])
def test_batches_are_the_same_from_any_start_and_with_any_number_of_workers(start, workers):
    expected = [batches()[step] for step in range(start, 12)]
    state = torch.get_rng_state()
    found = list(batches().loader(start, workers))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found) == len(expected) == 12 - start
    for batch, other in zip(found, expected, strict=True):
        assert_same(batch, other)


def test_batches_are_the_same_in_any_order_and_whatever_else_draws_random_numbers():
    made, order = batches(), [11, 0, 5, 4, 11]
    expected = {step: batches()[step] for step in order}
    for step in order:
        np.random.seed(step)
        torch.manual_seed(step)
        assert_same(made[step], expected[step])


def test_seed_update_and_step_each_change_samples_crops_and_captions():
    """Many pictures of one shape for the crops; one picture, with three captions, for the captions."""
    captions_of = [[f"{i} caption {n}" for n in range(1 + i % 3)] for i in range(40)]
    source = Drawn("alike", [-1] * 40, lambda i: Image.new("RGB", (64, 64)), captions_of.__getitem__)
    alike = Collection([Samples(source, Words(), 64, "alike")])
    samples, crops, captions = set(), set(), set()
    for seed, update, step in [(0, 1, 0), (1, 1, 0), (0, 2, 0), (0, 1, 1)]:
        whole = Pool(alike, np.arange(40), (seed, update, 1))
        batch = Batches([("update", whole, 20)], seed, update, 2)[step]
        samples.add(tuple(batch.tokens[:, 0].tolist()))
        crops.add(tuple(batch.boxes.flatten().tolist()))
        single = Pool(alike, np.array([2]), (seed, update, 1))
        batch = Batches([("update", single, 20)], seed, update, 2)[step]
        captions.add(tuple(batch.tokens[:, 2].tolist()))
    assert len(samples) == len(crops) == len(captions) == 4


def test_an_empty_pool_with_a_share_is_a_mistake_and_without_one_is_left_out():
    pools = [("update", Pool(collection("a", 5), np.arange(5), (0,)), 4)]
    nothing = Pool(collection("a", 5), np.zeros(0, np.int64), (0,))
    assert Batches([*pools, ("buffer", nothing, 0)], 0, 0, 2)[0].pools.tolist() == [1] * 4
    with pytest.raises(UserError, match="update 3: the buffer pool has no usable sample"):
        Batches([*pools, ("buffer", nothing, 2)], 0, 3, 2)


def test_cached_and_decoded_pictures_make_the_same_batches_with_stand_ins_for_broken_ones():
    made = {}
    for cache in ("always", "never"):
        parts = [
            tiles("x", 250, broken=(3, 77), cache=cache),
            tiles("y", 240, broken=(9, 10), cache=cache),
        ]
        draws = [("update", pool_of(Collection(parts), (0, 1, 1)), 35)]
        made[cache] = Batches(draws, 0, 1, 30)
    seen = Counter()
    for step in range(28):  # two epochs of 490
        assert_same(made["always"][step], made["never"][step])
        seen.update(made["always"][step].tokens[:, 0].tolist())
    assert sum(seen.values()) == 2 * 490
    assert all(seen[n] < 4 for n in (3, 77, 9, 10)) and seen[4] >= 4  # both parts have these numbers
    for workers in (0, 2):
        found = list(made["never"].loader(0, workers))
        for step, batch in enumerate(found):
            assert_same(batch, made["always"][step])


def test_a_stand_in_is_the_next_of_the_epochs_permutation():
    part = tiles("z", 250, broken=(3, 77))
    pool = pool_of(Collection([part]), (5, 1, 1))
    order = pool.take(0, 250).tolist()
    drawn = Batches([("update", pool, 25)], 5, 1, 10)
    found = [number for step in range(10) for number in drawn[step].tokens[:, 0].tolist()]
    for place, number in enumerate(order):
        expected = order[(place + 1) % 250] if number in (3, 77) else number
        assert found[place] == expected


def test_a_pool_of_nothing_but_broken_pictures_is_a_mistake():
    part = tiles("fine", 4)
    part.pixels.shapes, part.pixels.offsets = np.zeros((4, 2), int), np.zeros(5, int)
    with pytest.raises(UserError, match="no picture of the update pool can be read"):
        Batches([("update", pool_of(Collection([part]), (0,)), 2)], 0, 1, 1)[0]


def weighted(counts: list[int], weights: list[float], key: tuple = (0, 1)) -> Pool:
    whole = collection("w", *counts)
    for part, weight in zip(whole.parts, weights, strict=True):
        part.weight = weight
    return pool_of(whole, key)


def test_a_weight_is_how_often_each_sample_comes():
    pool = weighted([10, 20, 8], [2, 1, 0.5])
    assert len(pool) == 20 + 20 + 4
    seen = Counter(pool.take(0, 2 * len(pool)).tolist())
    assert {seen[n] for n in range(10)} == {4}
    assert {seen[n] for n in range(10, 30)} == {2}
    assert {seen[n] for n in range(30, 38)} == {1}
    np.testing.assert_array_equal(pool.take(13, 20), pool.take(0, 40)[13:33])


def test_a_reservoir_is_uniform_and_what_left_it_does_not_return():
    seen = np.arange(3000)
    kept = [reservoir(seen[:n], 100, seed=0) for n in (50, 100, 200, 1000, 3000)]
    assert [len(part) for part in kept] == [50, 100, 100, 100, 100]
    for n, earlier, later in zip((100, 200, 1000), kept[1:], kept[2:], strict=False):
        assert set(later[later < n]) <= set(earlier)
    counts = Counter(n // 300 for seed in range(60) for n in reservoir(seen, 100, seed).tolist())
    assert all(abs(counts[tenth] - 600) < 5 * np.sqrt(600) for tenth in range(10))
    assert reservoir(seen, None, 0) is seen
    np.testing.assert_array_equal(reservoir(seen[::-1], 100, 0), reservoir(seen, 100, 0))


class Fifteen(Drawn):
    """15 million pictures, none of which exists until it is asked for."""

    def __init__(self):
        super().__init__("fifteen", [], captions=lambda index: [str(index)], cache="never")
        self.labels = np.broadcast_to(np.int64(-1), 15_000_000)

    def caption_counts(self) -> np.ndarray:
        return np.broadcast_to(np.int64(1), len(self.labels))


def test_a_pool_of_fifteen_million_takes_little_memory():
    import tracemalloc

    tracemalloc.start()
    pool = pool_of(Collection([Samples(Fifteen(), Words(), 8, "fifteen")]), (0, 1, 0))
    drawn = Batches([("pretraining", pool, 169)], 0, 1, 100)
    numbers = {n for step in range(0, 100, 10) for n in drawn[step].tokens[:, 0].tolist()}
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(numbers) == 1690 and max(numbers) > 14_000_000
    assert peak < 200e6
