"""Inequalities are read as written, margins are shares of the trade-off, and verdicts say what runs show."""

import math

import numpy as np
import pytest

from fomo.guide.inequalities import (
    Decision,
    above_line,
    decide,
    judge,
    parse,
    quantile,
    tail,
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


def joint_run(ka: float, zs: float) -> dict:
    """From KA 40, ZS 70, where the paper's untouched model is."""
    ends = {"ka": ka, "zs": zs, "gm": math.sqrt(ka * zs)}
    return {
        key: np.array([start, ends[key]])
        for key, start in zip(ends, (40.0, 70.0, math.sqrt(2800)), strict=True)
    }


# --- reading ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, weights, margin",
    [
        ("ka(finetune) - ka(lora-64) > 0.5", {"finetune": 1, "lora-64": -1}, 0.5),
        ("ka(a) < 3", {"a": 1}, 3),
        ("ka(a) + 1 > ka(b)", {"a": 1, "b": -1}, -1),
        ("2 * ka(a) - .5*ka(b) - 0.5 * 3 * ka(c) > -1", {"a": 2, "b": -0.5, "c": -1.5}, -1),
        ("-ka(a) > 2 - ka(b)", {"a": -1, "b": 1}, 2),
        (" ka(a)-ka( b )-ka(b)<4-1", {"a": 1, "b": -2}, 3),
        ("|ka(lambda) - ka(5x@1e-05)| < 1.5", {"lambda": 1, "5x@1e-05": -1}, 1.5),
        ("2 * (ka(a) - ka(b)) > 1", {"a": 2, "b": -2}, 1),
    ],
)
def test_linear_combinations_on_either_side(text, weights, margin):
    comparison = parse(text)
    assert comparison.terms == pytest.approx({((name,), "ka", "end"): w for name, w in weights.items()})
    assert comparison.margin == pytest.approx(margin) and comparison.mentioned == [*weights, "joint"]
    assert comparison.kind == ("||" if "|" in text else "<" if "<" in text else ">")


def test_only_a_margin_or_a_line_takes_the_joint_run():
    assert parse("zs.start(a) - ka(b) > 0").mentioned == ["a", "b"]
    assert parse("line(a) > 0").mentioned == parse("ka(a) > 1").mentioned == ["a", "joint"]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("ka(a) - kz(b) > 0", "column 9: unknown metric 'kz', accepted: ka, zs, gm, line"),
        ("ka.last(a) > 0", "column 1: unknown moment 'last', accepted: end, area"),
        ("line.early(a) > 0", "column 1: unknown moment 'early', accepted: none for line"),
        ("ka(a) - > 0", "column 9: "),
        ("ka(finetune) >", "column 15: "),
        ("ka(a) - ka(b)", "column 1: expected one < or >"),
        ("ka(a) > 0 > 1", "column 13: "),
        ("ka(a) $ 1", "column 7: "),
        ("ka(lora-64, b) > 1", "column 1: expected several variants for a spread, else one"),
        ("ka.spread(a) > 1", "column 1: expected several variants for a spread, else one"),
        ("|ka(a)| > 1", "column 1: expected |METRIC(variant) ...| < number"),
        ("|ka(a)| < ka(b)", "column 1: "),
        ("|ka(a)| + 1 < 3", "column 1: "),
        ("ka(a) - ka(a) > 0", "expected a comparison of scores"),
        ("ka(a) - zs(b) > 1", "expected one metric where there is a margin"),
        ("line(a) > 1", "line by itself and without one"),
    ],
)
def test_what_cannot_be_read_is_named_with_its_column(text, problem):
    with pytest.raises(ValueError) as caught:
        parse(text)
    assert problem in str(caught.value)


# --- measuring -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment, value",
    [("end", 7), ("area", 5.25), ("first", 3), ("early", 5.5), ("start", 1), ("swing", 4)],
)
def test_moments_by_hand(moment, value):
    runs = {"a": {0: {"ka": np.array([1.0, 3, 8, 3, 7])}}}
    assert decide(parse(f"ka.{moment}(a) > 0"), runs).effect == pytest.approx(value)


def test_a_spread_is_the_deviation_over_variants_within_a_seed():
    runs = scores_of(a=[10.0, 50], b=[13.0, 50], **{"c-5": [16.0, 53]}, d=[30.0, 30])
    decision = decide(parse("ka.spread(a, b,c-5) > 0"), runs)
    assert list(decision.values) == pytest.approx([3, math.sqrt(3)]) and decision.comparison.mentioned == [
        "a",
        "b",
        "c-5",
    ]


