"""The authors' layout, on their own info files with pictures drawn for the paths."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from fomo.datasets.sources.fomo_in_flux import FomoInFlux
from fomo.errors import UserError

INFO = Path(__file__).parents[4] / "shared" / "fomo_in_flux" / "info"
ENTRY = {"classname": None, "default_caption": None, "primer_caption": None, "target": 0}
ENTRY |= {"synthetic_caption": None, "synthetic_merged_caption": None}


def write(root: Path, name: str, content: dict | list) -> None:
    root.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(json.dumps(content))


def draw(folder: Path, files) -> None:
    for file in files:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 6)).save(folder / file)


@pytest.mark.skipif(not INFO.is_dir(), reason="the official info files are not here")
@pytest.mark.parametrize("place", [".", "info", "MONKEYS10"])
def test_official_files_open_wherever_they_lie(tmp_path, place):
    for split, size in (("train", 1097), ("test", 272)):
        entries = json.loads((INFO / f"MONKEYS10_{split}.json").read_text())
        draw(tmp_path / "MONKEYS10", list(entries)[:2])
        (tmp_path / place).mkdir(exist_ok=True)
        for name in (f"MONKEYS10_{split}.json", "MONKEYS10_classnames.json"):
            shutil.copy(INFO / name, tmp_path / place)
        source = FomoInFlux(str(tmp_path), "MONKEYS10", split)
        assert len(source) == size and len(source.classes) == 10
        for index, entry in enumerate(entries.values()):
            assert source.classes[source.labels[index]] == entry["classname"]
            assert source.captions(index) == entry["synthetic_merged_caption"]
        assert source.image(1).size == (8, 6)


@pytest.mark.skipif(not INFO.is_dir(), reason="the official info files are not here")
@pytest.mark.parametrize(
    ("folder", "captions", "classes"), [("FLICKR30K", 5, 0), ("FSCOCO", 1, 92), ("AI2DIAGRAMS", 1, 15)]
)
def test_official_retrieval_sets_and_sets_without_captions(tmp_path, folder, captions, classes):
    entries = json.loads((INFO / f"{folder}_test.json").read_text())
    draw(tmp_path / folder, list(entries)[:1])
    source = FomoInFlux(str(tmp_path), folder, "test", info=str(INFO))
    assert len(source) == len(entries)
    assert source.caption_counts().max() == captions and source.caption_counts().min() >= 1
    assert (len(source.classes) > 0) == (classes > 0)
    assert source.captions(0)[0] == next(
        c[0] if isinstance(c, list) else c
        for field in ("default_caption", "synthetic_merged_caption", "primer_caption")
        if (c := next(iter(entries.values()))[field])
    )


def test_the_default_caption_comes_first_then_the_merged_then_the_primer(tmp_path):
    entries = {
        "a.png": ENTRY | {"default_caption": "own", "synthetic_merged_caption": ["merged"]},
        "b.png": ENTRY | {"synthetic_merged_caption": ["merged", "again"], "primer_caption": "primer"},
        "c.png": ENTRY | {"default_caption": ["one", "two"]},
        "d.png": ENTRY | {"primer_caption": "primer", "synthetic_caption": ["never"]},
        "e.png": ENTRY,
    }
    write(tmp_path, "X_train.json", entries)
    draw(tmp_path / "X", entries)
    source = FomoInFlux(str(tmp_path), "X")
    captions = [source.captions(i) for i in range(5)]
    assert captions == [["own"], ["merged", "again"], ["one", "two"], ["primer"], []]
    assert source.classes == [] and source.labels.tolist() == [-1] * 5


def test_resized_copies_are_taken_where_they_are_unless_told_otherwise(tmp_path):
    write(tmp_path, "X_train.json", {"a/1.png": ENTRY})
    write(tmp_path, "X_train_224.json", {"X_train_224/1.png": ENTRY})
    draw(tmp_path / "X", ["a/1.png"])
    assert FomoInFlux(str(tmp_path), "X").name_of(0).endswith("X/a/1.png")
    draw(tmp_path / "X", ["X_train_224/1.png"])
    assert FomoInFlux(str(tmp_path), "X").name_of(0).endswith("X/X_train_224/1.png")
    assert FomoInFlux(str(tmp_path), "X", resized=False).name_of(0).endswith("X/a/1.png")


def test_mistakes_are_one_line(tmp_path):
    def message(**fields) -> str:
        with pytest.raises(UserError) as error:
            FomoInFlux(str(tmp_path), "X", **fields)
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "no X_train_224.json or X_train.json in" in message()
    write(tmp_path, "X_train.json", {"1.png": ENTRY | {"classname": "cat", "target": 3}})
    assert "its first picture is not under" in message()
    draw(tmp_path / "X", ["1.png"])
    write(tmp_path, "X_classnames.json", ["ant", "bee"])
    assert "label 3 has no name" in message() and "X_classnames.json has 2" in message()
    write(tmp_path, "X_train.json", {"1.png": {"caption": "x"}})
    assert "official form" in message()
    (tmp_path / "X_train.json").write_text("{")
    assert "not a readable JSON" in message()
