"""What all commands share: places, `~`, versions, and the cache that `data cache` tells of and empties."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import click
import pytest
import yaml
from small_runs import ROOT, Child, class_folders, command_line, invoke

from fomo.architectures import locate
from fomo.atomic import cache_root, lock_of
from fomo.cache_folder import KINDS
from fomo.load_recipe import load
from fomo.text import data_size, plural

PLACES = {"FILE", "DIR", "PATH", "RUN", "MODEL", "STUDY"}  # words of a metavar


def commands(group: click.Group) -> list[click.Command]:
    found = []
    for command in group.commands.values():
        found += commands(command) if isinstance(command, click.Group) else [command]
    return found


def test_every_place_on_the_command_line_is_of_the_one_type():
    context = click.Context(command_line())
    places = 0
    for command in commands(command_line()):
        for parameter in command.params:
            if PLACES & set(re.findall(r"[A-Z]+", parameter.make_metavar(context))):
                assert type(parameter.type).__name__ == "Place", (command.name, parameter.opts)
                places += 1
    assert places > 30


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_tilde_is_the_home_folder_in_options_arguments_and_overrides(home, small_scale):
    data = class_folders(home / "photos", ["cat", "dog"], 4)
    (home / "mine.yaml").write_text(f"scale: {small_scale}\nseed: 7\n")
    done = invoke("update", "--recipe", "~/mine.yaml", "--data", "~/photos", "--dry-run", "--out", "~/run")
    assert done.exit_code == 0 and "learns 2 concepts" in done.stdout, done.output
    checked = invoke("data", "check", "~/data.yaml", "--plot", "~/sheets")
    assert checked.exit_code == 2 and f"{home}/data.yaml" in checked.stderr
    listed = invoke("data", "list", "--root", "~/photos")
    assert listed.exit_code == 0 and not (home / "~").exists()
    for command in (["log"], ["report"], ["rollback", "--to", 1]):
        assert f"{home}/gone" in invoke(*command, "~/gone").stderr
    drawn = invoke("schedule", "--recipe", "~/mine.yaml", "--steps", 3, "--plot", "~/rates.svg")
    assert drawn.exit_code == 0 and (home / "rates.svg").exists(), drawn.output
    assert f"{home}/gone.pt" in invoke("merge", "--rule", "interpolate", "~/gone.pt", "-o", "~/o.pt").stderr
    assert f"{home}/m.pt" in invoke("eval", "--model", "~/m.pt", "--data", data).stderr
    assert locate("local-dir:~", None) == (None, home)
    recipe = load(home / "mine.yaml", overrides=["data=~/x.yaml", "stream.file=s.json"])
    assert recipe.data == f"{home}/x.yaml" and recipe.stream.file == f"{home}/s.json"


def test_variables_stay_as_they_are_on_the_command_line(home, monkeypatch):
    monkeypatch.setenv("PLACE", str(home))
    for text in ("$PLACE/gone", "${PLACE}/gone"):
        assert text in invoke("log", text).stderr


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["update", "--data", ""], "--data"),
        (["update", "--recipe", " "], "--recipe"),
        (["update", "--out", ""], "--out"),
        (["eval", "--model", ""], "--model"),
        (["continue", "", "--data", "x"], "RUN"),
        (["report", "a", ""], "RUN"),
        (["data", "check", ""], r"FILE\|DIR"),
        (["merge", "--rule", "slerp", "", "b", "-o", "c"], "MODEL"),
        (["stream", "-o", "", "--updates", 2], "-o"),
        (["budget", "--scale", ""], "--scale"),
    ],
)
def test_an_empty_place_is_one_line(home, arguments, named):
    done = invoke(*arguments)
    assert done.exit_code == 2 and not list(home.iterdir())
    assert re.fullmatch(rf"fomo: {named}: empty, accepted: \S+\n", done.stderr)


def test_the_version_says_what_a_report_of_a_fault_needs():
    done = invoke("--version")
    assert done.exit_code == 0 and f"torch {version('torch')}" in done.stdout
    assert re.match(r"fomo \d+\.\d+\.\d+ \(", done.stdout) and done.stdout.count("\n") == 1


# --- the cache -------------------------------------------------------------------------------------------


def where(**environment: str) -> str:
    """The cache's folder as a process with no other such variables has it."""
    known = {key: value for key, value in os.environ.items() if key not in ("FOMO_CACHE", "XDG_CACHE_HOME")}
    code = "from fomo.atomic import cache_root; print(cache_root())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**known, **environment}, capture_output=True, text=True
    )
    return done.stdout.strip()


def test_the_cache_is_where_the_first_of_three_says():
    assert where(HOME="/h") == "/h/.cache/fomo"
    assert where(HOME="/h", XDG_CACHE_HOME="/x") == "/x/fomo"
    assert where(HOME="/h", XDG_CACHE_HOME="x") == "/h/.cache/fomo"  # relative ones are to be ignored
    assert where(HOME="/h", XDG_CACHE_HOME="/x", FOMO_CACHE="~/c") == "/h/c"
    assert where(HOME="/h", XDG_CACHE_HOME="", FOMO_CACHE="") == "/h/.cache/fomo"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """One with something of three kinds, an unfinished one, and a user's own file in it."""
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    for name, size in (("pixels/a", 3 << 20), ("pixels/b", 1 << 20), ("models/c", 2048), ("budget/d", 10)):
        kind, letter = name.split("/")
        folder = cache_root() / kind / (20 * letter)
        folder.mkdir(parents=True)
        (folder / "content.bin").write_bytes(bytes(size))
    (cache_root() / "pixels" / f"{20 * 'e'}.part").mkdir()
    (cache_root() / "models" / "mine").mkdir()
    (cache_root() / "notes.txt").touch()
    return cache_root()


