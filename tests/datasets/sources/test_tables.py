"""open_clip's CSV and TSV files."""

import json
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from fomo.datasets.datafile import entry
from fomo.datasets.sources.parquet import Parquet
from fomo.datasets.sources.tables import Json, Table, Tsv
from fomo.errors import UserError


def table(folder: Path, text: str, name: str = "a.csv") -> str:
    (folder / "pics").mkdir(exist_ok=True)
    for level in range(4):
        Image.new("RGB", (8, 6), (level,) * 3).save(folder / "pics" / f"{level}.png")
    (folder / name).write_text(text, encoding="utf-8")
    return str(folder / name)


def test_rows_are_pictures_relative_to_the_file_with_captions(tmp_path):
    source = Table(
        table(tmp_path, 'filepath,title\npics/2.png,"two, it says"\npics/1.png, one \npics/0.png,\n')
    )
    assert [source.captions(i) for i in range(3)] == [["two, it says"], ["one"], []]
    assert [np.asarray(source.image(i)).max() for i in range(3)] == [2, 1, 0]
    assert source.classes == [] and source.labels.tolist() == [-1] * 3
    assert source.caption_counts().tolist() == [1, 1, 0]


def test_other_columns_a_tab_and_concepts(tmp_path):
    path = table(
        tmp_path, "file\ttext\tkind\npics/0.png\ta\tfox\npics/1.png\tb\tant\npics/2.png\tc\t\n", "a.tsv"
    )
    source = Tsv(path, image="file", caption="text", concept="kind")
    assert source.classes == ["ant", "fox"] and source.labels.tolist() == [1, 0, -1]
    alone = Table(path, image="file", caption=None, concept="kind", separator="\t")
    assert alone.captions(0) == [] and alone.classes == ["ant", "fox"]


@pytest.mark.parametrize(
    "rows",
    [
        "pics/0.png,a\npics/0.png,b\npics/1.png,c\n",
        "pics/0.png,a\npics/1.png,c\npics/0.png,b\n",
        "pics/0.png,a\n./pics/1.png,c\npics/../pics/0.png,b\npics/1.png,\n",
        "HERE/pics/0.png,a\npics/1.png,c\npics/0.png, a \npics/0.png,b\n",
    ],
)
def test_rows_of_one_picture_are_one_sample_wherever_they_stand(tmp_path, rows):
    rows = rows.replace("HERE", str(tmp_path))
    source = Table(table(tmp_path, f"filepath,title\n{rows}"))
    assert [source.captions(i) for i in range(len(source))] == [["a", "b"], ["c"]]
    assert [np.asarray(source.image(i)).max() for i in range(2)] == [0, 1]


def test_a_picture_has_the_class_of_the_first_row_that_has_one_and_others_are_noted(tmp_path):
    rows = "pics/0.png,a,\npics/1.png,b,ant\npics/0.png,c,fox\npics/1.png,d,fox\npics/1.png,e,ant\n"
    source = Table(table(tmp_path, f"filepath,title,kind\n{rows}"), concept="kind")
    assert source.classes == ["ant", "fox"] and source.labels.tolist() == [1, 0]
    (note,) = source.notes
    assert note.startswith("1 picture has rows of several classes, first: pics/1.png ('ant' and 'fox')")


def test_shuffled_rows_are_the_same_pictures_with_the_same_captions(tmp_path):
    rows = [f"pics/{n}.png,{word} {n}" for n in range(4) for word in ("a", "one", "some")]
    found = []
    for order in (range(12), np.random.default_rng(0).permutation(12)):
        source = Table(table(tmp_path, "\n".join(["filepath,title", *(rows[i] for i in order)])))
        found.append({source.id_of(i): sorted(source.captions(i)) for i in range(len(source))})
    assert found[0] == found[1] and len(found[0]) == 4


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("path,title\nx.png,a\n", ["no column 'filepath'", "it has: path, title"]),
        ("filepath,caption\nx.png,a\n", ["no column 'title'", "caption: null"]),
        ("filepath~title\nx.png~a\n", ["no column 'filepath'", "is the separator right?"]),
        ("filepath,title\n", ["no rows"]),
        ("filepath,title\n,a\n", ["row 1 has no filepath"]),
        ("", ["no column 'filepath'"]),
    ],
)
def test_mistakes_name_the_file_and_the_columns(tmp_path, text, expected):
    path = table(tmp_path, text)
    with pytest.raises(UserError) as error:
        Table(path)
    assert str(error.value).startswith(f"{path}: ")
    for part in expected:
        assert part in str(error.value)


