"""Streams of periods: what a dated table becomes, what is refused, and a whole run with its children."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from fomo.datasets.datafile import read
from fomo.datasets.orders import Context, make_stream
from fomo.datasets.periods import count_updates, in_periods
from fomo.datasets.stream import concepts_of
from fomo.load_recipe import load
from fomo.recipe import Stream
from tests.datasets.inputs import draw, noise, one_line
from tests.datasets.inputs import table as write_table
from tests.small_runs import invoke, lines, recipe_of, run

KINDS = ("cat", "dog", "emu")


def shop(folder: Path, dates: list[str], name: str = "shop", **fields) -> Path:
    """A data file of a table with a picture of each kind for each date, half of the dates' pictures to test on."""
    rows = [["filepath", "label", "when", "part"]]
    for i, written in enumerate(dates):
        for j, kind in enumerate(KINDS):
            picture = draw(folder / f"{name}/{i}_{kind}.png", noise(len(KINDS) * i + j))
            rows.append([str(picture.relative_to(folder)), kind, written, ("train", "test")[i % 2]])
    write_table(folder / f"{name}.csv", rows)
    spec = {"source": "csv", "path": f"{name}.csv", "concept": "label", "caption": None, "date": "when"}
    return data_file(folder, {name: {**spec, "split_column": "part", **fields}}, name)


def data_file(folder: Path, adaptation: dict, name: str = "data") -> Path:
    (folder / f"{name}.yaml").write_text(yaml.safe_dump({"adaptation": adaptation}, sort_keys=False))
    return folder / f"{name}.yaml"


def twice(dates: list[str]) -> list[str]:
    """Each to learn from and to test on."""
    return [text for text in dates for _ in range(2)]


def days(file: Path) -> list[str]:
    return list(in_periods(read(file), "month").adaptation)


DAYS = twice(["2024-01-30", "2024-02-01T23:59:59+13:00", "2024/04/09", "20240630"])


