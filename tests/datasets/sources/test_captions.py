"""A `.txt` means the same wherever it lies: beside a picture in a folder or of a table, and in a shard."""

import numpy as np
import pytest

from fomo.datasets.sources.base import Part, Source, unread_texts
from fomo.datasets.sources.folders import Folder
from fomo.datasets.sources.tables import Table
from fomo.datasets.sources.webdataset import Webdataset
from tests.datasets.inputs import PNG, shard, table, write


@pytest.fixture(params=["folder", "shard", "table"])
def opened(request, tmp_path):
    """-> a function that puts a `.txt` of this content beside the picture, and opens the source."""

    def source(text: bytes, more: dict | None = None) -> Source:
        files = {"1.png": PNG, "1.txt": text, **(more or {})}
        if request.param == "shard":
            return Webdataset(shard(tmp_path / "a.tar", files))
        write(tmp_path / "pics", files)
        if request.param == "folder":
            return Folder(str(tmp_path / "pics"))
        rows = [[f"pics/{name}", ""] for name in files if name.endswith("png")]
        return Table(str(table(tmp_path / "a.csv", [["filepath", "title"], *rows])))

    return source


@pytest.mark.parametrize(
    ("text", "captions"),
    [
        ("a cat\na small cat\n", ["a cat", "a small cat"]),
        ("a cat\r\na small cat\r\n\r\n", ["a cat", "a small cat"]),
        ("  a cat \n\n\t\na cat", ["a cat"]),
        ("\ufeffa cat", ["a cat"]),  # the mark that some editors begin a file with
        ("a cat\u2028on a mat\x0band a dog\x85", ["a cat\u2028on a mat\x0band a dog"]),  # no ends of lines
        ("eine süße Katze\n猫", ["eine süße Katze", "猫"]),
    ],
)
def test_each_line_is_a_caption(opened, text, captions):
    assert opened(text.encode()).captions(0) == captions


def test_what_is_no_text_is_left_out_counted_and_named(opened):
    source = opened(b"\xff\xfe\xfa", {"2.png": PNG, "2.txt": b"a dog"})
    assert [source.captions(i) for i in range(2)] == [[], ["a dog"]]
    (line,) = (*source.notes, *unread_texts(source))
    assert line.startswith("1 texts cannot be read and are left out, first: ") and "1.txt" in line
    assert unread_texts(Part(source, np.array([0]))) == unread_texts(source)


@pytest.mark.parametrize("name", ["1.TXT", "1.Txt"])
def test_suffixes_of_texts_are_in_any_case(tmp_path, name):
    members = {"1.PNG": PNG, name: b"a cat"}
    assert Webdataset(shard(tmp_path / "a.tar", members)).captions(0) == ["a cat"]
    assert Folder(str(write(tmp_path / "pics", members))).captions(0) == ["a cat"]
    rows = [["filepath", "title"], ["pics/1.PNG", ""]]
    assert Table(str(table(tmp_path / "a.csv", rows))).captions(0) == ["a cat"]
