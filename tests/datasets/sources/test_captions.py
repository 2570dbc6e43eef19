"""A `.txt` means the same wherever it lies: beside a picture in a folder or of a table, and in a shard."""

import pytest

from fomo.datasets.sources.base import Source
from fomo.datasets.sources.folders import Folder
from fomo.datasets.sources.tables import Table
from fomo.datasets.sources.webdataset import Webdataset
from tests.datasets.inputs import PNG, one_line, shard, table, write


@pytest.fixture(params=["folder", "shard", "table"])
def opened(request, tmp_path):
    """-> a function that puts a `.txt` of this content beside the picture, and opens the source."""

    def source(text: bytes) -> Source:
        files = {"1.png": PNG, "1.txt": text}
        if request.param == "shard":
            return Webdataset(shard(tmp_path / "a.tar", files))
        write(tmp_path / "pics", files)
        if request.param == "folder":
            return Folder(str(tmp_path / "pics"))
        return Table(str(table(tmp_path / "a.csv", [["filepath", "title"], ["pics/1.png", ""]])))

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


def test_what_is_no_text_is_a_mistake_that_names_the_file(opened):
    message = one_line(lambda: opened(b"\xff\xfe\xfa").captions(0))
    assert "1.txt" in message
