"""Kill runs at all kinds of instants, resume them, and compare every bit with a run that was left alone.

    python tests/soak.py [--instants 25] [--changes 60] [--seed 0]

An instant is a moment in time, a change one of the run's changes to the file system (a file opened for writing, a
rename, a link, a removal), counted from its start. Every run has a cache folder of its own, so kills hit the
pretraining of the base model and the making of caches too. Runs are forked from a process that has imported
everything: starting Python would take three times as long as the run.
"""

import filecmp
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import click
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from conftest import SMALL_DATA, SMALL_SCALE  # noqa: E402
from small_runs import FORKS, Child  # noqa: E402

CHANGES = {"open", "os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"}
WRITES = os.O_WRONLY | os.O_RDWR
UNEQUAL = ("seconds", "peak_memory", "samples_per_second", "data_wait")  # of two runs of the same recipe
WORKERS = (0, 1, 3)


def update(scale: Path, place: Path, workers: int = 0) -> list[object]:
    """The arguments that begin the run in `place`, or go on with it."""
    settings = ["--set", "budget.steps=6", "--set", "evaluation.keeps=[0,0.5]", "--workers", workers]
    where = ["--scale", scale, "--out", place / "run", "--device", "cpu", "--resume"]
    return ["update", "--recipe", ROOT / "recipes/merge.yaml", *settings, *where]


# --- faults ----------------------------------------------------------------------------------------------


def kill_at_change(number: int, count) -> None:
    """SIGKILL just before a change to the file system; a file that is to get its name is cut, as if half written.

    `count`: shared memory, for how many there were.
    """
    own, temporary = os.getpid(), tempfile.gettempdir()

    def hook(event: str, arguments: tuple) -> None:
        if os.getpid() != own or event not in CHANGES:
            return
        if event == "open" and not (str(arguments[0]).startswith(temporary) and arguments[2] & WRITES):
            return
        count.value += 1
        if count.value == number:
            if event == "os.rename" and os.path.isfile(arguments[0]):
                os.truncate(arguments[0], os.path.getsize(arguments[0]) // 2)
            os.kill(own, signal.SIGKILL)

    sys.addaudithook(hook)


# --- comparing -------------------------------------------------------------------------------------------


def differing(a: Path, b: Path, training: bool = True) -> list[str]:
    """What is not the same, bit for bit, in two places of finished runs; `training`: their logs of it too."""
    logs = ["metrics.jsonl", "concepts.jsonl", "predictions.jsonl", *(["train.jsonl"] if training else [])]
    found = [name for name in logs if lines(a / "run" / name) != lines(b / "run" / name)]
    for part in ("run/weights", "run/model", "cache/models", "cache/pixels"):
        left, right = contents(a / part), contents(b / part)
        found += [f"{part}: {name}" for name in sorted(left ^ right)]
        same = filecmp.cmpfiles(a / part, b / part, left & right, shallow=False)[0]
        found += [f"{part}/{name}" for name in sorted((left & right) - set(same))]
    left, right = ended(a / "run/state"), ended(b / "run/state")
    if left.keys() != right.keys():
        found.append(f"updates kept: {sorted(left)}, {sorted(right)}")
    found += [f"state of {n}" for n in left.keys() & right.keys() if not equal(left[n], right[n])]
    return found + [str(path) for path in (b / "run").rglob("*") if path.suffix in (".part", ".old")]


def lines(path: Path) -> list[dict]:
    parsed = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in UNEQUAL} for line in parsed]


def contents(folder: Path) -> set[str]:
    """Files by name, without what a killed process left unfinished."""
    files = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {str(path) for path in files if not any(part.endswith(".part") for part in path.parts)}


def ended(state: Path) -> dict[str, dict]:
    """What training goes on from after each update."""
    states = {path.name.split("-")[0]: torch.load(path) for path in state.glob("update_*.pt")}
    return {n: {k: v for k, v in c.items() if k not in ("position", "logs")} for n, c in states.items()}


def equal(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a.equal(b) if isinstance(a, torch.Tensor) else a == b


# --- the soak --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kill:
    workers: int  # of the run that is killed
    after: int  # workers of the one that goes on
    seconds: float | None = None  # when; else at
    change: int = 0  # of the file system

    def survived(self, scale: Path, whole: Path, place: Path, count) -> tuple[str, list[str]] | None:
        """-> how far the killed run had come, and what differs in the end; None if it ended before the kill."""
        count.value = 0
        fault = partial(kill_at_change, self.change, count)
        child = Child(place, *update(scale, place, self.workers), fault=fault)
        status = child.kill_after(self.seconds) if self.seconds else child.end()
        if status == 0:
            return None
        assert status == 128 + signal.SIGKILL, child.log.read_text()
        reached = where(place)
        child = Child(place, *update(scale, place, self.after))
        if child.end():
            return reached, [child.log.read_text()[-500:]]
        return reached, differing(whole, place)


def where(place: Path) -> str:
    """How far a killed run had come."""
    if not contents(place / "cache/models"):
        return "base model"
    if not list((place / "run/state").glob("*-*.pt")):
        return "caches, first evaluation"
    scored = len((place / "run/metrics.jsonl").read_text().splitlines()) - 1
    return f"after {scored} of 3 updates"


def planned(instants: int, changes: int, seed: int, seconds: list[float], total: int) -> list[Kill]:
    """Instants drawn one in each of so many equal spans, and changes of the file system evenly spread."""
    draw, kills = random.Random(seed), []
    for i in range(instants):
        turn = i % len(WORKERS)
        at = seconds[turn] * (i + draw.random()) / instants
        kills.append(Kill(WORKERS[turn], WORKERS[turn - 1], seconds=at))
    return kills + [Kill(0, 0, change=1 + i * total // changes) for i in range(changes)]


@click.command()
@click.option("--instants", default=25, show_default=True)
@click.option("--changes", default=60, show_default=True, help="Of the file system.")
@click.option("--seed", default=0, show_default=True)
def main(instants, changes, seed):
    """Print a line per kill, then how many runs ended identical."""
    began, seconds, totals, identical = time.monotonic(), [], [], 0
    count = FORKS.RawValue("i", 0)
    Child.report = True
    with tempfile.TemporaryDirectory() as name:
        root, scale = Path(name), Path(name) / "small.yaml"
        (root / "data.yaml").write_text(SMALL_DATA)
        scale.write_text(SMALL_SCALE)
        Child(root / "none", "--help").end()  # starts the server
        for workers in WORKERS:
            start, count.value, place = time.monotonic(), 0, root / f"whole-{workers}"
            fault = partial(kill_at_change, 0, count)
            assert Child(place, *update(scale, place, workers), fault=fault).end() == 0, place
            totals.append(count.value)
            seconds.append(time.monotonic() - start)
            assert not differing(root / "whole-0", place), place
        kills = planned(instants, changes, seed, seconds, totals[0])
        for number, kill in enumerate(kills):
            place, result = root / f"kill-{number}", None
            while result is None:
                result = kill.survived(scale, root / "whole-0", place, count)
                shutil.rmtree(place)
                if result is None:  # the run ended before its kill
                    kill = replace(kill, seconds=0.9 * kill.seconds)
            reached, found = result
            identical += not found
            print(f"{kill}: killed {reached}: {found or 'identical'}", flush=True)
    spent = time.monotonic() - began
    print(
        f"{identical} of {len(kills)} killed runs ended identical; "
        f"{totals[0]} changes of the file system in a run; {spent:.0f} s"
    )
    sys.exit(identical != len(kills))


if __name__ == "__main__":
    main()
