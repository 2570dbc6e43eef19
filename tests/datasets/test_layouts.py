"""Data as people have them: what is understood of each layout is what docs/data.md says, and never in silence."""

import re
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.datasets.layouts import (
    LAYOUTS,
    number,
    parquet,
    picture,
    shard,
    understood,
    understood_files,
    word,
)

DOCS = Path(__file__).parents[2] / "docs" / "data.md"
ROWS = dict(re.findall(r"^\| (.+?) \| (.+) \|$", DOCS.read_text().replace("\\|", "¦"), re.MULTILINE))


@pytest.mark.parametrize("title", LAYOUTS)
def test_a_layout_is_understood_as_the_docs_say(title, tmp_path):
    text = understood(title, tmp_path)
    assert "Traceback" not in text and "; 1 class of" not in text
    assert text.startswith("refused: ") or "to learn from" in text
    assert text.replace(str(tmp_path), "").replace("|", "¦") == ROWS[title.replace("|", "¦")]


def test_the_table_has_at_least_forty_layouts():
    assert len(LAYOUTS) >= 40


NAMES = st.sampled_from(
    [
        "cat",
        "dog",
        "train",
        "test",
        "val",
        "images",
        "labels",
        "Annotations",
        "2024",
        "05",
        "00001",
        "ä b",
        "x.y",
    ]
)
CONTENTS = {
    ".jpg": [picture("a"), picture("b"), b"", b"\xff\xd8"],
    ".PNG": [picture("c")],
    ".heic": [b"x"],
    ".txt": ["a red thing", "0 0.1 0.2 0.3 0.4", "1.jpg cat", "image,caption\n1.jpg,a cat\n", b"\xff\xfe"],
    ".csv": [
        "filepath,label\n1.jpg,cat\n2.jpg,dog\n",
        "a;b\n1;2\n",
        "",
        "\n\n",
        b"\x00\xff",
        '"a\n',
        "file\n1.jpg\n",
    ],
    ".json": [
        "{",
        "[]",
        "[1]",
        '{"1.jpg": "cat"}',
        '[{"file_name": "1.jpg", "text": "a"}]',
        "NaN",
        "[" * 5000,
    ],
    ".jsonl": ['{"file_name": "1.jpg", "text": ["a", "b"]}\n{}', "null"],
    ".parquet": [b"PAR1", parquet(0, 3)],
    ".tar": [b"", shard(0, 3, txt=word), shard(0, 4, cls=number)],
    ".zip": [b"PK"],
    "": ["readme", b"\x00"],
}
OTHERS = [(suffix, content) for suffix in CONTENTS for content in CONTENTS[suffix]]
FILES = st.one_of(st.sampled_from([(".jpg", picture(name)) for name in "defgh"]), st.sampled_from(OTHERS))
TREES = st.dictionaries(
    st.tuples(st.lists(NAMES, max_size=3).map("/".join), st.sampled_from(["1", "2", "3", "labels", "train"])),
    FILES,
    max_size=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=TREES)
def test_any_folder_is_understood_or_refused_in_one_line(tree, tmp_path_factory):
    files = {f"{folder}/{name}{suffix}": content for (folder, name), (suffix, content) in tree.items()}
    names = {name.strip("/") for name in files}
    files = {
        name.strip("/"): content
        for name, content in files.items()
        if not any(other.startswith(f"{name.strip('/')}/") for other in names)
    }
    text = understood_files(files, folder=tmp_path_factory.mktemp("tree"))
    assert "; 1 class of" not in text and ("to learn from" in text or text.startswith("refused: "))
