"""Streams: every concept once, in T chunks as the released code cuts them."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fomo.datasets.stream import Concept, cut, order_concepts
from fomo.errors import UserError


def concepts(count: int) -> list[Concept]:
    return [Concept(f"set {i % 3}", i // 3, f"class {i}") for i in range(count)]


def test_the_papers_stream_of_18381_concepts_in_20_updates_is_920_and_then_919_each():
    assert [len(chunk) for chunk in cut(concepts(18_381), 20)] == [920] + [919] * 19


@settings(deadline=None)
@given(st.integers(1, 300).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))))
def test_chunks_are_contiguous_complete_and_the_first_ones_are_one_longer(sizes):
    count, updates = sizes
    chunks = cut(concepts(count), updates)
    assert [concept for chunk in chunks for concept in chunk] == concepts(count)
    longer = count % updates
    assert [len(chunk) for chunk in chunks] == [count // updates + 1] * longer + [count // updates] * (
        updates - longer
    )


def test_more_updates_than_concepts_are_a_mistake_with_both_numbers():
    with pytest.raises(UserError, match=r"stream\.updates: 8 .* 7"):
        cut(concepts(7), 8)
    assert [len(chunk) for chunk in cut(concepts(7), 7)] == [1] * 7


@pytest.mark.parametrize("reverse", [False, True])
def test_every_concept_is_in_the_stream_exactly_once(reverse):
    ordered = order_concepts(concepts(500), "random", seed=3, reverse=reverse)
    assert sorted(ordered) == sorted(concepts(500))
    assert len(set(ordered)) == 500


def test_reverse_is_the_exact_mirror_image():
    forward, backward = (order_concepts(concepts(101), "random", 5, reverse) for reverse in (False, True))
    assert forward == backward[::-1] != backward


def test_the_random_order_is_a_function_of_the_seed_and_mixes_the_sets():
    first, again, other = (order_concepts(concepts(300), "random", seed) for seed in (0, 0, 1))
    assert first == again != other
    assert first != concepts(300)
    moved = sum(a != b for a, b in zip(first, other, strict=True))
    assert moved > 270
    changes = sum(a.dataset != b.dataset for a, b in itertools.pairwise(first))
    assert 160 < changes < 240  # of 299 neighbours two thirds come from different sets


def test_an_unknown_order_is_refused():
    with pytest.raises(ValueError, match="alphabetical"):
        order_concepts(concepts(3), "alphabetical", 0)
