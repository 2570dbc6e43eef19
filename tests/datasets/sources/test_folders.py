"""Folders of classes, and one folder of pictures with captions."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fomo.datasets.sources.folders import Folder
from fomo.errors import UserError


def draw(path: Path, level: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (level,) * 3).save(path)


def classes(root: Path, *names: str) -> str:
    for n, name in enumerate(names):
        draw(root / name / "1.png", n)
    return str(root)


def test_class_folders_hold_pictures_at_any_depth(tmp_path):
    draw(tmp_path / "red_fox" / "2020" / "may" / "a.JPG", 10)
    draw(tmp_path / "red_fox" / "b.png", 20)
    draw(tmp_path / "cat" / "c.webp", 30)
    draw(tmp_path / ".hidden" / "d.png")
    draw(tmp_path / "cat" / "._e.png")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cat" / "notes.md").write_text("not a picture")
    source = Folder(str(tmp_path))
    assert source.classes == ["cat", "red fox"]
    assert source.labels.tolist() == [0, 1, 1]
    levels = [np.asarray(source.image(i)).mean() for i in range(3)]
    assert levels == pytest.approx([30, 10, 20], abs=2)
    assert source.captions(0) == [] and source.name_of(0).endswith("cat/c.webp")


def test_a_flat_folder_with_text_files_is_a_caption_set(tmp_path):
    draw(tmp_path / "1.png")
    draw(tmp_path / "2.png")
    (tmp_path / "1.txt").write_text("a cat\nsome cat\n\n")
    source = Folder(str(tmp_path))
    assert source.classes == [] and source.labels.tolist() == [-1, -1]
    assert [source.captions(i) for i in range(2)] == [["a cat", "some cat"], []]
    assert source.caption_counts().tolist() == [2, 0]


def test_pictures_beside_class_folders_are_counted_and_named(tmp_path):
    draw(tmp_path / "cat" / "1.png")
    draw(tmp_path / "stray.png")
    source = Folder(str(tmp_path))
    assert len(source) == 1
    assert "1 picture is in no class folder, first: stray.png" in source.notes[0]


def test_what_is_no_folder_of_pictures_is_one_clear_mistake(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        Folder(str(tmp_path / "gone"))
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="no pictures"):
        Folder(str(tmp_path))
    draw(tmp_path / "1.png")
    with pytest.raises(UserError, match="neither class folders nor"):
        Folder(str(tmp_path))


def test_two_folders_of_one_name_are_a_mistake(tmp_path):
    root = classes(tmp_path, "red_fox", "red fox")
    with pytest.raises(UserError, match=r"same name 'red fox': red fox, red_fox"):
        Folder(root)


def test_a_picture_that_changes_changes_the_key(tmp_path):
    root = classes(tmp_path, "ant", "cat")
    key = Folder(root).key()
    assert Folder(root).key() == key
    draw(tmp_path / "cat" / "2.png")
    assert Folder(root).key() != key


def test_the_level_of_the_classes_may_be_any_and_zero_is_none(tmp_path):
    for name in ("animals/cat", "animals/dog", "plants/rose"):
        draw(tmp_path / name / "1.png")
    assert Folder(str(tmp_path)).classes == ["animals", "plants"]
    assert (
        "pictures lie deeper than the class folders, first: animals/cat/1.png"
        in Folder(str(tmp_path)).notes[0]
    )
    source = Folder(str(tmp_path), level=2)
    assert source.classes == ["cat", "dog", "rose"] and source.notes == ()
    (tmp_path / "plants/rose/1.txt").write_text("a red rose")
    source = Folder(str(tmp_path), level=0)
    assert source.classes == [] and [source.captions(i) for i in range(3)] == [[], [], ["a red rose"]]


def test_files_that_are_no_pictures_are_counted_by_kind(tmp_path):
    root = classes(tmp_path, "ant", "cat")
    for name in ("ant/a.heic", "ant/b.HEIC", "cat/c.mov", "ant/1.txt", "Thumbs.db", ".hidden", "cat/noend"):
        (tmp_path / name).write_text("a caption")
    (note,) = Folder(root).notes
    assert note == "4 files skipped, of a kind that is not read here (.heic 2, .mov 1, noend 1)"
