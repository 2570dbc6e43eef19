"""Transfer and forgetting: by hand on small matrices."""

import pytest

from fomo.eval.transfer import Row, mtil, row_of, row_of_sets, tic, transfer

# Three updates of one concept each. Rows: the untouched model, then after each update.
R = [
    [10, 20, 30],
    [60, 25, 28],
    [50, 70, 35],
    [55, 40, 90],
]
STREAM = [[("a", 0)], [("a", 1)], [("a", 2)]]


def lines_of(matrix, updates=None) -> list[dict]:
    updates = range(len(matrix)) if updates is None else updates
    return [{"update": u, "datasets": {"a": list(matrix[u])}} for u in updates]


def after(lines: list[dict], stream) -> dict:
    return transfer([row_of(line, stream) for line in lines])


@pytest.mark.parametrize(
    ("newest", "forward", "backward", "forgetting"),
    [
        (0, None, None, None),
        (1, ((25 - 20) + (28 - 30)) / 2, None, None),
        (2, 35 - 30, 50 - 60, 60 - 50),
        (3, None, ((55 - 60) + (40 - 70)) / 2, ((60 - 55) + (70 - 40)) / 2),
    ],
)
def test_three_updates_by_hand(newest, forward, backward, forgetting):
    expected = {"forward": forward, "backward": backward, "forgetting": forgetting}
    assert after(lines_of(R, range(newest + 1)), STREAM) == expected


def test_forgetting_is_from_the_best_there_was_and_backward_from_what_was_learned():
    """The concept improves after its own update, before it is lost."""
    matrix = [[0, 0, 0], [40, 0, 0], [80, 50, 0], [30, 60, 70]]
    found = after(lines_of(matrix), STREAM)
    assert found["backward"] == ((30 - 40) + (60 - 50)) / 2
    assert found["forgetting"] == ((80 - 30) + (50 - 60)) / 2


def test_the_best_before_a_concept_was_learned_does_not_count():
    matrix = [[90, 90, 0], [40, 95, 0], [40, 50, 0], [40, 50, 0]]
    assert after(lines_of(matrix), STREAM)["forgetting"] == 0


def test_an_update_is_the_mean_of_its_concepts_and_those_without_a_picture_are_left_out():
    stream = [[("a", 0), ("b", 1), ("b", 0)], [("a", 1)], [("gone", 0), ("b", 2)]]
    lines = [
        {"update": 0, "datasets": {"a": [10, 0], "b": [None, 20, None]}},
        {"update": 1, "datasets": {"a": [50, 5], "b": [None, 40, None]}},
        {"update": 2, "datasets": {"a": [20, 60], "b": [None, 50, None]}},
    ]
    assert after(lines[:2], stream) == {"forward": 5, "backward": None, "forgetting": None}
    assert after(lines, stream) == {"forward": None, "backward": 35 - 45, "forgetting": 45 - 35}


def test_with_fewer_evaluations_the_first_at_or_after_an_update_stands_for_it():
    """Six updates, evaluated after 0, 2, 5 and 6."""
    stream = [[("a", label)] for label in range(6)]
    matrix = {
        0: [1, 2, 3, 4, 5, 6],
        2: [30, 40, 5, 6, 7, 8],
        5: [20, 44, 50, 60, 70, 18],
        6: [10, 33, 55, 44, 66, 80],
    }
    found = after(lines_of(matrix, [0, 2]), stream)  # 1 and 2 are learned, but nothing came after
    assert found == {"forward": pytest.approx((2 + 2 + 2 + 2) / 4), "backward": None, "forgetting": None}
    found = after(lines_of(matrix, [0, 2, 5]), stream)
    assert found == {"forward": 12, "backward": (-10 + 4) / 2, "forgetting": (10 - 4) / 2}
    found = after(lines_of(matrix, [0, 2, 5, 6]), stream)
    assert found["forward"] is None
    assert found["backward"] == pytest.approx(((10 - 30) + (33 - 40) + (55 - 50) + (44 - 60) + (66 - 70)) / 5)
    assert found["forgetting"] == pytest.approx(
        ((30 - 10) + (44 - 33) + (50 - 55) + (60 - 44) + (70 - 66)) / 5
    )


def test_a_retrieval_set_is_one_concept_with_or_without_classes():
    stream = [[("captions", -1)], [("a", 0)], [("shop", 0), ("shop", 7)]]
    lines = [
        {"update": 0, "datasets": {"captions": [10], "a": [1, 2], "shop": [30]}},
        {"update": 1, "datasets": {"captions": [60], "a": [3, 2], "shop": [36]}},
        {"update": 2, "datasets": {"captions": [45], "a": [9, 2], "shop": [40]}},
    ]
    assert after(lines[:2], stream)["forward"] == ((3 - 1) + (36 - 30)) / 2
    assert after(lines, stream) == {"forward": 10, "backward": -15, "forgetting": 15}


def test_a_set_without_classes_is_not_the_last_class_of_its_test_set():
    stream = [[("a", -1)], [("a", 0)]]
    assert after(lines_of([[0, 50], [10, 60]]), stream)["forward"] == 10
    assert after(lines_of([[0, 50], [10, 60], [20, 0]]), stream)["backward"] is None


def test_the_numbers_of_mtil_by_hand():
    """Three tasks. Transfer: of the second 22, of the third (31 + 33) / 2."""
    scores = [[10, 20, 30], [50, 22, 31], [45, 60, 33], [40, 55, 70]]
    rows = [Row(i, row) for i, row in enumerate(scores)]
    found = mtil(rows)
    assert found == pytest.approx({"transfer": 27, "average": (45 + 137 / 3 + 134 / 3) / 3, "last": 55})
    assert mtil(rows[:-1]) is None
    assert mtil([rows[0], *rows[2:]]) is None  # an update that was not scored
    assert mtil([Row(0, [10]), Row(1, [30])]) == {"average": 30, "last": 30}


def test_the_numbers_of_tic_clip_by_hand():
    """Three periods: the diagonal 50, 60, 70; below it 45, 40, 55; above it 22, 31, 33."""
    scores = [[10, 20, 30], [50, 22, 31], [45, 60, 33], [40, 55, 70]]
    rows = [Row(i, row) for i, row in enumerate(scores)]
    assert tic(rows) == {"in_domain": 60, "backward": (45 + 40 + 55) / 3, "forward": (22 + 31 + 33) / 3}
    assert tic(rows[:-1]) is None
    assert tic([rows[0], *rows[2:]]) is None  # an update that was not scored
    assert tic([Row(0, [10]), Row(1, [30])]) == {"in_domain": 30}
    without = [
        Row(i, [row[0], None, row[2]]) for i, row in enumerate(scores)
    ]  # nothing to test the second on
    assert tic(without) == {"in_domain": 60, "backward": (45 + 40) / 2, "forward": (31 + 33) / 2}


def test_a_row_of_sets_is_the_mean_of_those_that_an_update_taught_and_that_are_tested():
    line = {"update": 2, "datasets": {"a/2023": 10, "a/2024": 30, "b/2024": 50, "kept": 90}}
    stream = [{"a/2023": 4}, {"a/2024": 4, "b/2024": 1}, {"a/2025": 3}]
    assert row_of_sets(line, stream) == Row(2, [10, 40, None])
