"""Own data in one line: what is found in a folder, what is held out for testing, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fomo.datasets.datafile import read
from fomo.datasets.infer import as_data_file, infer, write_inferred
from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.runs.lineage import start_run
from fomo.update import run_recipe
from tests.datasets.inputs import PNG, draw, noise, one_line, packed, samples, write
from tests.datasets.inputs import shard as write_shard
from tests.datasets.inputs import table as write_table


def class_folders(root: Path, classes: int, each: int, first: int = 0) -> Path:
    for c in range(classes):
        for n in range(first, first + each):
            draw(root / f"kind_{c}" / f"{n}.png", noise(1000 * c + n, 24, 24))
    return root


def shard(path: Path, count: int, **texts) -> Path:
    members = samples(count, **texts)
    return Path(write_shard(path, {f"{path.stem}{name}": content for name, content in members.items()}))


def table(path: Path, rows: list[list[str]], separator: str = ",") -> Path:
    """With a picture for each row."""
    for row in rows[1:]:
        draw(path.parent / row[0])
    return write_table(path, rows, separator)


def label(i: int) -> str:
    return str(i % 2)


def opened(path: Path, folder: Path):
    """-> the only entry of the inferred file, its training and its test pictures."""
    (entry,) = read(write_inferred(path, folder / "data.yaml")).adaptation.values()
    return entry, entry.open("train"), entry.open("test")


def names(source) -> set[str]:
    return {Path(source.name_of(i)).name for i in range(len(source))}


def test_class_folders_without_splits_give_a_tenth_of_every_class_for_testing(tmp_path):
    entry, train, test = opened(class_folders(tmp_path / "photos", 10, 20), tmp_path / "run")
    assert entry.name == "photos" and entry.spec["holdout"] == 0.1
    assert train.classes == test.classes == [f"kind {c}" for c in range(10)]
    assert len(train) + len(test) == 200 and 10 <= len(test) <= 40
    everything = [source.name_of(i) for source in (train, test) for i in range(len(source))]
    assert len(set(everything)) == 200
    assert (np.bincount(test.labels, minlength=10) >= 1).all()
    assert (np.bincount(train.labels, minlength=10) >= 10).all()
    assert test.prompts == ("a photo of a {}.",) and train.key() != test.key()
    assert (np.asarray(test.image(0)) == np.asarray(Image.open(test.name_of(0)))).all()


def test_over_many_pictures_a_tenth_is_a_tenth(tmp_path):
    rows = [[f"{i}.png", f"picture {i}"] for i in range(4000)]
    (tmp_path / "a.csv").write_text("\n".join(["filepath,title", *map(",".join, rows)]))
    _, train, test = opened(tmp_path / "a.csv", tmp_path / "run")
    assert abs(len(test) - 400) < 4 * (4000 * 0.1 * 0.9) ** 0.5  # binomial, four standard deviations
    assert len(train) + len(test) == 4000


def test_pictures_that_are_added_move_none_between_the_splits(tmp_path):
    photos = class_folders(tmp_path / "photos", 3, 60)
    _, train, test = opened(photos, tmp_path / "run")
    before = {(source is test, source.id_of(i)) for source in (train, test) for i in range(len(source))}
    class_folders(photos, 4, 60, first=60)
    photos = photos.rename(tmp_path / "elsewhere")
    _, train, test = opened(photos, tmp_path / "again")
    after = {(source is test, source.id_of(i)) for source in (train, test) for i in range(len(source))}
    assert before < after and len(after) == 3 * 120 + 60


def test_a_class_of_one_picture_is_only_learnt_and_one_of_two_is_in_both(tmp_path):
    draw(tmp_path / "photos" / "one" / "1.png")
    for n in range(2):
        draw(tmp_path / "photos" / "two" / f"{n}.png")
    _, train, test = opened(tmp_path / "photos", tmp_path / "run")
    assert [train.classes[n] for n in train.labels] == ["one", "two"]
    assert [test.classes[n] for n in test.labels] == ["two"]


@pytest.mark.parametrize("held", ["test", "val", "valid", "Validation"])
def test_splits_that_are_there_are_used(tmp_path, held):
    class_folders(tmp_path / "train", 2, 3)
    class_folders(tmp_path / held, 3, 1)
    (tmp_path / "docs").mkdir()
    entry, train, test = opened(tmp_path, tmp_path / "run")
    assert (len(train), len(test)) == (6, 3) and "holdout" not in entry.spec
    assert train.classes == test.classes == ["kind 0", "kind 1", "kind 2"]


def test_of_test_and_val_the_test_split_is_used_and_the_other_is_named(tmp_path):
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        class_folders(tmp_path / split, 2, count)
    _, _, test = opened(tmp_path, tmp_path / "run")
    assert len(test) == 2
    assert "# val is left out, the test split is test" in (tmp_path / "run/data.yaml").read_text()


def test_a_class_may_be_called_test(tmp_path):
    for name in ("test", "practice"):
        for n in range(4):
            draw(tmp_path / "photos" / name / f"{n}.png")
    _, train, _ = opened(tmp_path / "photos", tmp_path / "run")
    assert train.classes == ["practice", "test"]


def test_pictures_with_texts_are_a_caption_set_and_captions_that_say_nothing_are_counted(tmp_path, capsys):
    texts = ["a cat", "", "IMG_0003.JPG", "photos/4.png", "a file called 5.png", "a dog"]
    for n, text in enumerate(texts * 5):
        draw(tmp_path / "photos" / f"{n:02d}.png")
        if text:
            (tmp_path / "photos" / f"{n:02d}.txt").write_text(text)
    file = as_data_file(tmp_path / "photos", tmp_path / "run")
    (entry,) = read(file).adaptation.values()
    assert entry.task == "retrieval" and not entry.open("train").classes
    train = [entry.open("train").captions(i) for i in range(len(entry.open("train")))]
    told = capsys.readouterr().err
    assert f"{train.count([])} of {len(train)} have no caption, first: " in told
    paths = train.count(["IMG_0003.JPG"]) + train.count(["photos/4.png"])
    assert f"{paths} of {len(train)} have a caption that is only a file's path, first: " in told


@pytest.mark.parametrize(
    ("columns", "fields"),
    [
        (("filepath", "title"), {"image": "filepath", "caption": "title", "task": "retrieval"}),
        (("Image", "Text", "Category"), {"image": "Image", "caption": "Text", "concept": "Category"}),
        (("path", "id", "label"), {"image": "path", "caption": None, "concept": "label"}),
        (("file_name", "caption"), {"image": "file_name", "caption": "caption", "task": "retrieval"}),
    ],
)
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_tables_are_known_by_their_columns(tmp_path, columns, fields, suffix):
    rows = [[f"pics/{i}.png", f"text {i}", "ab"[i % 2]][: len(columns)] for i in range(30)]
    folder = tmp_path / "shop"
    path = table(folder / f"all.{suffix}", [list(columns), *rows], {"csv": ",", "tsv": "\t"}[suffix])
    for given, name in ((folder, "shop"), (path, "all")):
        spec = infer(given)[0]["adaptation"][name]
        assert spec == {"source": suffix, "train": str(path), "holdout": 0.1, **fields}
    _, train, test = opened(folder, tmp_path / "run")
    assert len(train) + len(test) == 30 and train.classes == (["a", "b"] if "concept" in fields else [])


@pytest.mark.parametrize(
    ("train", "test"),
    [("train", "test"), ("shop", "shop_test"), ("shop-train", "shop-val"), ("shop", "test")],
)
def test_tables_and_shards_named_test_or_val_are_the_test_split(tmp_path, train, test):
    rows = [["filepath", "title"], *([f"{i}.png", "a"] for i in range(3))]
    for name in (train, test, "other_test"):
        table(tmp_path / "tables" / f"{name}.csv", rows)
        shard(tmp_path / "shards" / f"{name}.tar", 3, txt=label)
    for path in (tmp_path / "tables" / f"{train}.csv", tmp_path / "shards" / f"{train}.tar"):
        (spec,) = infer(path)[0]["adaptation"].values()
        assert spec["train"] == str(path) and spec["test"] == str(path.with_stem(test))


def test_a_folder_of_shards_is_all_of_them_with_names_by_label_or_captions(tmp_path):
    for n in range(3):
        shard(tmp_path / "set" / f"train-{n:03d}.tar", 4, cls=label)
    shard(tmp_path / "set" / "val-000.tar", 2, cls=label)
    with pytest.raises(UserError, match=r"label 0 has no name: no classes\.txt beside the shard, no caption"):
        infer(tmp_path / "set")
    (tmp_path / "set" / "classes.txt").write_text("ant\nbee\n")
    entry, train, test = opened(tmp_path / "set", tmp_path / "run")
    assert train.classes == ["ant", "bee"] and (len(train), len(test)) == (12, 2)
    assert len(entry.spec["train"]) == 3 and isinstance(entry.spec["test"], str)
    entry, train, test = opened(shard(tmp_path / "b" / "all.tar", 40, txt=label), tmp_path / "run")
    assert entry.task == "retrieval" and len(train) + len(test) == 40


CLASSES = {f"{name}/{n}.png": PNG for name in "ab" for n in range(2)}
ROWS, SHARD = "filepath,title\n1.png,a\n", packed(samples(2, txt=label))
MISTAKES = [
    ({"cat/notes.md": ""}, "nothing to learn from in it (it holds: .md 1), accepted: class folders"),
    ({"1.png": PNG}, "neither class folders nor a .txt with a caption beside a picture"),
    (
        {"a.csv": "name,price\nx,1\n"},
        "no column of pictures that are there, it has: name, price; accepted: filepath",
    ),
    ({"a.csv": b"filepath,\xff\xfe\n"}, "not a readable table"),
    ({"a.tar": SHARD, **CLASSES}, "more than one kind of data: webdataset (a.tar), folder (photos)"),
    ({"a.csv": ROWS, "b.csv": ROWS}, "more than one table: a.csv, b.csv; name the one"),
    (
        {"a.csv": ROWS, "a.tsv": ROWS.replace(",", "\t")},
        "more than one table: a.csv, a.tsv; name the one that is meant",
    ),
    (
        {"train/a/1.png": PNG, "test/0.tar": SHARD},
        "its splits hold different kinds of data: folder, webdataset",
    ),
    ({"test.tar": SHARD}, "only test files (test.tar)"),
    ({"test/a/1.png": PNG, **CLASSES}, "test/ holds class folders, but no train/ is beside it"),
    ({"train/a/1.png": PNG, "more/a/1.png": PNG}, "more/ is beside train/"),
    ({"a/1.png": PNG, "b/1.png": PNG}, "no class has two different pictures"),
    ({"a.tar": packed(samples(2))}, "neither classes nor captions"),
]


@pytest.mark.parametrize(("files", "expected"), MISTAKES, ids=[expected for _, expected in MISTAKES])
def test_what_cannot_be_inferred_is_one_line_and_nothing_is_written(tmp_path, files, expected):
    root = write(tmp_path / "photos", files)
    message = one_line(as_data_file, root, tmp_path / "run")
    assert expected in message and str(root) in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("gone", "no such file or folder"), ("a.zip", "a packed file; unpack it"), ("a.doc", "expected a data")],
)
def test_other_files_are_refused(tmp_path, name, expected):
    for file in ("a.zip", "a.doc"):
        (tmp_path / file).write_bytes(b"PK")
    with pytest.raises(UserError, match=expected):
        infer(tmp_path / name)


def test_the_file_is_plain_yaml_that_says_where_it_comes_from_and_writing_it_again_changes_nothing(tmp_path):
    photos = class_folders(tmp_path / "my photos #1: 'é'\n🎈", 2, 12)
    file = write_inferred(photos, tmp_path / "run" / "data.yaml")
    content = file.read_bytes()
    assert content.decode().startswith("# Inferred from ")
    assert yaml.safe_load(content) == infer(photos)[0]
    assert write_inferred(photos, file).read_bytes() == content
    assert [path.name for path in file.parent.iterdir()] == ["data.yaml"]


def test_200_pictures_and_batches_of_16_are_one_update(tmp_path, small_scale):
    photos = class_folders(tmp_path / "photos", 10, 20)
    file = as_data_file(photos, tmp_path)
    overrides = ["stream.updates=1", "optimizer.batch_size=16"]
    recipe = load(None, scale=str(small_scale), data=str(file), overrides=overrides)
    run_recipe(recipe, tmp_path / "run", resume=False, device="cpu")
    first, last = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert (first["update"], last["update"], last["samples"]) == (0, 1, 64)
    assert set(last["datasets"]) == {"photos"} and last["zs"] is None


def test_a_data_file_gets_the_settings_of_a_folder_unless_a_recipe_or_a_scale_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    photos = class_folders(tmp_path / "photos", 2, 24)
    (tmp_path / "shop.yaml").write_text("adaptation: {photos: {source: folder, train: photos}}")

    def settings(data, recipe=None, scale=None, overrides=()):
        how = {"scale": scale, "model": None, "seed": None, "overrides": overrides}
        found, _ = start_run(recipe, str(data), None, resume=False, dry_run=True, **how)
        return found.stream, found.budget, found.optimizer, found.method

    fitted = settings(photos)
    assert fitted[0].updates == 1 and 26 <= fitted[1].steps <= 29 and fitted[2].batch_size == 16
    assert settings("shop.yaml") == fitted
    assert settings("shop.yaml", overrides=("budget.steps=5",))[1].steps == 5
    guide = Path(__file__).parents[2] / "recipes" / "guide.yaml"
    for named in ({"recipe": guide}, {"scale": "tiny"}, {"overrides": ("scale=tiny",)}):
        assert settings("shop.yaml", **named)[0].updates == 20


def test_one_class_is_accepted_where_it_is_said(tmp_path):
    photos = class_folders(tmp_path / "photos", 1, 4)
    content, _ = infer(photos, one_class=True)
    assert content["adaptation"]["photos"]["one_class"] is True
    assert "one_class" not in infer(photos)[0]["adaptation"]["photos"]


@pytest.mark.parametrize(
    ("column", "cells", "found"),
    [
        ("date", ["2024-05-17", "2024-06-01"], "date"),
        ("Year", ["2023", "2024"], "Year"),
        ("created_at", ["2024-05-17T10:00:00Z", "2024-05-18 11:00:00"], "created_at"),
        ("time", ["12:30", "13:45"], None),
        ("date", ["17/05/2024", "18/05/2024"], None),
        ("when", ["2024-05-17", "2024-05-18"], None),
    ],
)
def test_a_column_of_dates_is_found_by_its_name_if_it_holds_dates(tmp_path, column, cells, found):
    rows = [["file", "label", column], *([f"{i}.png", label(i), cells[i % 2]] for i in range(12))]
    entry, train, _ = opened(table(tmp_path / "shop/a.csv", rows), tmp_path / "run")
    assert entry.spec.get("date") == found and train.classes == ["0", "1"]
    assert (train.dates is not None) == (found is not None)


def test_dates_are_not_taken_for_the_only_column_of_classes(tmp_path):
    rows = [["file", "sort", "date"], *([f"{i}.png", label(i), f"2024-0{1 + i % 3}"] for i in range(12))]
    entry, train, _ = opened(table(tmp_path / "shop/a.csv", rows), tmp_path / "run")
    assert (entry.spec["concept"], entry.spec["date"], train.classes) == ("sort", "date", ["0", "1"])


def test_dates_that_only_one_of_two_tables_has_are_not_used_and_said(tmp_path, capsys):
    rows = [["file", "label"], *([f"{i}.png", label(i)] for i in range(8))]
    table(tmp_path / "shop/test.csv", rows[:1] + [[f"t{name}", kind] for name, kind in rows[1:]])
    dated = [[*rows[0], "date"], *([*row, "2024-05"] for row in rows[1:])]
    table(tmp_path / "shop/train.csv", dated)
    file = as_data_file(tmp_path / "shop", tmp_path / "run")
    assert "dates are not used, only one split has the column date" in capsys.readouterr().err
    assert "date" not in read(file).adaptation["shop"].spec


def test_periods_share_the_pictures_and_so_the_passes(tmp_path):
    """160 pictures in four months: batches of a quarter of a month's, ten passes each."""
    rows = [["file", "label", "date"], *([f"{i}.png", label(i), f"2024-0{1 + i % 4}"] for i in range(160))]
    file, options = table(tmp_path / "shop/a.csv", rows), {"overrides": ["stream.order=time"]}
    whole, _ = start_run(None, str(file), str(tmp_path / "one"), resume=False, dry_run=True, **options)
    options["overrides"].append("stream.every=month")
    months, _ = start_run(None, str(file), str(tmp_path / "two"), resume=False, dry_run=True, **options)
    assert (whole.stream.updates, months.stream.updates) == (1, 4)
    assert (
        months.budget.steps * months.optimizer.batch_size
        < whole.budget.steps * whole.optimizer.batch_size / 3
    )
