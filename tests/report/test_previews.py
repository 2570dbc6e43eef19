"""`fomo.py schedule` prints and draws what training follows; a few seconds.

python -m pytest tests/report/test_previews.py
"""

import csv
import io
import math
import runpy
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from fomo.budget.mafs import work_of
from fomo.load_recipe import load
from fomo.report.figures import schedule_figure
from fomo.schedules import RateCurve, Schedule

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def command():
    cli = runpy.run_path(str(ROOT / "fomo.py"))["cli"]
    return lambda *words: CliRunner().invoke(cli, ["schedule", *map(str, words)])


@pytest.fixture
def recipe(tmp_path, small_scale):
    """A recipe file of T = 3 updates of 4 steps at a peak of 0.01, with another schedule if asked for."""

    def write(stem="recipe", **schedule) -> Path:
        path = tmp_path / f"{stem}.yaml"
        path.write_text(f"scale: {small_scale}\nschedule: {schedule}\n")
        return path

    return write


def rows_of(text: str) -> list[dict]:
    return list(csv.DictReader(io.StringIO(text)))


def test_the_csv_has_every_step_and_ends_each_cosine_at_the_floor(command, recipe):
    result = command("--recipe", recipe(), "--csv", "--steps", 20)
    assert result.exit_code == 0 and result.stdout.startswith("update,step,lr\n1,0,")
    rows = rows_of(result.stdout)
    assert [(int(row["update"]), int(row["step"])) for row in rows] == [
        (t, n) for t in (1, 2, 3) for n in range(20)
    ]
    a, m, W = 1e-2, 1e-5, 2
    cosine = [m + (a - m) / 2 * (1 + math.cos(math.pi * (n - W + 1) / (20 - W))) for n in range(W, 20)]
    np.testing.assert_allclose([float(row["lr"]) for row in rows], [a / 2, a, *cosine] * 3, rtol=1e-12)


def test_the_steps_are_the_budgets_unless_the_option_gives_them(command, recipe):
    def count(*words):
        return len(rows_of(command("--recipe", recipe(), "--csv", *words).stdout))

    assert count() == 3 * 4
    assert count("--set", "budget.samples=121") == 3 * 10  # of 12 to a batch
    assert count("--set", "stream.updates=5", "--steps", 7) == 5 * 7


def test_a_budget_in_gflops_buys_the_steps_that_fomo_budget_counts(command, recipe):
    path = recipe()
    work, words = work_of(load(path)), ("--recipe", path, "--csv", "--set")
    plenty, little = 3 * 7.2 * work.mafs_per_step, 0.1 * work.mafs_per_step
    assert len(rows_of(command(*words, f"budget.gflops={plenty}").stdout)) == 3 * 7
    result = command(*words, f"budget.gflops={little}")
    assert result.exit_code == 2 and "budget.gflops" in result.output and "at least" in result.output


def test_hours_are_no_steps_until_a_machine_is_known(command, recipe):
    words = ("--recipe", recipe(), "--set", "budget.hours=1.5")
    result = command(*words)
    assert result.exit_code == 2 and "budget.hours: 1.5 h" in result.output and "--steps" in result.output
    assert command(*words, "--steps", 3).exit_code == 0


def test_the_table_has_a_line_per_update(command, recipe):
    first, second = recipe("first"), recipe("second", name="constant", warmup=0.0)
    result = command("--recipe", first, "--recipe", second)
    assert result.exit_code == 0
    one, other = result.stdout.split("\n\n")
    assert one.startswith("first: cosine, meta none\n")
    rows = [line.split() for line in other.splitlines()[2:]]
    assert rows == [[str(t), "4", "0.01", "0.01", "0.01"] for t in (1, 2, 3)]


def test_several_recipes_are_drawn_into_one_picture_with_their_names(command, recipe, tmp_path):
    words = ("--recipe", recipe("one"), "--recipe", recipe("two", meta="autoregressive"))
    path = tmp_path / "new" / "rates.svg"
    result = command(*words, "--plot", path)
    assert result.exit_code == 0 and result.stdout.strip() == str(path)
    assert ">one</text>" in path.read_text() and ">two</text>" in path.read_text()
    assert command(*words, "--plot", path.with_suffix(".png")).exit_code == 0
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_figure_shows_every_step_and_the_branches_of_an_infinite_schedule():
    schedule = Schedule("wsd", "infinite", warmup=0.1, cooldown=0.2)
    axes = schedule_figure([RateCurve("run", schedule, 1.0, updates=3, steps=10)]).axes[0]
    trunk, *branches = axes.lines
    assert trunk.get_ydata().tolist() == [1.0] * 30  # one warm-up of a single step, at the peak already
    assert np.allclose(trunk.get_xdata(), np.arange(1, 31) / 10)
    for update, branch in enumerate(branches):
        assert np.allclose(branch.get_xdata(), update + np.array([0.8, 0.9, 1.0]))
        assert np.allclose(branch.get_ydata(), [1, 0.5005, 0.001])  # halfway to the floor, and there
    assert len(branches) == 3


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--plot", "rates.pdf"], "--plot rates.pdf: expected a .png or .svg file"),
        (["--csv", "--recipe", ROOT / "recipes" / "merge.yaml"], "--csv: got 2 recipes, accepted: one"),
        (["--steps", "0"], "--steps"),
        (["--set", "schedule.meta=forever"], "schedule.meta: unknown 'forever'"),
        (["--recipe", "gone.yaml"], "gone.yaml"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(command, recipe, words, expected):
    result = command("--recipe", recipe(), *words)
    assert result.exit_code == 2 and expected in result.output
