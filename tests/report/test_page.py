"""The report shows the numbers of the run folders, whatever state and names those have. No torch, seconds.

python -m pytest tests/report/test_page.py
"""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from run_folders import ROLES, Page, curves_of, figure_of, groups_of, make_run, metrics, write_lines

from fomo.errors import UserError
from fomo.report import figures
from fomo.report import page as report
from fomo.report.columns import as_rows
from fomo.report.page import write_report
from fomo.report.run_records import read_run
from fomo.schedules import Schedule, learning_rate

PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with its report."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run")
    assert write_report([run]) == run / "report.html"
    return run


def test_the_tables_hold_the_numbers_of_the_metrics(finished):
    rows = Page((finished / "report.html").read_text()).rows
    lines = metrics(finished)
    assert rows[0] == ["update", "KA", "ZS", "GM"] and rows[5] == ["update", "steps", "peak GiB"]
    for row, costs, line in zip(rows[1:5], rows[6:10], lines, strict=True):
        assert row == [str(line["update"]), *(f"{line[key]:.1f}" for key in ("ka", "zs", "gm"))]
        assert costs == [str(line["update"]), str(line["steps"]), "1.50"]
    changes = []
    for name, role, *numbers in rows[11:]:
        first, last = lines[0]["datasets"][name], lines[-1]["datasets"][name]
        expected = [f"{first:.1f}", f"{last:.1f}", f"{lines[-1]['stderr'][name]:.1f}", f"{last - first:+.1f}"]
        assert role == ROLES[name] and numbers == expected
        changes.append(last - first)
    assert len(changes) == 4 and changes == sorted(changes, reverse=True)


def test_headline_numbers_come_from_the_whole_test_sets_where_both_ends_have_them(tmp_path):
    run = make_run(tmp_path / "run", full=True)
    headline = report.headline(*groups_of(run))
    first, last = (metrics(run)[i]["full"] for i in (0, -1))
    assert [tile[1:] for tile in headline.tiles] == [
        (f"{first[key]:.1f} → {last[key]:.1f}", f"{last[key] - first[key]:+.1f}")
        for key in ("ka", "zs", "gm")
    ]
    assert "the whole test sets" in headline.note and "3 of 3 updates" in headline.note

    unfinished = make_run(tmp_path / "unfinished", full=True, reached=1)  # whole test sets at the start only
    headline = report.headline(*groups_of(unfinished))
    first, last = metrics(unfinished)
    assert headline.tiles[0][1] == f"{first['ka']:.1f} → {last['ka']:.1f}"
    assert "the whole test sets" not in headline.note and "1 of 3 updates, unfinished" in headline.note


def test_a_run_that_has_only_begun_is_reported(tmp_path):
    run = make_run(tmp_path / "run", reached=0)
    (run / "train.jsonl").unlink()
    text = write_report([run]).read_text()
    assert "after 0 of 3 updates, unfinished" in text and "<svg" not in text
    assert not (run / "plane.png").exists()


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"update": 4, "ka"')
    assert list(read_run(run).evaluations) == [0, 1, 2, 3]


def test_what_is_constant_is_read_from_its_file_or_from_the_first_line(tmp_path):
    run = make_run(tmp_path / "run", new=True)
    (new,) = groups_of(run)
    (first, *others), constants = metrics(run), json.loads((run / "run.json").read_text())
    write_lines(run, [{**first, **constants}, *others])
    (run / "run.json").unlink()
    (old,) = groups_of(run)
    for group in (new, old):
        assert {name: role for name, role, _ in group.datasets()} == ROLES
        assert group.steps == 50 and group.spent()[0] == "MAFs"
        assert "stream" in [plot.name for plot in report.plots_of(group, "")]


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("metrics.jsonl", None, "cannot be read"),
        ("metrics.jsonl", "", "empty"),
        ("metrics.jsonl", '{"update"\n{"update": 1}\n', "line 1"),
        ("recipe.yaml", None, "no such file"),
        ("recipe.yaml", "a: [1\nb: 2", "not valid YAML"),
        ("run.json", "{", "not JSON"),
    ],
)
def test_a_file_that_is_absent_or_damaged_is_named_in_one_line(tmp_path, name, content, problem):
    run = make_run(tmp_path / "run")
    if content is None:
        (run / name).unlink()
    else:
        (run / name).write_text(content)
    with pytest.raises(UserError) as caught:
        write_report([run])
    message = str(caught.value)
    assert message.startswith(f"{run / name}: ") and problem in message and "\n" not in message


