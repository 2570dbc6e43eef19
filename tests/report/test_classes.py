"""What a report says of classes and single pictures, from what a run has kept of its first and last evaluation."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from run_folders import groups_of, make_run
from small_runs import picture

from fomo.errors import UserError
from fomo.report.classes import SHOWN, Taken, classes_table, confusions_table, taken, thumbnails
from fomo.report.columns import as_rows, folded
from fomo.report.page import report_run, write_report
from fomo.text import plural

NAMES = ["cat", "dog", "<b>owl</b>"]


def photos(folder: Path, labels: list[int], before: list[int], after: list[int], **how) -> Path:
    """A run of one update on pictures of NAMES that were taken for `before` and are taken for `after`."""
    run = make_run(folder / "photos", updates=1, roles={"photos": "adaptation"}, **how)
    names = [f"{NAMES[label]}/{i}.png".replace("<b>owl</b>", "owl") for i, label in enumerate(labels)]
    for i, name in enumerate(names):
        picture(folder / "test" / name, i)
    entry = f"{{source: folder, test: {folder / 'test'}}}"
    (run / "data.yaml").write_text(f"adaptation: {{photos: {entry}}}")
    counts = np.bincount(labels, minlength=3)
    constants = json.loads((run / "run.json").read_text())
    constants |= {"classes": {"photos": NAMES}, "tasks": {"photos": "classification"}}
    constants |= {"tested": {"photos": counts.tolist()}}
    (run / "run.json").write_text(json.dumps(constants))
    concepts, predictions = [], []
    for update, predicted in enumerate((before, after)):
        found = np.bincount([a for a, b in zip(labels, predicted, strict=True) if a == b], minlength=3)
        share = [
            100 * hits / n if n else None for hits, n in zip(found.tolist(), counts.tolist(), strict=True)
        ]
        concepts.append({"update": update, "datasets": {"photos": share}})
        kept = {"pictures": names, "labels": labels, "predicted": predicted}
        predictions.append({"update": update, "datasets": {"photos": kept}})
    for file, lines in (("concepts", concepts), ("predictions", predictions)):
        (run / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


@pytest.fixture
def run(tmp_path) -> Path:
    return photos(tmp_path, [0, 0, 1, 1, 1, 2], before=[0, 1, 0, 0, 1, 1], after=[1, 1, 1, 0, 0, 2])


def test_classes_are_sorted_by_change_with_the_number_of_their_pictures(run):
    assert as_rows(classes_table(*groups_of(run))) == [
        ["class", "n", "before", "after", "change"],
        ["<b>owl</b>", "1", "0.0", "100.0", "+100.0"],
        ["dog", "3", "33.3", "33.3", "+0.0"],
        ["cat", "2", "50.0", "0.0", "-50.0"],
    ]


def test_classes_without_a_test_picture_are_counted(tmp_path):
    run = photos(tmp_path, [0, 0, 2], before=[0, 1, 1], after=[1, 1, 2])
    assert [row[0] for row in as_rows(classes_table(*groups_of(run)))[1:]] == ["<b>owl</b>", "cat"]
    assert "1 class has no test picture." in write_report([run]).read_text()


def test_confusions_that_grew_are_counted_and_those_that_shrank_are_not(run):
    assert as_rows(confusions_table(taken(*groups_of(run)[0].records))) == [
        ["class", "taken for", "before", "after"],
        ["cat", "dog", "1", "2"],
    ]


def test_pictures_won_and_lost_are_on_the_page_with_what_they_are_taken_for(run):
    text = write_report([run]).read_text()
    said = re.findall(r'src="data:image/jpeg;base64,[\w+/=]+" alt=""><figcaption>([^<]+)<', text)
    assert said == ["dog, was cat", "&lt;b&gt;owl&lt;/b&gt;, was dog", "cat, now dog", "dog, now cat"]
    assert "<h3>Won: 2 pictures</h3>" in text and "<h3>Lost: 2 pictures</h3>" in text
    assert "KA: accuracy on 3 classes of photos, 1 to 3 held-out pictures each." in text


def test_a_few_of_many_pictures_are_shown_small_and_their_number_is_said(tmp_path):
    run = photos(tmp_path, [0] * 100, before=[1] * 100, after=[0] * 100)
    for file in (tmp_path / "test/cat").iterdir():
        Image.new("RGB", (3000, 40)).save(file)
    text = write_report([run]).read_text()
    assert text.count("<figcaption>") == SHOWN and f"Won: 100 pictures, {SHOWN} of them" in text
    assert "Lost" not in text and len(text) < 100_000


@pytest.mark.parametrize("what", ["folder", "data file", "one picture", "a broken picture", "another set"])
def test_of_pictures_that_are_gone_the_page_says_so_and_goes_on(run, what):
    data = run / "data.yaml"
    if what == "folder":
        shutil.rmtree(run.parent / "test")
    elif what == "data file":
        data.unlink()
    elif what == "another set":
        data.write_text(data.read_text().replace("photos", "others"))
    elif what == "one picture":
        (run.parent / "test/dog/2.png").unlink()
    else:
        (run.parent / "test/dog/2.png").write_bytes(b"no picture")
    text = write_report([run]).read_text()
    gone = 1 if "picture" in what else 4
    assert f"{plural(gone, 'picture')} cannot be opened any more where data.yaml says." in text
    assert text.count("<figcaption>") == 4 - gone and "confusions that grew most" in text


@pytest.mark.parametrize("name", ["concepts.jsonl", "predictions.jsonl"])
def test_a_damaged_file_is_named_in_one_line(run, name):
    (run / name).write_text('{"update": 0\n' + (run / name).read_text())
    with pytest.raises(UserError, match=rf"{name}: line 1 is not JSON"):
        write_report([run])


def test_a_set_that_has_changed_on_the_way_has_no_pictures(run):
    first, last = (run / "predictions.jsonl").read_text().splitlines()
    (run / "predictions.jsonl").write_text(first.replace("dog/2", "dog/9") + "\n" + last + "\n")
    text = write_report([run]).read_text()
    assert "<img" not in text and "photos: classes" in text


@pytest.mark.parametrize("missing", ["predictions.jsonl", "concepts.jsonl"])
def test_older_and_unfinished_runs_are_reported_without(run, missing):
    (run / missing).unlink()
    assert "photos: updates" in write_report([run]).read_text()
    (run / "run.json").write_text(json.dumps({"roles": {"photos": "adaptation"}}))
    (run / "predictions.jsonl").unlink(missing_ok=True)
    text = write_report([run]).read_text()
    assert "classes" not in text and "<img" not in text


def test_that_a_set_is_too_large_for_its_pictures_to_be_kept_is_said(run):
    (run / "predictions.jsonl").unlink()
    assert "Of photos too many pictures are scored to keep what" in write_report([run]).read_text()


def test_seeds_are_a_mean_with_spread_and_several_runs_have_no_pictures(tmp_path):
    folders = [
        photos(tmp_path / f"seed{seed}", [0, 1], before=[1, 1], after=[0, seed], seed=seed) for seed in (0, 1)
    ]
    rows = as_rows(classes_table(*groups_of(*folders)))
    assert rows[1:3] == [["cat", "1", "0.0 ± 0.0", "100.0 ± 0.0", "+100.0 ± 0.0"], rows[2]]
    assert rows[2][3:] == ["50.0 ± 70.7", "-50.0 ± 70.7"]
    folders.append(make_run(tmp_path / "other", name="finetune"))
    text = write_report(folders).read_text()
    assert "<img" not in text and ">dog<" in text


@pytest.mark.parametrize(("count", "between"), [(3, 0), (41, 0), (42, 2), (18_381, 18_341)])
def test_a_long_table_is_folded_and_says_how_many_rows_are_left_out(count, between):
    rows = [["class", "n"], *([str(i), "1"] for i in range(count))]
    short = folded(rows, 20)
    assert short[0] == rows[0] and short[1] == rows[1] and short[-1] == rows[-1]
    assert [row for row in short if "between" in row[0]] == (
        [[f"… {between:,} between …", ""]] if between else []
    )
    assert len(short) == (42 if between else len(rows)) and all(len(row) == 2 for row in short)


def test_the_last_lines_say_what_the_number_is_and_where_the_model_is(run):
    first, *others = report_run(run).splitlines()
    assert re.fullmatch(
        r"KA [\d.]+ -> [\d.]+ in 1 update: accuracy on 3 classes of photos, 1 to 3 held-out pictures each",
        first,
    )
    assert others == [f"model: {run / 'model'}", f"report: {run / 'report.html'}"]


def test_pictures_of_a_period_are_found_in_its_set(tmp_path):
    for name in "ab":
        picture(tmp_path / f"{name}.png", ord(name))
    (tmp_path / "shop.csv").write_text("filepath,label,date\na.png,ant,2023\nb.png,bee,2024\n")
    shop = "{source: csv, train: shop.csv, test: shop.csv, caption: null, concept: label, date: date}"
    (tmp_path / "data.yaml").write_text(f"adaptation: {{shop: {shop}}}")
    wanted = [
        Taken(f"shop/{year}", f"{name}.png", "ant", "bee", "ant") for year, name in ((2023, "a"), (2024, "b"))
    ]
    assert set(thumbnails(tmp_path / "data.yaml", wanted)) == set(wanted)
    assert not thumbnails(tmp_path / "data.yaml", [Taken("shop/2022", "a.png", "ant", "bee", "ant")])
