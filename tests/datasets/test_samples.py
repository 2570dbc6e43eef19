"""Samples: captions tokenised once, pictures from the cache, one number for each sample of many splits."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fomo.datasets.samples import Collection, Ragged, Samples, by_label, canvas_of, padded
from tests.datasets.inputs import Drawn, Words


def flowers(name: str, labels: list[int], captions: list[list[str]], **fields) -> Drawn:
    return Drawn(name, labels, captions=captions.__getitem__, classes=("rose", "tulip"), **fields)


def samples(name: str, labels: list[int], captions: list[list[str]], **fields) -> tuple[Samples, Words]:
    words = Words()
    return Samples(flowers(name, labels, captions, **fields), words, 8, name), words


rows_of_ids = st.lists(st.lists(st.integers(-5, 60000), max_size=6), max_size=8)


@settings(deadline=None)
@given(rows_of_ids)
def test_ragged_rows_come_back_as_they_went_in(rows):
    ragged = Ragged([np.array(row, np.int32) for row in rows])
    assert len(ragged) == len(rows)
    assert [ragged[i].tolist() for i in range(len(rows))] == rows


@settings(deadline=None)
@given(rows_of_ids.filter(bool))
def test_padded_rows_end_with_zeros_up_to_the_longest(rows):
    out = padded([np.array(row, np.int32) for row in rows])
    longest = max(map(len, rows))
    assert out.dtype == torch.int64 and out.shape == (len(rows), longest)
    assert out.tolist() == [row + [0] * (longest - len(row)) for row in rows]


@given(st.lists(st.integers(-1, 4), max_size=30), st.randoms())
def test_numbers_by_label_are_those_that_a_search_for_each_label_finds(labels, random):
    labels = np.array(labels, np.int64)
    numbers = np.array(random.sample(range(len(labels)), len(labels) // 2), np.int64)
    found = by_label(labels, numbers)
    assert found.keys() == {labels[number] for number in numbers}
    for label, own in found.items():
        assert own.tolist() == [number for number in numbers if labels[number] == label]


def test_pictures_stand_at_the_top_left_of_a_common_canvas():
    pictures = [np.full((h, w, 3), 7, np.uint8) for h, w in ((4, 6), (5, 3), (4, 4))]
    canvas, shapes = canvas_of(pictures)
    assert canvas.dtype == torch.uint8 and canvas.shape == (3, 5, 6, 3)
    assert shapes.tolist() == [[4, 6], [5, 3], [4, 4]]
    for place, (h, w) in zip(canvas, shapes, strict=True):
        assert (place[:h, :w] == 7).all() and place.sum() == 7 * 3 * h * w


def test_draw_zero_is_the_first_caption_and_draws_share_the_rest_equally():
    made, words = samples("a", [-1, -1], [["one"], ["first of all", "second", "third one"]])
    assert words.text(made.caption(1, 0.0)) == "first of all"
    drawn = [words.text(made.caption(1, draw)) for draw in np.linspace(0, 1, 300, endpoint=False)]
    assert {text: drawn.count(text) for text in drawn} == {
        "first of all": 100,
        "second": 100,
        "third one": 100,
    }
    assert words.text(made.caption(1, np.nextafter(1, 0))) == "third one"
    assert {words.text(made.caption(0, draw)) for draw in (0, 0.5, 0.999)} == {"one"}


@pytest.mark.parametrize(
    ("label", "captions", "expected"),
    [
        (1, ["tulip"], ["a photo of a tulip."]),  # the bare class name says nothing more than the prompt
        (1, [], ["a photo of a tulip."]),
        (1, ["rose"], ["rose"]),
        (1, ["tulip", "a red tulip"], ["tulip", "a red tulip"]),
        (1, ["a tulip"], ["a tulip"]),
        (0, [], ["a photo of a rose."]),
        (-1, ["tulip"], ["tulip"]),
        (-1, [], []),
    ],
)
def test_the_prompt_stands_where_a_caption_is_missing_or_is_the_bare_class_name(label, captions, expected):
    made, words = samples("c", [label], [captions])
    assert [words.text(made.tokens[n]) for n in made.captions[0]] == expected


def test_all_prompts_of_a_set_describe_its_pictures():
    source = flowers("d", [0, 1], [["rose"], []])
    source.prompts = ("a {}.", "the {} of {}.")
    words = Words()
    made = Samples(source, words, 8, "d")
    assert [[words.text(made.tokens[n]) for n in made.captions[i]] for i in range(2)] == [
        ["a rose.", "the rose of rose."],
        ["a tulip.", "the tulip of tulip."],
    ]


def test_a_collection_numbers_the_samples_of_its_splits_end_to_end():
    parts = [samples(f"f{n}", [-1] * n, [["x"]] * n)[0] for n in (3, 1, 4)]
    collection = Collection(parts)
    assert len(collection) == 8
    found = [collection.locate(number) for number in range(8)]
    expected = [(part, index) for part in parts for index in range(len(part))]
    assert all(a is c and b == d for (a, b), (c, d) in zip(found, expected, strict=True))
    assert len(Collection([])) == 0 and Collection([]).usable().tolist() == []


def test_usable_samples_have_a_caption_and_the_others_are_counted(capsys):
    broken = samples("g", [-1] * 150, [["x"]] * 149 + [[]], broken=(2,))[0]
    assert "g: 1 of 150 pictures have no caption" in capsys.readouterr().err
    assert np.flatnonzero(~broken.complete()).tolist() == [2, 149]
    whole = samples("h", [0, -1], [[], []])[0]
    flags = Collection([broken, whole]).usable()
    assert np.flatnonzero(~flags).tolist() == [149, 151]


def test_large_sets_are_tokenised_when_drawn_to_the_same_captions(monkeypatch):
    labels = [0, 1, -1, -1, 1]
    captions = [["rose"], [], ["one"], ["one", "two words"], ["tulip", "a red tulip"]]
    source = flowers("i", labels, captions)
    source.prompts = ("a {}.", "the {} of {}.")
    words = Words()
    early = Samples(source, words, 8, "i")
    monkeypatch.setattr("fomo.datasets.samples.TOKENISED", 4)
    words.seen.clear()
    late = Samples(source, words, 8, "i")
    assert words.seen == []
    np.testing.assert_array_equal(np.diff(late.captions.offsets), np.diff(early.captions.offsets))
    for index in range(5):
        for draw in (0, 0.4, 0.99):
            np.testing.assert_array_equal(late.caption(index, draw), early.caption(index, draw))
    assert Collection([late]).usable().tolist() == [True] * 5
