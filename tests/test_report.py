"""The report shows the numbers of the run folders, whatever state and names those have. No torch, seconds.

python -m pytest tests/test_report.py
"""

import json
import re
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml

from fomo import report
from fomo.errors import UserError
from fomo.report import group_runs, plane, read_run, write_report

ROLES = {"letters": "adaptation", "flags": "adaptation", "noisy": "evaluation", "gray": "evaluation"}
PNG = b"\x89PNG"


def scores(datasets: dict[str, float], roles: dict[str, str]) -> dict:
    means = {}
    for key, role in (("ka", "adaptation"), ("zs", "evaluation")):
        own = [datasets[name] for name in roles if roles[name] == role]
        means[key] = float(np.mean(own)) if own else None
    both = None not in means.values()
    return {**means, "gm": float(np.sqrt(means["ka"] * means["zs"])) if both else None, "datasets": datasets}


def make_run(folder: Path, *, seed=0, name="merge", updates=3, reached=None, roles=ROLES, full=False) -> Path:
    """A run folder as `update` writes it, with scores that rise and fall by a few random points."""
    folder.mkdir(parents=True)
    recipe = {"scale": "tiny", "seed": seed, "stream": {"updates": updates}, "method": {"name": name}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    rng = np.random.default_rng([seed, *name.encode()])
    lines, steps = [], []
    for update in range((updates if reached is None else reached) + 1):
        slope = {"adaptation": 8, "evaluation": -2}
        values = {n: 40 + update * slope[role] + float(rng.normal()) for n, role in roles.items()}
        line = {"update": update, **scores(values, roles), "steps": 50 * update, "peak_memory": 3 * 2**29}
        if update == 0:
            line["roles"] = roles
        if full and update in (0, updates):
            line["full"] = scores({n: v + 1 for n, v in values.items()}, roles)
        lines.append(line)
        if update:
            steps += [
                {"update": update, "step": s, "loss": 2 / (s + 1), "lr": 1e-3} for s in range(0, 50, 10)
            ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    return folder


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


class Page(HTMLParser):
    """Tags, attributes, and the text of the tables' rows and of the headline numbers."""

    def __init__(self, text: str):
        super().__init__()
        self.tags, self.attributes, self.rows, self.bold, self.inside = set(), [], [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        self.inside = tag
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        self.inside = ""

    def handle_data(self, data):
        if self.inside in ("td", "th"):
            self.rows[-1].append(data)
        if self.inside == "b":
            self.bold.append(data)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A finished run with its report."""
    run = make_run(tmp_path_factory.mktemp("runs") / "run")
    assert write_report([run]) == run / "report.html"
    return run


def figure_of(draw, what):
    with matplotlib.rc_context(report.STYLE):
        figure = draw(what)
        figure.draw_without_rendering()
    return figure


def test_the_tables_hold_the_numbers_of_the_metrics(finished):
    rows = Page((finished / "report.html").read_text()).rows
    lines = metrics(finished)
    assert rows[0] == ["update", "KA", "ZS", "GM", "steps", "peak GiB"]
    for row, line in zip(rows[1:5], lines, strict=True):
        expected = [f"{line[key]:.1f}" for key in ("ka", "zs", "gm")]
        assert row == [str(line["update"]), *expected, str(line["steps"]), "1.50"]
    changes = []
    for name, role, *numbers in rows[6:]:
        first, last = lines[0]["datasets"][name], lines[-1]["datasets"][name]
        assert role == ROLES[name] and numbers == [f"{first:.1f}", f"{last:.1f}", f"{last - first:+.1f}"]
        changes.append(last - first)
    assert len(changes) == 4 and changes == sorted(changes, reverse=True)


def headline_of(folder: Path) -> str:
    return report.headline(*group_runs([read_run(folder)]))


def test_headline_numbers_come_from_the_whole_test_sets_where_both_ends_have_them(tmp_path):
    run = make_run(tmp_path / "run", full=True)
    text = headline_of(run)
    first, last = (metrics(run)[i]["full"] for i in (0, -1))
    assert Page(text).bold == [f"{first[key]:.1f} → {last[key]:.1f}" for key in ("ka", "zs", "gm")]
    assert "Percent on the whole test sets, after 3 of 3 updates." in text

    unfinished = make_run(tmp_path / "unfinished", full=True, reached=1)  # whole test sets at the start only
    text = headline_of(unfinished)
    first, last = metrics(unfinished)
    assert Page(text).bold[0] == f"{first['ka']:.1f} → {last['ka']:.1f}"
    assert "the whole test sets" not in text and "after 1 of 3 updates, unfinished" in text


def test_a_run_that_has_only_begun_is_reported(tmp_path):
    run = make_run(tmp_path / "run", reached=0)
    (run / "train.jsonl").unlink()
    text = write_report([run]).read_text()
    assert "after 0 of 3 updates, unfinished" in text and text.count("<svg") == 2


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    run = make_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"update": 4, "ka"')
    assert list(read_run(run).evaluations) == [0, 1, 2, 3]
    (run / "metrics.jsonl").write_text('{"update"\n{"update": 1}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 1 is not JSON"):
        read_run(run)


@pytest.mark.parametrize("name", ["metrics.jsonl", "recipe.yaml"])
def test_a_folder_that_is_no_run_is_one_clear_line(tmp_path, name):
    run = make_run(tmp_path / "run")
    (run / name).unlink()
    with pytest.raises(UserError) as caught:
        write_report([run])
    assert str(run / name) in str(caught.value) and "\n" not in str(caught.value)


def test_runs_that_differ_in_the_seed_are_one_curve_with_its_spread(tmp_path):
    folders = [make_run(tmp_path / f"merge-tiny-seed{seed}", seed=seed) for seed in range(3)]
    folders.insert(1, make_run(tmp_path / "finetune", name="finetune"))
    merge, finetune = group_runs([read_run(folder) for folder in folders])
    assert (merge.label, finetune.label) == ("merge-tiny (3 runs)", "finetune")
    ka = np.array([[line["ka"] for line in metrics(run)] for run in folders if "merge" in run.name])
    panel = figure_of(report.scores_figure, [merge, finetune]).axes[0]
    curves = [line.get_ydata() for line in panel.lines]
    np.testing.assert_allclose(curves[0], ka.mean(axis=0))
    band = panel.collections[0].get_paths()[0].vertices[:, 1]
    assert band.max() == pytest.approx((ka.mean(axis=0) + ka.std(axis=0, ddof=1)).max())
    rows = Page(write_report(folders, tmp_path / "new folder" / "both.html").read_text()).rows
    assert rows[4][1] == f"{ka[:, 3].mean():.1f} ± {ka[:, 3].std(ddof=1):.1f}"
    assert (tmp_path / "new folder" / "plane.png").exists()


def test_a_mean_ends_where_its_shortest_run_does(tmp_path):
    folders = [make_run(tmp_path / f"m-{seed}", seed=seed, reached=3 - seed) for seed in range(2)]
    (group,) = group_runs([read_run(folder) for folder in folders])
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
    folders = [make_run(tmp_path / name, name=name) for name in ("merge", "finetune")]
    page = Page(write_report(folders).read_text())
    links = [
        value for key, value in page.attributes if key in ("src", "href", "xlink:href", "data", "action")
    ]
    assert links and all(value.startswith("#") for value in links)
    assert not page.tags & {"link", "script", "img", "iframe", "object"}
    ids = [value for key, value in page.attributes if key == "id"]
    assert len(ids) == len(set(ids))


def test_the_same_runs_give_the_same_bytes(finished, tmp_path):
    out = write_report([finished], tmp_path / "again.html")
    assert out.read_bytes() == (finished / "report.html").read_bytes()
    assert (tmp_path / "plane.png").read_bytes() == (finished / "plane.png").read_bytes()


def test_a_report_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    out = tmp_path / "report.html"
    report.write(out, b"old")

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", fail)
    with pytest.raises(UserError, match=r"report\.html: cannot be written \(No space left on device\)"):
        report.write(out, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"] and out.read_text() == "old"


def test_without_evaluation_sets_there_is_knowledge_accumulation_only(tmp_path):
    run = make_run(tmp_path / "run", roles={"photos": "adaptation"})
    text = write_report([run]).read_text()
    assert "n/a → n/a" in text and Page(text).rows[0][:3] == ["update", "KA", "steps"]
    assert len(figure_of(report.scores_figure, group_runs([read_run(run)])).axes) == 1


def test_the_plane_is_a_picture_of_the_kind_that_its_name_says(finished, tmp_path):
    runs = [read_run(finished)]
    plane(runs, tmp_path / "plane.PNG")
    plane(runs, tmp_path / "plane.svg")
    assert (tmp_path / "plane.PNG").read_bytes().startswith(PNG)
    svg = (tmp_path / "plane.svg").read_text()
    assert "untouched model" in svg and "http://purl.org" not in svg  # no metadata, so no date
    with pytest.raises(UserError, match=r"accepted: \.png, \.svg"):
        plane(runs, tmp_path / "plane.pdf")


@pytest.mark.parametrize("draw", [report.plane_figure, report.scores_figure])
def test_labels_do_not_overlap(tmp_path, draw):
    names = ["merge", "finetune", "lora", "ewc", "distill", "bitfit"]
    groups = group_runs([read_run(make_run(tmp_path / name, name=name)) for name in names])
    for axes in figure_of(draw, groups).axes:
        labels = [text for text in axes.texts if text.get_text()]
        assert len(labels) >= len(names)
        boxes = [matplotlib.text.Text.get_window_extent(label).padded(-1) for label in labels]
        assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