def test_runs_that_differ_in_the_seed_are_one_curve_with_its_spread(tmp_path):
    folders = [make_run(tmp_path / f"merge-tiny-seed{seed}", seed=seed) for seed in range(3)]
    folders.insert(1, make_run(tmp_path / "finetune", name="finetune"))
    merge, finetune = groups_of(*folders)
    assert (merge.label, finetune.label) == ("merge-tiny (3 runs)", "finetune")
    ka = np.array([[line["ka"] for line in metrics(run)] for run in folders if "merge" in run.name])
    panel = figure_of(figures.scores_figure, [merge.curve(), finetune.curve()]).axes[0]
    curves = [line.get_ydata() for line in panel.lines]
    np.testing.assert_allclose(curves[0], ka.mean(axis=0))
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx((ka.mean(axis=0) + ka.std(axis=0, ddof=1)).max())
    twice = [*folders, folders[0]]  # counts once
    rows = Page(write_report(twice, tmp_path / "new folder" / "both.html").read_text()).rows
    change = ka[:, 3] - ka[:, 0]
    expected = [
        f"{x.mean():{form}} ± {x.std(ddof=1):.1f}" for x, form in ((ka[:, 3], ".1f"), (change, "+.1f"))
    ]
    assert rows[1][:3] == ["merge-tiny (3 runs)", *expected] and rows[1][-2:] == ["3 of 3", "subset"]
    assert rows[2][0] == "finetune" and "±" not in "".join(rows[2])
    assert (tmp_path / "new folder" / "plane.png").exists()


def test_a_mean_ends_where_its_shortest_run_does(tmp_path):
    folders = [make_run(tmp_path / f"m-{seed}", seed=seed, reached=3 - seed) for seed in range(2)]
    (group,) = groups_of(*folders)
    assert group.updates == [0, 1, 2] and group.values("ka").shape == (2, 3)


def test_hostile_names_are_shown_and_do_nothing(tmp_path):
    names = ["<script>alert(1)</script>", "$x^{$", '"a"\n& b', "😀", "</svg></details>", r"$\frac$"]
    roles = {name: ("adaptation", "evaluation")[i % 2] for i, name in enumerate(names)}
    run = make_run(tmp_path / "<b>run & <i>", roles=roles, name="</pre><script>")
    text = write_report([run]).read_text()
    page = Page(text)
    assert not page.tags & {"script", "i"} and text.count("</svg>") == 4 and text.count("</details>") == 1
    cells = {re.sub(r"\s", " ", row[0]) for row in page.rows if row}
    assert {"$x^{$", "😀"} <= cells and "&lt;script&gt;alert(1)&lt;/script&gt;" in text


def test_the_page_needs_no_network_and_its_ids_are_unique(tmp_path):
    folders = [make_run(tmp_path / name / "run", name=name, new=True) for name in ("merge", "finetune")]
    assert [group.label for group in groups_of(*folders)] == ["run #1", "run #2"]
    page = Page(write_report(folders).read_text())
    links = [value for key, value in page.attributes if key in ("src", "href", "xlink:href", "data")]
    assert links and all(value.startswith(("#", "data:image/png;base64,")) for value in links)
    assert not page.tags & {"link", "script", "img", "iframe", "object", "form"}
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_another_process_writes_the_same_bytes_and_needs_no_torch(finished, tmp_path):
    code = (
        "import sys; from fomo.report.page import write_report; write_report(sys.argv[1:2], sys.argv[2]);"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", code, finished, tmp_path / "report.html"]
    subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
    for name in ("report.html", "plane.png"):
        assert (tmp_path / name).read_bytes() == (finished / name).read_bytes()


def test_a_report_that_cannot_be_written_names_the_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"report\.html: cannot be written"):
        report.write(tmp_path / "file" / "report.html", b"new")


