"""The learning rate over a whole life, as `python fomo.py schedule` prints and draws it. No data is needed.

    read_lives(recipes) -> Lifetime -> rates -> a CSV file, a table, a figure

T updates of N steps each.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from fomo.errors import UserError
from fomo.recipe import Recipe, load
from fomo.schedules import Schedule, learning_rate


@dataclass(frozen=True)
class Lifetime:
    """One schedule over all updates of a life."""

    label: str
    schedule: Schedule
    peak: float
    updates: int  # T
    steps: int  # N

    def rates(self, update: int, *, branch: bool = True) -> np.ndarray:
        """The learning rates of one update (from 0), (N,)."""
        known = self.schedule, self.peak, update
        return np.array([learning_rate(*known, n, self.steps, branch=branch) for n in range(self.steps)])


def read_lives(paths: list[str], steps: int | None, said: dict) -> list[Lifetime]:
    """A life per recipe, under what the command line `said` over it; `steps` instead of the budget's."""
    stems = [Path(path).stem for path in paths]
    labels = stems if len(set(stems)) == len(stems) else paths
    lives = []
    for label, path in zip(labels, paths, strict=True):
        recipe = load(path, **said)
        count = steps or steps_of(recipe, path)
        lives.append(Lifetime(label, recipe.schedule, recipe.optimizer.lr, recipe.stream.updates, count))
    return lives


def steps_of(recipe: Recipe, path: str) -> int:
    """N by the recipe's budget."""
    if recipe.budget.hours is not None:
        found = f"{recipe.budget.hours:g} hours are as many steps as the machine makes of them"
        raise UserError(f"{path}: budget.hours: {found}; say the steps per update with --steps N")
    if recipe.budget.gflops is None:
        return recipe.steps
    from fomo.budget import planned_steps, work_of  # brings torch

    try:
        return planned_steps(recipe, work_of(recipe), recipe.stream.updates)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def preview(lives: list[Lifetime], *, as_csv: bool = False, picture: str | None = None) -> str:
    """The text for standard output: every step as CSV, or a table; if only drawn, the picture's path."""
    if as_csv and len(lives) > 1:
        raise UserError(f"--csv: got {len(lives)} recipes, accepted: one, since its lines do not name them")
    if picture:
        from fomo.figures import schedule_figure, write_figure  # not at the top: figures draw a Lifetime

        write_figure(Path(picture), schedule_figure, lives)
    if as_csv:
        return csv_lines(lives[0])
    return picture or "\n\n".join(map(summary, lives))


def csv_lines(life: Lifetime) -> str:
    """Every step of the life; updates count from 1, steps from 0. The numbers are exact, as repr writes them."""
    rows = ((t, n, lr) for t in range(life.updates) for n, lr in enumerate(life.rates(t).tolist()))
    return "\n".join(["update,step,lr", *(f"{t + 1},{n},{lr!r}" for t, n, lr in rows)])


def summary(life: Lifetime) -> str:
    """A line per update."""
    schedule = life.schedule
    lines = [
        f"{life.label}: {schedule.name}, meta {schedule.meta}",
        "update  steps       peak       mean       last",
    ]
    for update in range(life.updates):
        rates = life.rates(update)
        three = "  ".join(f"{value:9.3g}" for value in (rates.max(), rates.mean(), rates[-1]))
        lines.append(f"{update + 1:6}  {life.steps:5,}  {three}")
    return "\n".join(lines)
