"""Data as people have them: what is understood of each layout is what docs/data.md says, and never in silence."""

import re
from pathlib import Path

import pytest

from tests.datasets.layouts import LAYOUTS, understood

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