@pytest.mark.parametrize(
    ("every", "periods"),
    [
        ("month", ["2024-01", "2024-02", "2024-04", "2024-06"]),
        ("quarter", ["2024-Q1", "2024-Q2"]),
        ("year", ["2024"]),
        (2, ["2024-01-30..2024-02-01", "2024-04-09..2024-06-30"]),
    ],
)
def test_each_period_is_a_set_with_its_pictures_and_all_classes_in_time_order(tmp_path, every, periods):
    data = in_periods(read(shop(tmp_path, DAYS[::-1])), every)
    assert list(data.adaptation) == [f"shop/{period}" for period in periods]
    assert count_updates(data) == len(periods)
    for split in ("train", "test"):
        opened = [entry.open(split) for entry in data.adaptation.values()]
        assert sum(map(len, opened)) == 12 and {len(part) for part in opened} == {12 // len(periods)}
        assert all(part.classes == list(KINDS) for part in opened)
        assert len({part.name_of(i) for part in opened for i in range(len(part))}) == 12
    context = Context(Stream(order="time", updates=len(periods), every=every), 0, data, load=None)
    stream = make_stream(concepts_of(data)[0], context)
    assert [{c.dataset for c in update} for update in stream] == [{f"shop/{period}"} for period in periods]


def test_years_as_numbers_and_as_what_is_left_of_them_among_missing_ones(tmp_path):
    file = shop(tmp_path, twice(["2021", "2019.0", "2020"]))
    assert list(in_periods(read(file), "year").adaptation) == ["shop/2019", "shop/2020", "shop/2021"]


def test_several_sets_share_their_periods_and_a_set_without_dates_is_of_its_year(tmp_path):
    one = yaml.safe_load(shop(tmp_path, twice(["2023-05", "2024-01"]), "one").read_text())["adaptation"]
    two = yaml.safe_load(shop(tmp_path, twice(["2024-02", "2025-01"]), "two").read_text())["adaptation"]
    drawn = {"source": "world", "domain": "flags", "train": 1, "test": 1, "year": 2024}
    data = in_periods(read(data_file(tmp_path, {**one, **two, "flags": drawn})), "year")
    assert list(data.adaptation) == ["one/2023", "one/2024", "two/2024", "flags/2024", "two/2025"]
    stream = make_stream(
        concepts_of(data)[0], Context(Stream(order="time", updates=3, every="year"), 0, data, load=None)
    )
    assert [len({c.dataset for c in update}) for update in stream] == [1, 3, 1]


def test_what_has_no_date_and_periods_that_lack_a_split_are_said(tmp_path, capsys):
    dates = ["2024-01", "2024-02", *twice(["2024-03"]), "spring", "", "2024", "2024"]
    data = in_periods(read(shop(tmp_path, dates)), "month")
    said = capsys.readouterr().err.splitlines()
    assert list(data.adaptation) == ["shop/2024-01", "shop/2024-02", "shop/2024-03"]
    assert count_updates(data) == 2 and data.adaptation["shop/2024-02"].open("train") is None
    assert [
        line.partition(f"{tmp_path}/shop.yaml: stream.every month: ")[2] for line in said if "every" in line
    ] == [
        "2 updates: 2024-01 (3 to learn from, 0 to test on), 2024-03 (3 to learn from, 3 to test on)",
        "1 period has no picture to learn from: no update of its own, but scored (2024-02)",
        "1 period has no picture to test on: learned, but not scored; fewer and longer periods, or a larger "
        "`holdout`, give each some (2024-01)",
        "adaptation.shop (train): 6 pictures are in no period and left out",
        "adaptation.shop (test): 6 pictures are in no period and left out",
    ]
    assert any(
        "(train): 3 pictures have no date that can be read, first: shop/4_cat.png ('spring')" in s
        for s in said
    )


@pytest.mark.parametrize(
    ("dates", "fields", "every", "expected"),
    [
        (twice(["2024"]), {}, "month", "no date says a month, the most exact is 2024; accepted: ISO 8601"),
        (
            twice(["2024"]),
            {},
            3,
            "stream.every: 3 parts need as many different dates, there is 1 different date",
        ),
        (
            ["May", ""],
            {},
            "year",
            "stream.every: no date says a year; accepted: ISO 8601",
        ),
        (
            twice(["2024"]),
            {"date": None},
            "year",
            "adaptation.shop: its pictures have no date; name its column",
        ),
        (twice(["2024"]), {"date": "day"}, "year", "no column 'day', it has: filepath, label, when, part"),
        (twice(["2024"]), {"period": "2024"}, "year", "adaptation.shop.period: is one period already"),
    ],
)
def test_what_makes_no_periods_is_refused_in_a_line(tmp_path, dates, fields, every, expected):
    assert expected in one_line(lambda: in_periods(read(shop(tmp_path, dates, **fields)), every))


def test_a_split_without_any_date_is_opened_all_the_same(tmp_path):
    file = shop(tmp_path, ["2024-01", "", "2024-02", "soon"])
    entry = read(file).adaptation["shop"]
    assert len(entry.open("train")) == len(entry.open("test")) == 6
    parts = in_periods(read(file), "month").adaptation.values()
    assert [(len(part.open("train")), part.open("test")) for part in parts] == [(3, None), (3, None)]


def test_an_entry_may_be_a_period_of_its_set(tmp_path):
    dates = twice(["2023-12", "2024-01", "2024-02"])
    for period, count in (("2024", 6), ("2024-Q1", 6), ("2024-02", 3), ("2023-12..2024-01", 6)):
        entry = read(shop(tmp_path, dates, period=period)).adaptation["shop"]
        assert len(entry.open("train")) == len(entry.open("test")) == count
    assert "no picture is of the period 2022" in one_line(
        read(shop(tmp_path, dates, period="2022")).adaptation["shop"].open, "train"
    )
    assert "period: got 'May', accepted: 2024, 2024-Q2" in one_line(read, shop(tmp_path, dates, period="May"))


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["stream.every=month"], "stream.every: makes updates in time order, say `order: time`, got random"),
        (["stream.every=week"], "stream.every: got 'week', accepted: year, quarter, month, or a number"),
        (["stream.every=0"], "stream.every: got 0, accepted: at least 1"),
        (["stream.every=month", "stream.per_dataset=true"], "stream.per_dataset: does not go together"),
        (["stream.every=month", "stream.file=x.json"], "stream.file: does not go together"),
        (
            ["stream.every=month", "stream.updates=7"],
            "command line: stream.updates: stream.every month makes 4 updates of ",
        ),
    ],
)
def test_fields_that_do_not_go_together(tmp_path, small_scale, overrides, expected):
    order = ["stream.order=time"] if len(overrides) > 1 else []
    made = {"scale": str(small_scale), "data": str(shop(tmp_path, DAYS))}
    assert expected in one_line(load, None, **made, overrides=order + overrides)


