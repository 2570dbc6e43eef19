"""The verdict on an update: better is what differs by more than the few test pictures explain."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from fomo.report.worth import standard_error, verdict, worth_table


def group(deployed, curve, ridge=None, zs=None, error=3.0, sets=("photos",), **more):
    """curve: keep -> KA; zs: of everything, so that GM is known."""
    constants = {"roles": dict.fromkeys(sets, "adaptation")}
    usual = {"updates": [0, 1], "interpolates": True, "choice": None, **more}

    def scores(ka):
        gm = np.nan if zs is None else (ka * zs) ** 0.5
        return {"ka": np.array([ka]), "zs": np.array([np.nan if zs is None else zs]), "gm": np.array([gm])}

    def values(*path):
        if path[0] == "stderr":
            return np.array([[0.0, error]])
        return np.array([[0.0, scores(deployed)[path[0]][0]]])

    return SimpleNamespace(
        keep_curve=lambda: curve and {keep: scores(ka) for keep, ka in curve.items()},
        frozen=lambda: None if ridge is None else np.array([[0.0, ridge]]),
        values=values,
        records=[SimpleNamespace(constants=constants, folder=Path("my runs/photos"))],
        **usual,
    )


CURVE = {0.0: 44.0, 0.5: 33.0, 1.0: 20.0}


def test_a_better_choice_is_named_with_the_way_to_it():
    text, command = verdict(group(33.0, CURVE, ridge=37.0))
    assert text == "Was it worth it? KA 33.0, doing nothing 20.0; better: plain finetuning (keep 0), 44.0."
    again = "--recipe 'my runs/photos/recipe.yaml' --set method.keep=0 --out 'my runs/photos-keep0'"
    assert command == f"python fomo.py update {again}"
    text, command = verdict(group(33.0, {0.0: 33.0, 0.25: 44.0, 1.0: 20.0}))
    assert "better: interpolated: keep 0.25, 44.0." in text and "--set method.keep=0.25 --out" in command


@pytest.mark.parametrize(
    ("ridge", "more"), [(50.0, {}), (None, {"updates": [3, 4]}), (None, {"interpolates": False})]
)
def test_no_command_is_given_where_none_leads_there(ridge, more):
    """To ridge regression; in a child, whose recipe does not run alone; under a method without `keep`."""
    text, command = verdict(group(33.0, CURVE, ridge=ridge, **more))
    better = "ridge regression on frozen features, 50.0" if ridge else "plain finetuning (keep 0), 44.0"
    assert text.endswith(f"; better: {better}.") and command == ""


@pytest.mark.parametrize("updates", [[0, 1], [3, 4], [0, 1, 20]])
def test_that_doing_nothing_is_better_is_said_with_the_way_back(updates):
    text, command = verdict(group(33.0, {0.0: 30.0, 1.0: 60.0}, updates=updates))
    assert "better: doing nothing (keep 1), 60.0." in text
    assert command == f"python fomo.py rollback 'my runs/photos' --to {updates[-2]}"


@pytest.mark.parametrize("best", [30.0, 33.0, 35.9])
def test_within_the_standard_error_nothing_is_clearly_better(best):
    text, command = verdict(group(33.0, {0.0: best, 1.0: 20.0}))
    assert text.endswith("nothing else that was scored is clearly better.") and command == ""


def test_where_something_must_be_kept_gm_decides_and_ridge_has_none():
    text, _ = verdict(group(33.0, CURVE, ridge=99.0, zs=50.0))
    said = "Was it worth it? GM 40.6, doing nothing 31.6; better: plain finetuning (keep 0), 46.9"
    assert text.startswith(said)


def test_a_run_that_scored_nothing_beside_has_no_verdict_and_the_table_has_a_row_for_each():
    assert verdict(group(33.0, None)) == ("", "") and worth_table(group(33.0, None)) == {}
    assert worth_table(group(33.0, CURVE, ridge=37.0))["instead"] == [
        "doing nothing (keep 1)",
        "ridge regression on frozen features",
        "plain finetuning (keep 0)",
        "interpolated: keep 0.5",
        "this update, as deployed",
    ]


def test_the_standard_error_of_a_mean_over_sets():
    assert standard_error(group(33.0, CURVE, error=3.0, sets=("a", "b"))) == pytest.approx((9 + 9) ** 0.5 / 2)


TRIED = [
    {"step": 9, "keep": k, "ka": ka, "zs": zs, "gm": (ka * zs) ** 0.5}
    for k, ka, zs in ((0.5, 40, 70), (1, 20, 90))
]


def test_a_share_that_was_chosen_is_not_held_against_those_that_learn_more_and_lose_more():
    choice = {"chosen": TRIED[0], "tried": TRIED}
    text, command = verdict(group(33.0, CURVE, choice=choice))
    chosen = "chosen: keep 0.5 after step 9, KA 40.0 and 70.0 of 90.0 kept on validation"
    assert text == (
        f"Was it worth it? KA 33.0, doing nothing 20.0 ({chosen}); nothing else that was scored is clearly better."
    )
    assert command == ""
    nothing = {"chosen": TRIED[1], "tried": TRIED}
    assert "(chosen: keep 1, the old model as it was," in verdict(group(20.0, CURVE, choice=nothing))[0]
    assert "better: ridge" in verdict(group(33.0, CURVE, ridge=50.0, choice=choice))[0]
    assert "better: doing nothing" in verdict(group(33.0, {0.0: 44.0, 1.0: 60.0}, choice=choice))[0]
    assert "better: plain finetuning" in verdict(group(33.0, CURVE, zs=50.0, choice=choice))[0]
