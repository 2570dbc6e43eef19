"""Inequalities are read as written, and verdicts rest on intervals that are right as often as they say."""

import math

import numpy as np
import pytest

from fomo.guide.inequalities import (
    above_line,
    decide,
    half_width,
    measured,
    parse,
    student,
)


def scores_of(**ends_by_variant):
    """Variant -> the end scores (KA) by seed; every run starts at KA 10, ZS 50 and has two updates."""
    return {
        name.replace("_", "-"): {
            seed: {
                "ka": np.array([10.0, (10 + end) / 2, end]),
                "zs": np.array([50.0, 48, 49]),
                "gm": np.ones(3),
            }
            for seed, end in enumerate(ends)
        }
        for name, ends in ends_by_variant.items()
    }


# --- reading ---------------------------------------------------------------------------------------------


def test_a_difference_is_two_variants_under_one_measure():
    comparison = parse("ka(finetune) - ka(lora-64) > 0.5")
    assert comparison.weights == {"finetune": 1, "lora-64": -1}
    assert comparison.pattern == {("ka", "end"): 1} and comparison.margin == 0.5 and comparison.kind == ">"
    assert comparison.mentioned == ["finetune", "lora-64"]


@pytest.mark.parametrize(
    "text, weights, margin",
    [
        ("ka(a) < 3", {"a": 1}, 3),
        ("ka(a) + 1 > ka(b)", {"a": 1, "b": -1}, -1),
        ("2 * ka(a) - .5*ka(b) - 0.5 * 3 * ka(c) > -1", {"a": 2, "b": -0.5, "c": -1.5}, -1),
        ("-ka(a) > 2 - ka(b)", {"a": -1, "b": 1}, 2),
        ("ka(a)-ka(b)-ka(b)<4-1", {"a": 1, "b": -2}, 3),
        ("|ka(cosine) - ka(x@1e-05)| < 1.5", {"cosine": 1, "x@1e-05": -1}, 1.5),
    ],
)
def test_linear_combinations_on_either_side(text, weights, margin):
    comparison = parse(text)
    got = {name: w * comparison.pattern["ka", "end"] for name, w in comparison.weights.items()}
    assert got == pytest.approx(weights) and comparison.margin == pytest.approx(margin)


def test_moments_of_one_variant_are_one_pattern():
    comparison = parse("zs.start(a) - zs(a) - 0.5*zs.start(b) + 0.5*zs(b) > 0")
    assert comparison.weights == {"a": 1, "b": -0.5}
    assert comparison.pattern == {("zs", "start"): 1, ("zs", "end"): -1}


@pytest.mark.parametrize(
    "text, problem",
    [
        ("ka(a) - kz(b) > 0", "column 9: unknown metric 'kz', accepted: ka, zs, gm, line"),
        ("ka.last(a) > 0", "column 1: unknown moment 'last', accepted: end, area"),
        ("line.peak(a) > 0", "column 1: unknown moment 'peak', accepted: none for line"),
        ("ka(a) - > 0", "column 9: "),
        ("ka(finetune) >", "column 15: "),
        ("ka(a) - ka(b)", "column 1: expected one < or >"),
        ("ka(a) > 0 > 1", "column 13: "),
        ("ka(a) $ 1", "column 7: "),
        ("ka(lora-64, b) > 1", "column 1: "),
        ("|ka(a)| > 1", "column 1: expected |METRIC(variant) ...| < number"),
        ("|ka(a)| < ka(b)", "column 1: "),
        ("|ka(a)| + 1 < 3", "column 1: "),
        ("ka(a) - ka(a) > 0", "compares no scores"),
        ("ka(a) - zs(b) > 0", "b is measured by another combination than a"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_column(text, problem):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert problem in str(caught.value)


# --- measuring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment, value", [("end", 7), ("area", 6), ("first", 3), ("peak", 8), ("start", 1), ("swing", 8 / 3)]
)
def test_moments_by_hand(moment, value):
    scores = {"a": {0: {"ka": np.array([1.0, 3, 8, 7])}}}
    assert measured(parse(f"ka.{moment}(a) > 0"), scores, "a", 0) == pytest.approx(value)


def test_the_distance_from_the_trade_off_line_by_hand():
    joint = {"zs": np.array([50.0, 46]), "ka": np.array([20.0, 23])}  # direction (-4, 3)
    on = {"zs": np.array([50.0, 48]), "ka": np.array([20.0, 21.5])}
    above = {"zs": np.array([50.0, 48 + 3]), "ka": np.array([20.0, 21.5 + 4])}  # 5 points at a right angle
    assert above_line(on, joint) == pytest.approx(0) and above_line(above, joint) == pytest.approx(5)
    assert above_line({"zs": np.array([50.0, 45]), "ka": np.array([20.0, 17.5])}, joint) < 0
    assert parse("line(a) > 0").mentioned == ["a", "joint"]


# --- statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "freedom, printed",
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980), (10**9, 1.960)],
)
def test_quantiles_are_those_of_the_printed_table(freedom, printed):
    assert student(freedom) == pytest.approx(printed, abs=6e-4)