def left(cache: Path) -> set[str]:
    kinds = [folder for folder in cache.iterdir() if folder.is_dir() and folder.name != "locks"]
    return {path.name for folder in kinds for path in folder.iterdir()}


@pytest.mark.parametrize("arguments", [(), ("--size",)])
def test_data_cache_without_a_file_says_place_and_sizes(cache, arguments):
    done = invoke("data", "cache", *arguments)
    first, *rows = done.stdout.splitlines()
    assert done.exit_code == 0 and first.startswith(f"{cache}: 4.0 MB")
    told = {row.split()[0]: " ".join(row.split()[-3:]) for row in rows}
    assert told == {"pixels": "3 4.0 MB", "models": "1 2.0 kB", "budget": "1 0.0 kB"}


def test_clearing_removes_what_is_ours_and_says_how_much(cache):
    done = invoke("data", "cache", "--clear")
    assert done.stdout == f"{cache}: freed 4.0 MB (pixels 4.0 MB, models 2.0 kB, budget 0.0 kB)\n"
    assert left(cache) == {"mine"} and (cache / "notes.txt").exists()
    assert "freed 0.0 kB" in invoke("data", "cache", "--clear").stdout


def test_clearing_leaves_what_somebody_is_making(cache):
    with lock_of(cache / "models" / (20 * "c")), lock_of(cache / "pixels" / (20 * "e")):
        done = invoke("data", "cache", "--clear")
    assert left(cache) == {"mine", 20 * "c", f"{20 * 'e'}.part"}
    assert f"left, as other processes work with it: pixels/{20 * 'e'}.part, models/{20 * 'c'}" in done.stdout


def hold(path: Path) -> None:
    """Fault of a child: it reads pictures until the file is gone."""
    import time

    from fomo.cache_folder import hold_pixels

    hold_pixels()
    path.touch()
    while path.exists():
        time.sleep(0.01)


def test_clearing_leaves_the_pictures_that_a_run_reads(cache, tmp_path):
    from functools import partial

    reading = tmp_path / "reading"
    child = Child(tmp_path / "child", "--version", fault=partial(hold, reading), FOMO_CACHE=str(cache))
    while not reading.exists():
        assert child.process.is_alive()
    done = invoke("data", "cache", "--clear")
    assert left(cache) == {"mine", 20 * "a", 20 * "b", f"{20 * 'e'}.part"} and "models 2.0 kB" in done.stdout
    reading.unlink()
    assert child.end() == 0
    invoke("data", "cache", "--clear")
    assert left(cache) == {"mine"}


def test_a_run_after_clearing_makes_what_it_needs_again(small_scale, tmp_path, monkeypatch):
    monkeypatch.setenv("FOMO_CACHE", str(tmp_path / "cache"))
    make = ["data", "cache", small_scale.parent / "data.yaml", "--size", 32]
    assert invoke(*make).exit_code == 0
    made = left(tmp_path / "cache")
    assert "freed" in invoke("data", "cache", "--clear").stdout and not left(tmp_path / "cache")
    assert invoke(*make).exit_code == 0 and left(tmp_path / "cache") == made


@pytest.mark.parametrize("arguments", [("--size", 64), ("FILE", "--size"), ("FILE", "--clear")])
def test_what_data_cache_cannot_do_is_one_line(cache, arguments):
    done = invoke("data", "cache", *arguments)
    assert done.exit_code == 2 and done.stderr.startswith("fomo: --") and done.stderr.count("\n") == 1
    assert len(left(cache)) == 6


def test_every_kind_that_the_package_makes_is_listed():
    named = set()
    for path in (ROOT / "fomo").rglob("*.py"):
        named |= set(re.findall(r'cache_root\(\) / "(\w+)"', path.read_text(encoding="utf-8")))
    assert named - {"locks"} <= set(KINDS)


# --- words -----------------------------------------------------------------------------------------------


def test_one_is_singular():
    assert [plural(n, "update") for n in (0, 1, 2, 1000)] == [
        "0 updates",
        "1 update",
        "2 updates",
        "1,000 updates",
    ]
    assert (
        plural(1, "class is", "classes are") == "1 class is" and plural(3, "class", "classes") == "3 classes"
    )
    sizes = {0: "0.0 kB", 1536: "1.5 kB", 2**20: "1.0 MB", 5 * 2**30: "5.0 GB"}
    assert {size: data_size(size) for size in sizes} == sizes


def test_messages_of_one_thing_are_singular(small_scale, tmp_path):
    one = {"adaptation": {"flags": {"source": "world", "domain": "flags", "train": 6, "test": 4}}}
    (tmp_path / "one.yaml").write_text(yaml.safe_dump(one))
    done = invoke(
        "update",
        "--scale",
        small_scale,
        "--data",
        tmp_path / "one.yaml",
        "--dry-run",
        "--set",
        "stream.updates=1",
    )
    assert "in 1 update;" in done.stdout and "on 1 test set with" in done.stdout
    assert not re.search(r"\b1 \w+s\b", done.stdout.split("memory:")[0])
    assert json.loads(invoke("budget", "--methods", "finetune", "--updates", 1, "--json").stdout)