def test_without_evaluation_sets_there_is_knowledge_accumulation_only(tmp_path):
    run = make_run(tmp_path / "run", roles={"photos": "adaptation"})
    assert write_report([run]).exists()
    (group,) = groups_of(run)
    assert [tile[0] for tile in report.headline(group).tiles] == ["knowledge accumulation (KA)"]
    assert [plot.name for plot in report.compare([group])] == ["scores"] and not (run / "plane.png").exists()
    assert as_rows(report.updates_table(group))[0] == ["update", "KA"]
    assert len(figure_of(figures.scores_figure, [group.curve()]).axes) == 1
    assert "not drawn" in figure_of(figures.plane_figure, [group.curve()]).axes[0].get_title("left")


def with_keeps(run: Path) -> Path:
    """As of a run that scored what else could have been done."""
    *others, last = metrics(run)
    keeps = [{"keep": keep, "ka": 80 - 40 * keep, "zs": 50.0, "gm": 60.0} for keep in (0.0, 0.5)]
    write_lines(run, [*others, {**last, "keeps": keeps}])
    return run


def test_of_one_update_is_shown_what_there_is_and_the_verdict_first(tmp_path):
    run = with_keeps(make_run(tmp_path / "photos", updates=1, roles={"photos": "adaptation"}, new=True))
    text = write_report([run]).read_text()
    assert text.count("<svg") == 2  # the curve, and how it was trained
    assert text.index('class="lead">Was it worth it? ') < text.index('class="tiles"') < text.index("<svg")
    assert text.index("<svg") < text.index("plain finetuning (keep 0)<") < text.index("learning rate<")
    both = make_run(tmp_path / "b", updates=1, new=True)
    assert [plot.name for plot in report.compare(groups_of(both))] == ["plane"]


@pytest.mark.parametrize(
    ("method", "deployed"),
    [
        ({"name": "finetune"}, 0),
        ({"name": "lora", "rank": 4}, 0),
        ({"name": "merge", "keep": 0.7}, 0.7),
        ({"name": "merge", "rule": "slerp", "keep": 0.7}, None),
        ({"name": "merge", "init": "zeroshot", "keep": 0.7}, None),
        ({"name": "merge", "partner": "base", "keep": 0.7}, None),
    ],
)
def test_the_deployed_model_is_marked_where_it_is_on_the_curve(tmp_path, method, deployed):
    run = with_keeps(make_run(tmp_path / "run"))
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    (run / "recipe.yaml").write_text(yaml.safe_dump({**recipe, "method": method}))
    plot, _ = report.worth_of(*groups_of(run), "")
    (axes,) = figure_of(plot.draw, plot.what).axes
    marks = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == ":"]
    assert marks == [] if deployed is None else marks == [deployed]


def test_every_figure_and_table_head_says_what_it_is(tmp_path):
    folders = [
        with_keeps(make_run(tmp_path / name, name=name, new=True)) for name in ("<b>merge", "finetune")
    ]
    text = write_report(folders).read_text()
    titled = re.findall(r'<svg [^>]*role="img"><title>([^<]+)</title>', text)
    assert len(titled) == text.count("<svg") == 12 and "&lt;b&gt;merge: learning rate and loss" in titled
    assert re.findall(r"<th(?! scope)[ >]", text) == []