def test_noise_alone_does_not_raise_early_above_the_start():
    """As the best of ten updates would be: by 1.5 deviations."""
    noise = np.random.default_rng(0).normal(size=(2000, 11))
    runs = {"a": {seed: {"zs": scores} for seed, scores in enumerate(noise)}}
    low, high = decide(parse("zs.early(a) - zs.start(a) > 0"), runs).interval
    assert low < 0 < high and (noise[:, 1:].max(axis=1) - noise[:, 0]).mean() > 1.4


def test_the_distance_from_the_trade_off_line_by_hand():
    joint = {"zs": np.array([50.0, 46]), "ka": np.array([20.0, 23])}  # direction (-4, 3)
    on = {"zs": np.array([50.0, 48]), "ka": np.array([20.0, 21.5])}
    above = {"zs": np.array([50.0, 48 + 3]), "ka": np.array([20.0, 21.5 + 4])}  # 5 points at a right angle
    assert above_line(on, joint) == pytest.approx(0) and above_line(above, joint) == pytest.approx(5)
    assert above_line({"zs": np.array([50.0, 45]), "ka": np.array([20.0, 17.5])}, joint) < 0


@pytest.mark.parametrize(
    "text, ends, margin",
    [
        ("ka(joint) > 2", [(60, 62)], 2),  # the paper's own trade-off
        ("ka(joint) > 2", [(80, 66)], 4),
        ("zs(joint) > -2", [(80, 66)], -1),
        ("zs(joint) > -2", [(80, 68), (80, 64)], -1),  # the mean over seeds
        ("gm(joint) > 1", [(60, 62)], 1),
        ("zs(joint) < 1", [(80, 71)], None),  # nothing is lost on the way to the joint run
        ("ka(joint) < 1", [(80, 71)], 2),
        ("ka(joint) < 0", [(80, 71)], 0),
        ("line(joint) > 0", [(80, 71)], None),
        ("line(joint) > 0", [(80, 69)], 0),
    ],
)
def test_a_margin_is_the_same_share_of_the_way_to_the_joint_run(text, ends, margin):
    runs = {"joint": {seed: joint_run(*end) for seed, end in enumerate(ends)}}
    assert decide(parse(text), runs).margin == (margin if margin is None else pytest.approx(margin))


# --- statistics ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "freedom, printed",
    [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (10, 2.228), (30, 2.042), (120, 1.980)],
)
def test_quantiles_are_those_of_the_printed_table(freedom, printed):
    assert quantile(freedom) == pytest.approx(printed, abs=6e-4)


@pytest.mark.parametrize("t", [-3.0, -0.5, 0.0, 0.7, 2.0, 50.0])
def test_tails_are_those_of_the_closed_forms(t):
    assert tail(t, 1) == pytest.approx(0.5 - math.atan(t) / math.pi, rel=1e-5)
    assert tail(t, 2) == pytest.approx(0.5 - t / (2 * math.sqrt(2 + t * t)), rel=1e-5)
    u = t / math.sqrt(4 + t * t)
    assert tail(t, 4) == pytest.approx(0.5 - 0.75 * (u - u**3 / 3), rel=1e-4)


def test_intervals_are_of_the_differences_within_a_seed():
    a, b = [13.0, 15.0, 14.5], [11.0, 14.0, 12.0]
    d = np.array(a) - np.array(b)
    low, high = decide(parse("ka(a) - ka(b) > 0"), scores_of(a=a, b=b, other=[90.0, 10, 50])).interval
    assert (high - low) / 2 == pytest.approx(4.302653 * d.std(ddof=1) / math.sqrt(3), rel=1e-4)
    low, high = decide(parse("ka(a) > 0"), scores_of(a=a, b=b)).interval
    assert (high - low) / 2 == pytest.approx(4.302653 * np.std(a, ddof=1) / math.sqrt(3), rel=1e-4)


def test_one_recipe_under_two_names_differs_by_nothing():
    runs = scores_of(a=[30.1, 35.7, 31.9], joint=[70.0, 71, 72])
    runs["b"] = runs["a"]
    for text in ("ka(a) - ka(b) > -0.1", "|zs(a) - zs(b)| < 0.1", "|0.3*ka(a) - 0.3*ka(b)| < 0.1"):
        decision = decide(parse(text), runs)
        assert decision.interval == (0, 0) and decision.effect == 0
    assert judge([decide(parse("ka(a) - ka(b) > -0.1"), runs)]) == ["holds"]
    assert judge([decide(parse("ka(a) - ka(b) > 0"), runs)]) == ["undecided"]