def test_absent_and_binary_files_are_one_line(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        Table(str(tmp_path / "gone.csv"))
    (tmp_path / "b.csv").write_bytes(b"filepath,title\n\xff\xfe\x00,1\n")
    with pytest.raises(UserError, match="not a readable table"):
        Table(str(tmp_path / "b.csv"))
    with pytest.raises(UserError, match="one character"):
        Table(table(tmp_path, "filepath,title\n"), separator="::")


def test_a_caption_of_many_words_is_read(tmp_path):
    text = "word " * 60_000
    source = Table(table(tmp_path, f"filepath,title\npics/0.png,{text}\n"))
    assert source.captions(0) == [text.strip()]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_separator_is_found_and_spreadsheets_encodings_are_read(tmp_path, separator, encoding):
    text = "filepath,title\npics/0.png,ein roter Schuh für Zoë\npics/1.png,one".replace(",", separator)
    path = table(tmp_path, "")
    Path(path).write_text(text, encoding=encoding)
    assert [Table(path).captions(i) for i in range(2)] == [["ein roter Schuh für Zoë"], ["one"]]


def test_commas_in_captions_without_quotes_do_not_make_commas_the_separator(tmp_path):
    path = table(tmp_path, "filepath;title\npics/0.png;a, b, c\npics/1.png;d, e, f\n")
    assert Table(path).captions(1) == ["d, e, f"]


def test_a_name_stands_for_the_picture_that_ends_so(tmp_path):
    names = ["0", "C:\\data\\pics\\1.png", "/mnt/old/pics/2.png", "3.jpg"]
    path = table(tmp_path, "filepath,title\n" + "".join(f"{name},a {i}\n" for i, name in enumerate(names)))
    source = Table(path)
    assert [np.asarray(source.image(i)).max() for i in range(4)] == [0, 1, 2, 3]
    assert source.notes[0].startswith(
        f"4 pictures were found below {tmp_path} by the end of the path, first: pics/0.png"
    )
    (tmp_path / "more/pics").mkdir(parents=True)
    (tmp_path / "more/pics/2.png").write_bytes(b"x")
    with pytest.raises(UserError, match=r"2\.png may be more/pics/2\.png or pics/2\.png"):
        Table(path)


def test_a_composed_letter_finds_a_decomposed_name(tmp_path):
    path = table(tmp_path, "filepath,title\nZo\u00eb.png,a\n")
    Image.new("RGB", (8, 6), (7,) * 3).save(tmp_path / "pics" / "Zoe\u0308.png")
    assert np.asarray(Table(path).image(0)).max() == 7


def test_a_column_of_splits_gives_each_split_its_rows(tmp_path):
    rows = "pics/0.png,a,Train\npics/1.png,b,validation\npics/2.png,c,TEST\npics/3.png,d,Training\n"
    path = table(tmp_path, f"filepath,title,part\n{rows}")
    train, test = (Table(path, split_column="part", split=split) for split in ("train", "test"))
    assert [train.captions(i) for i in range(len(train))] == [["a"], ["d"]]
    assert [test.captions(i) for i in range(len(test))] == [["c"]]
    (note,) = Table(table(tmp_path, f"filepath,title,split\n{rows}")).notes
    assert note.startswith("the column 'split' (train 2, validation 1, test 1) is not used; to use it: ")
    path = table(tmp_path, f"filepath,title,part\n{rows}pics/1.png,e,fold3\n")
    with pytest.raises(UserError, match="'fold3' is no split, accepted: train, test, val"):
        Table(path, split_column="part")
    path = table(tmp_path, "filepath,title,part\npics/0.png,a,train\n")
    with pytest.raises(UserError, match="no row of test, it has: train"):
        Table(path, split_column="part", split="test")


def test_splits_of_a_column_agree_on_the_classes(tmp_path):
    rows = "pics/0.png,fox,train\npics/1.png,ant,test\npics/2.png,fox,test\n"
    path = table(tmp_path, f"filepath,label,split\n{rows}")
    spec = {"source": "csv", "path": path, "concept": "label", "caption": None, "split_column": "split"}
    made = entry("x", "adaptation", spec, tmp_path)
    train, test = made.open("train"), made.open("test")
    assert train.classes == test.classes == ["ant", "fox"]
    assert train.labels.tolist() == [1] and test.labels.tolist() == [0, 1]


def test_json_lines_lists_and_cocos_form(tmp_path):
    table(tmp_path, "")
    rows = [{"file_name": "pics/0.png", "text": ["a", "b"]}, {"file_name": "pics/1.png", "text": "c"}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "m.json").write_text(json.dumps(rows))
    for name in ("m.jsonl", "m.json"):
        source = Json(str(tmp_path / name))
        assert [source.captions(i) for i in range(2)] == [["a", "b"], ["c"]]
    images = [{"id": 7, "file_name": "0.png"}, {"id": 9, "file_name": "1.png"}]
    annotations = [
        {"image_id": 9, "caption": "x"},
        {"image_id": 7, "caption": "y"},
        {"image_id": 9, "caption": "z"},
    ]
    (tmp_path / "c.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    source = Json(str(tmp_path / "c.json"), caption="caption")
    assert {source.files[i]: source.captions(i) for i in range(2)} == {
        "pics/1.png": ["x", "z"],
        "pics/0.png": ["y"],
    }
    for text, expected in (
        ("{", "not a readable table"),
        ('{"a": 1}', "expected a list"),
        ("[1]", "expected a list"),
    ):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(UserError, match=expected):
            Json(str(tmp_path / "bad.json"))


@pytest.mark.parametrize("kind", ["csv", "json", "parquet"])
def test_a_column_of_dates_is_the_first_of_each_picture_and_what_cannot_be_read_is_counted(tmp_path, kind):
    table(tmp_path, "")
    cells = ["2024-05-17", "soon", "2024-05-18T01:00:00+09:00", "", "2023"]
    rows = [{"file": f"pics/{n}.png", "day": day} for n, day in zip((0, 1, 2, 3, 0), cells, strict=True)]
    path = tmp_path / f"d.{kind}"
    if kind == "csv":
        path.write_text("file,day\n" + "".join(f"{row['file']},{row['day']}\n" for row in rows))
    elif kind == "json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    source = {"csv": Table, "json": Json, "parquet": Parquet}[kind](
        str(path), image="file", caption=None, date="day"
    )
    assert source.dates.tolist() == ["2024-05-17", "", "2024-05-18", ""]
    assert source.notes == ("2 pictures have no date that can be read, first: pics/1.png ('soon')",)


def test_dates_of_parquet_and_json_are_times_and_numbers(tmp_path):
    table(tmp_path, "")
    days = [datetime(2024, 5, 17, 23, 59, tzinfo=timezone.utc), datetime(2023, 1, 2, tzinfo=timezone.utc)]
    for name, values in (("times", days), ("dates", [day.date() for day in days])):
        rows = [{"image": f"pics/{n}.png", "day": day} for n, day in enumerate(values)]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{name}.parquet")
        source = Parquet(str(tmp_path / f"{name}.parquet"), caption=None, date="day")
        assert source.dates.tolist() == ["2024-05-17", "2023-01-02"]
    rows = [{"file_name": f"pics/{n}.png", "year": year} for n, year in enumerate((2024, 2023.0, None))]
    (tmp_path / "y.json").write_text(json.dumps(rows))
    assert Json(str(tmp_path / "y.json"), caption=None, date="year").dates.tolist() == ["2024", "2023", ""]