def test_only_the_plane_is_beside_the_report_and_it_carries_no_date(finished):
    written = {"recipe.yaml", "run.json", "metrics.jsonl", "train.jsonl", "report.html", "plane.png"}
    assert {path.name for path in finished.iterdir()} == written
    assert (finished / "plane.png").read_bytes().startswith(PNG)
    svg = figures.render(figures.plane_figure, [group.curve() for group in groups_of(finished)]).decode()
    assert "untouched model" in svg and "http://purl.org" not in svg  # no metadata


def test_the_training_figure_has_a_line_for_each_update(finished):
    (group,), training = groups_of(finished), read_run(finished).training
    rates, losses = figures.training_figure(figures.Training(group.rate_curve(), [training])).axes
    assert len(losses.lines) == 3
    x, y = losses.lines[1].get_data()
    assert x[-1] == 2 and (y == [line["loss"] for line in training if line["update"] == 2]).all()
    x, y = rates.lines[0].get_data()
    assert len(x) == 3 * 50 and x[49] == 1 and y.max() == 1e-3  # N = 50, from the last step that was logged
    assert y[5] == learning_rate(Schedule(), 1e-3, 0, 5, 50)


@pytest.mark.parametrize("draw", [figures.plane_figure, figures.scores_figure])
@pytest.mark.parametrize("count", [2, 9])
def test_a_legend_below_the_figure_tells_curves_apart(tmp_path, draw, count):
    names = [f"r{i}" for i in range(count)]
    figure = figure_of(draw, curves_of(*(make_run(tmp_path / name, name=name) for name in names)))
    (legend,) = figure.legends
    looks = {
        text.get_text(): (line.get_color(), line.get_marker(), str(line.get_linestyle()))
        for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True)
    }
    assert set(looks) - {"untouched model"} == set(names) and len(set(looks.values())) == len(looks)
    box = legend.get_window_extent()
    assert not any(box.overlaps(axes.get_tightbbox()) for axes in figure.axes)
    assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= figure.bbox.x1


def test_the_joint_run_is_a_gold_star_with_the_linear_trade_off_to_it(tmp_path):
    merge, joint = make_run(tmp_path / "merge"), make_run(tmp_path / "joint", updates=1)
    figure = figure_of(figures.plane_figure, curves_of(merge, joint))
    (plane,), (legend,) = figure.axes, figure.legends
    start, end = ([line["zs"], line["ka"]] for line in metrics(joint))
    (star,) = (line for line in plane.lines if line.get_color() == figures.GOLD)
    assert np.ravel(star.get_data()).tolist() == end and star.get_marker() == "*"
    ways = [line.get_xydata().tolist() for line in plane.lines if line.get_linestyle() != "None"]
    ways = [way for way in ways if len(way) > 1]
    assert [start, end] in ways and len(ways) == 2  # and the way of the merge
    assert {"joint upper bound: joint", "untouched model"} < {text.get_text() for text in legend.get_texts()}
    (alone,) = curves_of(joint)
    assert not alone.joint  # with nothing to bound it is a run like others
    both = [make_run(tmp_path / "new" / name, updates=n, new=True) for name, n in (("long", 2), ("one", 1))]
    assert not any(
        curve.joint for curve in curves_of(*both)
    )  # one has learned but the first half of the other