def test_the_number_of_updates_is_that_of_the_periods_whatever_the_scale_says(tmp_path, small_scale):
    file = shop(tmp_path, DAYS)
    recipe = recipe_of(
        small_scale, "stream.order=time", "stream.every=month", "evaluation.every=4", data=file
    )
    assert (recipe.stream.updates, recipe.evaluated_every, recipe.evaluation.every) == (4, 1, 4)
    assert recipe_of(small_scale, data=file).stream.updates == 3


@pytest.fixture(scope="module")
def finished(tmp_path_factory, small_scale) -> Path:
    folder = tmp_path_factory.mktemp("time")
    overrides = ["stream.order=time", "stream.every=month", "evaluation.every=4", "method={name: merge}"]
    run(recipe_of(small_scale, *overrides, data=shop(folder, DAYS)), folder / "run")
    return folder


def test_a_run_scores_each_period_after_each_update_and_ends_with_tics_numbers(finished):
    metrics = lines(finished / "run/metrics.jsonl")
    names = [f"shop/2024-{month}" for month in ("01", "02", "04", "06")]
    assert [line["update"] for line in metrics] == [0, 1, 2, 3, 4]
    assert all(list(line["datasets"]) == names for line in metrics)
    scores = np.array([[line["datasets"][name] for name in names] for line in metrics[1:]])
    below, above = np.tril_indices(4, -1), np.triu_indices(4, 1)
    expected = {"in_domain": scores.diagonal(), "backward": scores[below], "forward": scores[above]}
    assert metrics[-1]["tic"] == pytest.approx({kind: found.mean() for kind, found in expected.items()})
    assert not any("tic" in line for line in metrics[:-1])
    for line in metrics:
        assert line["ka"] == pytest.approx(np.mean(list(line["datasets"].values())))


def test_the_next_update_of_such_a_run_is_one_whatever_its_dates(finished):
    new = shop(finished, twice(["2024-07", "2024-08"]), "july")
    (finished / "shop.csv").write_text(  # the table has grown since
        (finished / "shop.csv").read_text() + "july/0_cat.png,cat,2024-07-01,train\n"
    )
    result = invoke("continue", finished / "run", "--data", new, "--out", finished / "child")
    assert result.exit_code == 0, result.output
    assert "in periods so far (stream.every); the new data is one update, whatever its dates" in result.output
    stream = json.loads((finished / "child/stream.json").read_text())["updates"]
    assert [{name for name, *_ in update} for update in stream] == [
        *({f"shop/2024-{month}"} for month in ("01", "02", "04", "06")),
        {"july"},
    ]
    (before, after) = lines(finished / "child/metrics.jsonl")
    parent = lines(finished / "run/metrics.jsonl")[-1]
    assert after["update"] == 5 and {**before["datasets"], "july": None} == {
        **parent["datasets"],
        "july": None,
    }
    assert invoke("continue", finished / "child", "--data", new, "--out", finished / "third").exit_code == 0


def test_data_check_and_a_dry_run_say_dates_and_periods(tmp_path, small_scale):
    file = shop(tmp_path, DAYS)
    checked = invoke("data", "check", file)
    assert checked.exit_code == 0
    assert "dated 2024-01-30 to 2024-06-30 (1 year, 2 quarters, 4 months)" in checked.output
    options = ["--scale", small_scale, "--data", file, "--set", "stream.every=quarter"]
    dry = invoke("update", *options, "--set", "stream.order=time", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "2 updates: 2024-Q1 (6 to learn from, 6 to test on), 2024-Q2 (6" in dry.output
    shown = invoke("stream", *options, "--order", "time")
    assert shown.exit_code == 0 and [row.split()[:3] for row in shown.output.splitlines()[-3:-1]] == [
        ["1", "3", "6"],
        ["2", "3", "6"],
    ]