def test_only_seeds_that_all_compared_variants_have_count():
    runs = scores_of(a=[30.0, 31, 32], b=[20.0, 21, 22.5], other=[1.0])
    del runs["b"][0]
    assert decide(parse("ka(a) - ka(b) > 0"), runs).n == 2
    del runs["b"][1], runs["b"][2]
    assert decide(parse("ka(a) - ka(b) > 0"), runs) is None


# --- verdicts --------------------------------------------------------------------------------------------


WEAK = "right direction, below the margin"


@pytest.mark.parametrize(
    "text, verdict",
    [
        ("ka(a) - ka(b) > 4", "holds"),
        ("ka(a) - ka(b) > 5.01", WEAK),
        ("ka(a) - ka(b) > 6", WEAK),
        ("ka(b) - ka(a) > 0", "opposite"),
        ("ka(b) - ka(a) > 1", "opposite"),
        ("ka(b) - ka(a) > -4", "opposite"),
        ("ka(b) - ka(a) > -5.1", "undecided"),
        ("ka(b) - ka(a) > -6", "holds"),
        ("ka(a) - ka(b) < 6", "holds"),
        ("ka(a) - ka(b) < 5.1", "undecided"),
        ("ka(a) - ka(b) < 4", "opposite"),
        ("ka(a) - ka(b) < -1", "opposite"),
        ("ka(b) - ka(a) < -4", "holds"),
        ("ka(b) - ka(a) < -6", WEAK),
        ("ka(b) < ka(a) - 4", "holds"),
        ("|ka(a) - ka(b)| < 6", "holds"),
        ("|ka(b) - ka(a)| < 6", "holds"),
        ("|ka(b) - ka(a)| < 4", "opposite"),
        ("|ka(a) - ka(b)| < 5.1", "undecided"),
        ("ka(c) - ka(b) > 1", "undecided"),
        ("ka(c) - ka(b) > 9", "undecided"),
        ("line(a) > 0", "not applicable"),
    ],
)
def test_verdicts_compare_the_interval_with_the_margin(text, verdict):
    """a - b is 5.1, 4.9 and 5.0, c - b anything; the joint run gains 20 points of KA and loses nothing."""
    runs = scores_of(a=[30.1, 35, 31.9], b=[25.0, 30.1, 26.9], c=[28, 25, 32.0], joint=[30.0, 30, 30])
    for run in runs["joint"].values():
        run["zs"] = np.array([50.0, 50.0, 51])
    decision = decide(parse(text), runs)
    assert judge([decision]) == [verdict]
    if verdict == "not applicable":
        return
    low, high = decision.interval
    assert low < decision.effect < high
    assert verdict != "holds" or decision.slack > 0


def test_one_seed_leaves_everything_undecided():
    decision = decide(parse("ka(a) - ka(b) > 0"), scores_of(a=[90.0], b=[10.0]))
    assert judge([decision]) == ["undecided"] and decision.effect == 80 and decision.interval is None


def decisions_with(*p: float) -> list[Decision]:
    """Inequalities ka(a) > 0 whose p_opposite is p, of three seeds: t = -(1 - 2p) sqrt(2 / (4p (1 - p)))."""
    t = [-(1 - 2 * x) * math.sqrt(2 / (4 * x * (1 - x))) for x in p]
    unit = np.array([-1.0, 0, 1])  # with the error 1 / sqrt(3)
    return [Decision(parse("ka(a) > 0"), unit + x / math.sqrt(3), 0.0) for x in t]


@pytest.mark.parametrize(
    "p, opposite",
    [
        ([0.024], [True]),
        ([0.026], [False]),
        ([0.02, 0.008, 0.012], [True, True, True]),  # 0.025 / 3, / 2, / 1
        ([0.02, 0.009, 0.012], [False, False, False]),
        ([0.02, 0.008, 0.013], [False, True, False]),
    ],
)
def test_the_opposite_is_controlled_over_the_inequalities_of_a_claim(p, opposite):
    """Holm 1979, by hand."""
    decisions = decisions_with(*p)
    assert [decision.p_opposite for decision in decisions] == pytest.approx(p, rel=1e-3)
    assert judge(decisions) == ["opposite" if wrong else "undecided" for wrong in opposite]


def test_fourteen_inequalities_that_are_just_true_are_rarely_contradicted():
    """16 claims in 100 were, without control of the many."""
    rng, claims = np.random.default_rng(0), 400
    comparison = parse("ka(a) > 0")
    wrong = [
        "opposite" in judge([Decision(comparison, rng.normal(size=5), 0.0) for _ in range(14)])
        for _ in range(claims)
    ]
    assert np.mean(wrong) < 0.05