def test_evaluations_within_updates_are_small_points_and_nothing_else(tmp_path):
    plain = make_run(tmp_path / "plain", new=True)
    folders = [make_run(tmp_path / f"within-seed{seed}", seed=seed, new=True) for seed in (0, 1)]
    for seed, run in enumerate(folders):
        places = [
            (1, 5),
            (1, 20),
            (0, 7 + seed),
            (3, 5),
        ]  # the third of one run alone, the fourth after the last
        rest = {"ka": 30.0 + seed, "zs": 20.0, "gm": 25.0, "steps": 1}
        lines = [{"update": update, "step": step, **rest} for update, step in places]
        write_lines(
            run, sorted([*metrics(run), *lines], key=lambda line: (line["update"], line.get("step", 0)))
        )

    (group,) = groups_of(*folders)
    curve = group.curve()
    ka = np.array([[record.evaluations[update]["ka"] for update in range(4)] for record in group.records])
    assert group.updates == [0, 1, 2, 3] and np.allclose(curve.mean["ka"], ka.mean(axis=0))
    small = [[1.1, 30.5], [1.4, 30.5]]  # of 50 steps
    way, dots = figure_of(figures.scores_figure, [curve]).axes[0].lines
    np.testing.assert_allclose(dots.get_xydata(), small)
    ends = [[update, score] for update, score in enumerate(ka.mean(axis=0))]
    np.testing.assert_allclose(way.get_xydata(), [*ends[:2], *small, *ends[2:]])
    assert way.get_markevery() == [0, 1, 4, 5] and dots.get_markersize() < way.get_markersize()
    plane = figure_of(figures.plane_figure, [curve]).axes[0]
    ways = [line.get_xydata().tolist() for line in plane.lines]
    assert [[20, 30.5]] * 2 in ways and ways[0][2:4] == [[20, 30.5]] * 2

    (with_points,), (without,) = groups_of(folders[0]), groups_of(plain)
    np.testing.assert_array_equal(with_points.spent()[2], without.spent()[2])
    for make in (report.updates_table, report.transfer_table, report.costs_table, report.datasets_table):
        assert as_rows(make(with_points)) == as_rows(make(without))


def test_what_runs_have_come_to_write_is_shown(tmp_path):
    roles = {**ROLES, "photos": "evaluation"}
    run = make_run(tmp_path / "run", roles=roles, new=True)
    out = write_report([run], tmp_path / "out.html")
    rows = Page(out.read_text()).rows
    assert ["update", "KA", "ZS", "GM", "KA by concept", "ZS by concept"] in rows
    assert ["2", "+3.0", "-1.0", "1.0", "0.975"] in rows  # forward, backward, forgetting, drift
    assert ["0", "n/a", "n/a", "n/a", "1.000"] in rows and ["3", "n/a", "-2.0", "1.5", "0.963"] in rows
    costs = ["steps", "steps allowed", "samples", "GFLOPs", "MAFs", "MAFs allowed", "seconds", "peak GiB"]
    assert ["update", *costs] in rows
    assert ["2", "100", "100", "6,400", "2,000", "1,600", "1,640", "122", "1.50"] in rows
    measures = ["dataset", "top5", "class recall", "recall@1", "recall@5", "recall@10"]
    assert any(row[0] == "dataset" and sorted(row) == sorted(measures) for row in rows)
    scored = ["dataset", "role", "before", "after", "stderr of after", "change", "recall@1 after"]
    assert scored in rows
    assert out.read_text().count("<svg") == 6  # two of all scores, changes, training, stream, budget


def test_the_budget_is_what_was_spent_since_the_evaluation_before(tmp_path):
    run = make_run(tmp_path / "run", new=True)
    first, _, *others = metrics(run)
    write_lines(run, [first, *others])  # evaluated after updates 0, 2 and 3
    (group,) = groups_of(run)
    unit, updates, shares = group.spent()
    assert (unit, updates) == ("MAFs", [2, 3])
    np.testing.assert_allclose(shares, [100 * 1600 / 1640, 100 * 800 / 820])
    (run / "run.json").write_text(json.dumps({"allowed": {"steps": 50}}))
    (group,) = groups_of(run)
    assert group.spent()[0] == "steps" and (group.spent()[2] == 100).all()
    (run / "run.json").write_text("{}")
    assert groups_of(run)[0].spent() is None


