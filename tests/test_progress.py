"""The progress of long work: a bar on a terminal, a line a minute in a file."""

import io
import sys

import pytest
import tqdm.std
from tqdm import tqdm as plain

from fomo.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch):
    """The seconds of tqdm's clock."""
    seconds = [1000.0]
    monkeypatch.setattr(tqdm.std, "time", lambda: seconds[0])
    return seconds


def told(monkeypatch, clock, file: io.StringIO, seconds: int, make=Progress) -> str:
    """What work of a second a step says, as our loops drive it: by steps, with scores, and with a warning."""
    monkeypatch.setattr(sys, "stderr", file)
    with make(total=seconds, unit="step") as bar:
        for step in range(seconds):
            clock[0] += 1
            bar.set_description(f"update {step // 50}")
            bar.set_postfix(KA=step)
            bar.update()
            if step == 5:
                plain.write("a warning", file=sys.stderr)
    return file.getvalue()


def test_in_a_file_there_is_a_line_a_minute(monkeypatch, clock):
    text = told(monkeypatch, clock, io.StringIO(), 200)
    first, *lines = text.splitlines()
    assert first == "a warning" and "\r" not in text and text.endswith("\n")
    assert len(lines) == 3 and "30%" in lines[0] and "update 1" in lines[0] and "| 59/200" in lines[0]


@pytest.mark.parametrize("seconds", [0, 10, 59])
def test_in_a_file_work_of_less_than_a_minute_says_nothing(monkeypatch, clock, seconds):
    assert told(monkeypatch, clock, io.StringIO(), seconds) == "a warning\n" * (seconds > 5)


def test_a_loop_over_the_bar_is_the_same(monkeypatch, clock):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    for _ in Progress(range(150), leave=False):
        clock[0] += 1
    assert len(file.getvalue().splitlines()) == 2 and "\r" not in file.getvalue()


def test_on_a_terminal_it_is_tqdms_own_bar(monkeypatch, clock):
    ours = told(monkeypatch, clock, Terminal(), 200)
    clock[0] = 1000.0
    assert ours == told(monkeypatch, clock, Terminal(), 200, make=plain) and ours.count("\r") > 100


def test_no_other_bar_is_made(pytestconfig):
    for path in (pytestconfig.rootpath / "fomo").rglob("*.py"):
        assert path.name == "progress.py" or "tqdm(" not in path.read_text(encoding="utf-8"), path
