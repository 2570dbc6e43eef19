"""Runs that were scored on other test sets: compared on those that all have, and only on them. No torch."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from run_folders import ROLES, Page, curves_of, figure_of, groups_of, make_run, metrics, write_lines

from fomo.report import figures
from fomo.report import page as report
from fomo.report.page import write_report


def child_of(folder: Path, roles: dict[str, str], **how) -> Path:
    """A run whose first update is its parent's last."""
    run = make_run(folder, roles=roles, **how)
    write_lines(run, metrics(run)[1:])
    return run


def mean_of(line: dict, *names: str) -> float:
    return np.mean([line["datasets"][name] for name in names])


def test_runs_are_compared_on_the_test_sets_that_all_have_and_the_others_are_named(tmp_path, capsys):
    more = {**ROLES, "stars": "adaptation", "rust": "evaluation"}
    folders = [make_run(tmp_path / "parent"), child_of(tmp_path / "child", more, name="finetune")]
    text = write_report(folders, tmp_path / "out.html").read_text()
    told = "KA over letters, flags; ZS over noisy, gray. Left out: stars (only child), rust (only child)."
    assert told in text and told in capsys.readouterr().err
    lasts = [metrics(run)[-1] for run in folders]
    head, *rows = Page(text).rows[:3]
    for row, last in zip(rows, lasts, strict=True):
        cells = dict(zip(head, row, strict=True))
        ka, zs = mean_of(last, "letters", "flags"), mean_of(last, "noisy", "gray")
        expected = [f"{score:.1f}" for score in (ka, zs, math.sqrt(ka * zs))]
        assert [cells[key] for key in ("KA", "ZS", "GM")] == expected
    curves = report.compare(report.comparable(groups_of(*folders))[0])[0].what
    for curve, run in zip(curves, folders, strict=True):
        np.testing.assert_allclose(
            curve.mean["ka"], [mean_of(line, "letters", "flags") for line in metrics(run)]
        )
    own = [
        row for row in Page(text).rows if row[0] == "3" and len(row) == 4
    ]  # each run by itself: all its sets
    assert [row[1] for row in own] == [f"{last['ka']:.1f}" for last in lasts]


def test_runs_with_the_same_test_sets_are_as_they_were(tmp_path, capsys):
    folders = [make_run(tmp_path / name, name=name) for name in ("merge", "finetune")]
    groups = groups_of(*folders)
    assert report.comparable(groups) == (groups, "")
    write_report(folders)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("field", ["contents", "classes", "roles"])
def test_sets_of_one_name_that_are_not_the_same_are_not_compared(tmp_path, field):
    folders = [make_run(tmp_path / name, name=name) for name in ("a", "b", "c")]
    for run in folders:
        constants = json.loads((run / "run.json").read_text())
        constants |= {"contents": dict.fromkeys(ROLES, "0f"), "classes": {name: ["x"] for name in ROLES}}
        if run.name == "c":
            other = {"contents": "f0", "classes": ["y"], "roles": "evaluation"}[field]
            constants[field] = {**constants[field], "flags": other}
        (run / "run.json").write_text(json.dumps(constants))
    groups, told = report.comparable(groups_of(*folders))
    assert "KA over letters;" in told and "Left out: flags (not the same set in all)." in told
    assert groups[0].values("ka")[0, -1] == metrics(folders[0])[-1]["datasets"]["letters"]
    for run in folders[:2]:  # older runs do not say what their sets hold: no reason to leave one out
        (run / "run.json").write_text(json.dumps({"roles": ROLES}))
    assert (report.comparable(groups_of(*folders))[1] == "") == (field != "roles")


def test_without_a_common_set_of_a_role_its_score_is_unknown_and_that_is_said(tmp_path, capsys):
    roles = [{"cats": "adaptation", "noisy": "evaluation"}, {"dogs": "adaptation", "noisy": "evaluation"}]
    roles += [{"birds": "adaptation", "gray": "evaluation"}]
    folders = [make_run(tmp_path / f"r{i}", roles=r, name=str(i)) for i, r in enumerate(roles)]
    text = write_report(folders[:2]).read_text()
    assert "KA is n/a, over no set; ZS over noisy. Left out: cats (only r0), dogs (only r1)." in text
    assert "KA" not in Page(text).rows[0] and "ZS" in Page(text).rows[0]
    (scores_plot,) = report.compare(report.comparable(groups_of(*folders[:2]))[0])
    plane = figure_of(figures.plane_figure, scores_plot.what)
    assert "r0, r1: no KA or no ZS" in plane.axes[0].get_title("left")
    assert len(figure_of(scores_plot.draw, scores_plot.what).axes) == 1
    assert "KA is n/a, over no set; ZS is n/a, over no set." in write_report(folders).read_text()
    assert "n/a" in capsys.readouterr().err
    assert report.compare(report.comparable(groups_of(*folders))[0]) == []


def test_whole_test_sets_are_compared_only_with_whole_ones(tmp_path):
    folders = [make_run(tmp_path / "whole", full=True), make_run(tmp_path / "subset", name="finetune")]
    rows = Page(write_report(folders).read_text()).rows
    assert [row[-1] for row in rows[1:3]] == ["subset", "subset"]
    assert rows[1][1] == f"{metrics(folders[0])[-1]['ka']:.1f}"
    folders[1] = make_run(tmp_path / "whole too", name="finetune", full=True)
    rows = Page(write_report(folders).read_text()).rows
    assert [row[-1] for row in rows[1:3]] == ["whole", "whole"]
    assert rows[1][1] == f"{metrics(folders[0])[-1]['full']['ka']:.1f}"


def test_what_is_one_runs_is_not_shown_as_if_it_were_all_runs(tmp_path):
    """The frozen baseline is of one run's sets and stream; a child does not begin with the untouched model."""
    folders = [make_run(tmp_path / "merge"), child_of(tmp_path / "child", ROLES, name="finetune")]
    for run in folders:
        first, *others = metrics(run)
        write_lines(run, [{**first, "frozen": [30.0, 40.0, 50.0, 60.0]}, *others])
    alone = figure_of(figures.scores_figure, curves_of(folders[0])).axes[0]
    assert "frozen features" in alone.get_legend_handles_labels()[1]
    both = figure_of(figures.scores_figure, curves_of(*folders)).axes[0]
    assert set(both.get_legend_handles_labels()[1]) == {"merge", "child"}
    plane = figure_of(figures.plane_figure, curves_of(*folders)).axes[0]
    starts = {line.get_label(): np.ravel(line.get_data()).tolist() for line in plane.lines}
    for run, label in zip(folders, ("untouched model", "parent's model"), strict=True):
        assert starts[label] == [metrics(run)[0]["zs"], metrics(run)[0]["ka"]]
    text = write_report([folders[1]]).read_text()
    assert "From its parent&#39;s model (update 1) to the last update" in text
