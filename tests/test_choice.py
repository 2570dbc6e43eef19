"""What is chosen on validation pictures, against runs and scores that are made without it."""

from math import ceil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from small_runs import (
    CPU,
    assert_same,
    class_folders,
    invoke,
    lines,
    recipe_of,
    run,
    run_until,
    terminate,
    weights_of,
)

from fomo.choice import POINTS, Choice
from fomo.clip import load as load_model
from fomo.datasets import datafile
from fomo.datasets.eval_sets import open_tests
from fomo.errors import Interrupted, UserError
from fomo.eval.zero_shot import Scores, evaluate
from fomo.methods.merge import KEEPS
from fomo.report.page import write_report

EMA = "{name: merge, init: ema, deploy: ema, rule: interpolate, keep: auto}"
SETTINGS = (f"method={EMA}", "optimizer.lr=3e-3", "stream.updates=2", "budget.steps=10")


def scores(ka: float, zs: float) -> Scores:
    return Scores(ka, zs, (ka * zs) ** 0.5, {}, {})


def split_data(scale: Path, folder: Path) -> Path:
    """A data file that leaves out the validation pictures by itself."""
    content = datafile.content(datafile.read(recipe_of(scale).data, validation=True))
    (folder / "data.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return folder / "data.yaml"


@pytest.fixture(scope="module")
def chosen(small_scale, tmp_path_factory):
    """A run that chooses the share and the step: its folder, and the lines of metrics.jsonl."""
    folder = tmp_path_factory.mktemp("chosen") / "run"
    return folder, run(recipe_of(small_scale, *SETTINGS, "budget.auto=true"), folder)


def test_the_best_geometric_mean_is_chosen_of_equal_ones_the_older():
    choice = Choice(2, 50)
    assert choice.add(5, {0.0: scores(40, 40), 0.4: scores(50, 32), 0.5: scores(25, 64), 1.0: scores(10, 90)})
    assert choice.chosen == {"step": 5, "keep": 0.5, "ka": 25, "zs": 64, "gm": 40}


@pytest.mark.parametrize("pictures, earlier", [(10, False), (30, False), (60, True), (1000, True)])
def test_an_update_ends_early_only_where_that_is_better_than_the_noise(pictures, earlier):
    """GM 54 against 50 of KA 50: its standard error, simulated, is 4 at 39 pictures."""
    choice = Choice(2, pictures)
    assert choice.add(5, {0.5: scores(58.32, 50)}) and not choice.add(10, {0.5: scores(50, 50)})
    assert (choice.chosen["step"] == 5) == earlier
    drawn = np.random.default_rng(0).binomial(pictures, 0.5, 100_000) / pictures * 100
    assert (np.sqrt(drawn * 50).std() < 4) == earlier


@pytest.mark.parametrize("steps", [1, 3, 5, 7, 100, 113])
def test_the_points_are_evenly_spaced_and_the_end_is_one(steps):
    choice = Choice(POINTS, 10)
    due = choice.due(steps)
    assert due == sorted({ceil(k * steps / POINTS) for k in range(1, POINTS + 1)}) and due[-1] == steps
    assert Choice(1, 10).due(steps) == [steps] and Choice().due(steps) == []


def test_what_is_deployed_is_what_scored_best(small_scale, chosen):
    """Scored again from the deployed weights, on the validation split alone."""
    folder, scored = chosen
    for line in scored[1:]:
        tried, best = line["choice"]["tried"], line["choice"]["chosen"]
        assert [row["step"] for row in tried] == [s for s in (3, 5, 8, 10) for _ in KEEPS]
        assert [row["keep"] for row in tried] == list(KEEPS) * POINTS
        last = [row["gm"] for row in tried if row["step"] == tried[-1]["step"]]
        assert best["gm"] in (max(last), max(row["gm"] for row in tried))
        clip = load_model(None, str(folder / f"weights/update_{line['update']:03d}.safetensors"))
        data = datafile.read(recipe_of(small_scale).data, validation=True)
        tests = open_tests(data, clip, clip.image_size, "validation")
        again, _ = evaluate(clip, tests, {test.name: test.usable for test in tests}, CPU)
        assert (again.ka, again.zs) == pytest.approx((best["ka"], best["zs"]))


def test_the_report_says_what_was_chosen_and_draws_all_that_was_tried(chosen):
    best = chosen[1][-1]["choice"]["chosen"]
    page = write_report([chosen[0]]).read_text()
    assert "what was chosen" in page and f"keep {best['keep']:g} after step {best['step']}" in page
    assert all(f"after step {step}" in page for step in (3, 5, 8, 10))


def test_the_share_is_that_of_an_interpolation_with_the_tuned_model(small_scale, tmp_path, monkeypatch):
    """Another run, of the same batches, that only finetunes. A share of 0.4 is made the best."""
    once = (*SETTINGS[1:], "stream.updates=1")
    monkeypatch.setattr(Choice, "chosen", property(lambda self: self.tried[KEEPS.index(0.4)]))
    run(recipe_of(small_scale, f"method={EMA}", *once), tmp_path / "merged")
    run(recipe_of(small_scale, *once, data=split_data(small_scale, tmp_path)), tmp_path / "tuned")
    old, new = (weights_of(tmp_path / "tuned", update) for update in (0, 1))
    for name, deployed in weights_of(tmp_path / "merged", 1).items():
        torch.testing.assert_close(deployed, 0.4 * old[name] + 0.6 * new[name])
        assert not deployed.is_floating_point() or not old[name].equal(new[name])


def test_an_update_that_ends_early_deploys_what_was_tuned_until_then(small_scale, tmp_path, monkeypatch):
    """Of a constant rate, so that a shorter run takes the same steps. The first point is made the best."""
    monkeypatch.setattr(Choice, "chosen", property(lambda self: self.tried[0]))
    rate = ("schedule.name=constant", "schedule.warmup=0", "stream.updates=1", "optimizer.lr=1e-3")
    run(recipe_of(small_scale, *rate, "budget.steps=10", "budget.auto=true"), tmp_path / "early")
    monkeypatch.undo()
    short = recipe_of(small_scale, *rate, "budget.steps=3", data=split_data(small_scale, tmp_path))
    run(short, tmp_path / "short")
    assert_same(weights_of(tmp_path / "early", 1), weights_of(tmp_path / "short", 1))


@pytest.mark.parametrize("step", [3, 10, 16])
def test_a_run_stopped_on_its_way_chooses_the_same(small_scale, chosen, tmp_path, step):
    recipe = recipe_of(small_scale, *SETTINGS, "budget.auto=true")
    with pytest.raises(Interrupted):
        run_until(recipe, tmp_path / "run", step, terminate)
    again = run(recipe, tmp_path / "run", resume=True)
    assert [line.get("choice") for line in again] == [line.get("choice") for line in chosen[1]]
    assert_same(weights_of(tmp_path / "run", 2), weights_of(chosen[0], 2))


def test_nobody_trains_on_or_reports_validation_pictures(small_scale):
    whole, split = (datafile.read(recipe_of(small_scale).data, validation=v) for v in (False, True))
    for name, entry in split.adaptation.items():
        train, validation = entry.open("train"), entry.open("validation")
        parts = [set(part.numbers.tolist()) for part in (train, validation)]
        assert not parts[0] & parts[1] and parts[0] | parts[1] == set(
            range(len(whole.adaptation[name].open("train")))
        )
        assert len(entry.open("test")) == len(whole.adaptation[name].open("test"))
    for name, entry in split.evaluation.items():
        taken = len(entry.open("validation"))
        assert taken > 0 and len(entry.open("test")) + taken == len(whole.evaluation[name].open("test"))


def test_a_folder_is_chosen_on_where_it_has_pictures_enough(tmp_path, small_scale):
    """Without sets to keep, rendered pictures stand for them."""
    many, few = (class_folders(tmp_path / name, ["ant", "bee"], n) for name, n in (("many", 80), ("few", 20)))
    for folder, expected in ((many, "auto"), (few, 0.5)):
        out = tmp_path / "runs" / folder.name
        done = invoke("update", "--scale", small_scale, "--data", folder, "--out", out)
        assert done.exit_code == 0, done.output
        assert f"keep: {expected}" in (out / "recipe.yaml").read_text()
        tried = "choice" in lines(out / "metrics.jsonl")[-1]
        assert ("to choose on" in done.stderr) == tried == (expected == "auto")


def test_a_budget_that_is_said_is_not_cut_short(small_scale, tmp_path):
    many = class_folders(tmp_path / "many", ["ant", "bee"], 80)
    done = invoke("update", "--scale", small_scale, "--data", many, "--dry-run", "--set", "budget.steps=3")
    assert done.exit_code == 0 and "the end of an update" not in done.stdout, done.output
    assert "chosen on" in done.stdout  # the share still is


@pytest.mark.parametrize(
    "settings, field",
    [
        (["budget=auto", "schedule.meta=infinite"], "budget.auto"),
        (["method={name: merge, keep: half}"], "method.keep"),
        (["budget=soon"], "budget"),
    ],
)
def test_what_cannot_be_chosen_is_one_line(small_scale, settings, field):
    with pytest.raises(UserError, match=field):
        recipe_of(small_scale, *settings)


def test_merging_by_hand_does_not_know_auto(tmp_path, chosen):
    weights = [chosen[0] / f"weights/update_{n:03d}.safetensors" for n in (0, 1)]
    done = invoke(
        "merge", "--rule", "interpolate", "--set", "keep=auto", *weights, "-o", tmp_path / "m.safetensors"
    )
    assert (
        done.exit_code == 2
        and "keep: auto" in done.stderr
        and not np.any([(tmp_path / "m.safetensors").exists()])
    )