def test_two_variants_give_the_paired_t_interval():
    a, b = np.array([3.0, 5.0, 4.5]), np.array([1.0, 4.0, 2.0])
    expected = 4.302653 * (a - b).std(ddof=1) / math.sqrt(3)
    assert half_width(np.stack([a, b]), np.array([1.0, -1.0])) == pytest.approx(expected, rel=1e-5)


def test_one_variant_alone_gives_the_one_sample_t_interval():
    a = np.array([3.0, 5.0, 4.5, 7.0])
    expected = 3.182446 * a.std(ddof=1) / 2
    assert half_width(a[None], np.array([1.0])) == pytest.approx(expected, rel=1e-5)


def test_the_deviation_is_pooled_over_the_variants_that_are_not_compared():
    """Residuals by hand: (1, -1, 0), (-1, 1, 0), 0 in the third row: MS_E = 4 / 4 = 1, 4 degrees of freedom."""
    table = np.array([[11.0, 9, 10], [19, 21, 20], [30, 30, 30]]) + np.array([5.0, -5, 0])
    expected = 2.776445 * math.sqrt(1 * 2 / 3)
    assert half_width(table, np.array([1.0, 0, -1])) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("weights", [(1, -1, 0, 0), (1, 0, 0, 0), (1, -0.5, 0, 0), (1, -0.5, -0.5, 0)])
@pytest.mark.parametrize("seed_effect", [0.0, 3.0])
def test_intervals_cover_the_truth_95_times_in_100(weights, seed_effect):
    rng, weights, covered, trials = np.random.default_rng(1), np.array(weights, float), 0, 3000
    means = np.array([4.0, 1, 7, 2])[:, None]
    for _ in range(trials):
        table = means + seed_effect * rng.normal(size=3) + rng.normal(size=(4, 3))
        error = (weights @ table).mean() - float(weights @ means[:, 0])
        covered += abs(error) < half_width(table, weights)
    exact = weights.sum() == 0
    assert 0.938 < covered / trials < (0.962 if exact else 0.995)


# --- verdicts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("ka(a) - ka(b) > 4", "holds"),
        ("ka(a) - ka(b) > 5.01", "undecided"),
        ("ka(a) - ka(b) > 6", "does not hold"),
        ("ka(a) - ka(b) < 6", "holds"),
        ("ka(a) - ka(b) < 4", "does not hold"),
        ("ka(a) - ka(b) < 5.1", "undecided"),
        ("ka(b) < ka(a) - 4", "holds"),
        ("|ka(a) - ka(b)| < 6", "holds"),
        ("|ka(b) - ka(a)| < 6", "holds"),
        ("|ka(b) - ka(a)| < 4", "does not hold"),
        ("|ka(a) - ka(b)| < 5.1", "undecided"),
    ],
)
def test_verdicts_compare_the_interval_with_the_margin(text, verdict):
    """a - b is 5.1, 4.9 and 5.0: a mean of 5 and a deviation of 0.1."""
    scores = scores_of(a=[30.1, 35.0, 31.9], b=[25.0, 30.1, 26.9])
    decision = decide(parse(text), scores)
    low, high = decision.interval
    assert low < abs(decision.effect) * np.sign(low) < high and (high - low) / 2 == pytest.approx(
        4.302653 * 0.1 * math.sqrt(1 / 3), rel=0.01
    )
    assert decision.verdict == verdict and decision.seeds == [0, 1, 2]


def test_one_seed_leaves_everything_undecided():
    decision = decide(parse("ka(a) - ka(b) > 1"), scores_of(a=[90.0], b=[10.0]))
    assert decision.verdict == "undecided" and decision.effect == 80 and decision.interval is None


def test_only_seeds_that_all_compared_variants_have_count():
    scores = scores_of(a=[30.0, 31, 32], b=[20.0, 21, 22.5], other=[1.0])
    del scores["b"][0]
    assert decide(parse("ka(a) - ka(b) > 1"), scores).seeds == [1, 2]
    del scores["b"][1], scores["b"][2]
    assert decide(parse("ka(a) - ka(b) > 1"), scores) is None