def test_figures_and_tables_are_files_beside_the_page(tmp_path):
    folders = [
        make_run(tmp_path / name / f"run-seed{i}", name=name, seed=i, new=True)
        for name in "ab"
        for i in (0, 1)
    ]
    write_report(folders, tmp_path / "out" / "both.html")
    files = {path.name: path.read_bytes() for path in (tmp_path / "out" / "both_files").iterdir()}
    expected = {"plane.png", "plane.svg", "scores.png", "scores.svg", "summary.csv"}
    for group in ("1-run-2-runs-1", "2-run-2-runs-2"):
        for name in ("changes", "training", "stream", "budget"):
            expected |= {f"{group}-{name}.png", f"{group}-{name}.svg"}
        for name in ("updates", "transfer", "costs", "datasets", "measures"):
            expected |= {f"{group}-{name}.csv"}
    assert set(files) == expected
    signatures = {"png": PNG, "svg": b"<?xml", "csv": b""}
    assert all(content.startswith(signatures[name[-3:]]) for name, content in files.items())
    rows = list(csv.DictReader(files["1-run-2-runs-1-updates.csv"].decode().splitlines()))
    ka = np.array([[line["ka"] for line in metrics(run)] for run in folders[:2]])
    np.testing.assert_allclose([float(row["KA"]) for row in rows], ka.mean(axis=0))
    np.testing.assert_allclose([float(row["KA sd"]) for row in rows], ka.std(axis=0, ddof=1))


def in_periods(folder: Path, scores: list[list[float | None]], names: list[str], **tic: float) -> Path:
    """A finished run of an update a period; scores: of each period after each update."""
    roles = {f"shop/{name}": "adaptation" for name in names}
    run = make_run(folder, updates=len(names), roles=roles, new=True)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stream"]["every"] = "month"
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    constants = json.loads((run / "run.json").read_text())
    constants["stream"] = [{name: 3} for name in roles]
    (run / "run.json").write_text(json.dumps(constants))
    lines = metrics(run)
    for line, row in zip(lines, scores, strict=True):
        line["datasets"] = {n: s for n, s in zip(roles, row, strict=True) if s is not None}
    write_lines(run, [*lines[:-1], {**lines[-1], "tic": tic}])
    return run


def test_a_run_in_periods_has_the_matrix_of_all_by_all_and_tics_numbers(tmp_path):
    scores = [[10, 20, 30], [50, 22, 31], [45, 60, 33], [40, 55, 70]]
    run = in_periods(tmp_path / "run", scores, ["2024-01", "2024-02", "2024-03"], in_domain=60, backward=46.7)
    page = write_report([run], tmp_path / "page.html").read_text()
    assert {"TiC-CLIP in-domain", "TiC-CLIP backward"} <= {cell for row in Page(page).rows for cell in row}
    assert "TiC-CLIP forward" not in page and (tmp_path / "page_files/periods.svg").exists()
    (group,) = groups_of(run)
    periods = group.periods()
    assert (periods.names, periods.updates) == (["2024-01", "2024-02", "2024-03"], [0, 1, 2, 3])
    assert periods.scores.tolist() == scores
    figure = figure_of(figures.periods_figure, periods)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts == [f"{score:.1f}" for row in scores for score in row]
    assert [(frame.get_x(), frame.get_y()) for frame in figure.axes[0].patches] == [
        (-0.5, 0.5),
        (0.5, 1.5),
        (1.5, 2.5),
    ]


def test_runs_without_periods_have_no_matrix(tmp_path):
    assert groups_of(make_run(tmp_path / "run", new=True))[0].periods() is None
    assert groups_of(make_run(tmp_path / "old"))[0].periods() is None


def test_a_matrix_of_sixty_months_is_drawn_without_numbers_and_one_of_untested_periods_too(tmp_path):
    names = [f"{2019 + n // 12}-{1 + n % 12:02d}" for n in range(60)]
    many = figures.Periods(names, list(range(61)), np.random.default_rng(0).uniform(0, 100, (61, 60)))
    figure = figure_of(figures.periods_figure, many)
    assert not figure.axes[0].texts and figure.get_size_inches()[1] < 8
    none = figures.Periods(["2024"], [0, 1], np.full((2, 1), np.nan))
    assert [text.get_text() for text in figure_of(figures.periods_figure, none).axes[0].texts] == [
        "n/a",
        "n/a",
    ]
