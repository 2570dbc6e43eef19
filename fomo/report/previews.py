"""The learning rate over a whole life, as `python fomo.py schedule` prints and draws it. No data is needed.

    read_lives(recipes) -> RateCurve -> rates -> a CSV file, a table, a figure

T updates of N steps each.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import fmean

import torch

from fomo.clip import Clip
from fomo.datasets import datafile
from fomo.datasets.orders import Context, make_stream
from fomo.datasets.stream import Concept, composition, concepts_of, lines_of, summary, write_stream
from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.recipe import Recipe, Stream
from fomo.schedules import RateCurve


def stream_section(
    how: Stream, order: str | None, updates: int | None, reverse: bool, per_dataset: bool
) -> Stream:
    """The stream section of a recipe with what the command line says over it; an ORDER may be a stream file."""
    if order and order.endswith(".json"):
        how = replace(how, file=order)
    elif order:
        how = replace(how, order=order, file=None)
    how = replace(how, updates=how.updates if updates is None else updates)
    return replace(how, reverse=how.reverse or reverse, per_dataset=how.per_dataset or per_dataset)


def preview_stream(
    recipe: Recipe,
    how: Stream,
    model: Callable[[], Clip],
    device: torch.device,
    *,
    out: str | None = None,
    picture: str | None = None,
) -> str:
    """A stream of the recipe's data as a table; written as an official file and drawn if asked for.

    Orders that need no model open neither one nor any picture.
    """
    data = datafile.read(recipe.data)
    concepts, sizes = concepts_of(data)
    if how.per_dataset:
        how = replace(how, updates=len({c.dataset for c in concepts}))
    seed = recipe.seed if how.seed is None else how.seed

    def on_device() -> Clip:
        clip = model()
        clip.model.to(device)
        return clip

    stream = make_stream(concepts, Context(how, seed, data, on_device))
    if out:
        write_stream(out, lines_of([c for chunk in stream for c in chunk], data))
    if picture:
        plot_stream(stream, Path(picture))
    return summary(stream, {(c.dataset, c.label): n for c, n in zip(concepts, sizes, strict=True)})


def plot_stream(stream: list[list[Concept]], path: Path) -> None:
    """Which dataset feeds which update, as an image file."""
    from fomo.report.figures import (  # brings matplotlib, which training does not need
        stream_figure,
        write_figure,
    )

    write_figure(path, stream_figure, composition(stream))


def read_lives(paths: list[str], steps: int | None, said: dict) -> list[RateCurve]:
    """A life per recipe, under what the command line `said` over it; `steps` instead of the budget's."""
    stems = [Path(path).stem for path in paths]
    labels = stems if len(set(stems)) == len(stems) else paths
    lives = []
    for label, path in zip(labels, paths, strict=True):
        recipe = load(path, **said)
        count = steps or steps_of(recipe, path)
        lives.append(RateCurve(label, recipe.schedule, recipe.optimizer.lr, recipe.stream.updates, count))
    return lives


def steps_of(recipe: Recipe, path: str) -> int:
    """N by the recipe's budget."""
    if recipe.budget.hours is not None:
        found = f"{recipe.budget.hours:g} hours are as many steps as the machine makes of them"
        raise UserError(f"{path}: budget.hours: {found}; say the steps per update with --steps N")
    if recipe.budget.gflops is None:
        return recipe.steps
    from fomo.budget.mafs import planned_steps, work_of  # brings torch

    try:
        return planned_steps(recipe, work_of(recipe), recipe.stream.updates)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def preview_schedule(lives: list[RateCurve], *, as_csv: bool = False, picture: str | None = None) -> str:
    """The text for standard output: every step as CSV, or a table; if only drawn, the picture's path."""
    if as_csv and len(lives) > 1:
        raise UserError(f"--csv: got {len(lives)} recipes, accepted: one, since its lines do not name them")
    if picture:
        from fomo.report.figures import (  # not at the top: figures draw a RateCurve
            schedule_figure,
            write_figure,
        )

        write_figure(Path(picture), schedule_figure, lives)
    if as_csv:
        return csv_lines(lives[0])
    return picture or "\n\n".join(map(rates_table, lives))


def csv_lines(life: RateCurve) -> str:
    """Every step of the life; updates count from 1, steps from 0. The numbers are exact, as repr writes them."""
    rows = ((t, n, lr) for t in range(life.updates) for n, lr in enumerate(life.rates(t)))
    return "\n".join(["update,step,lr", *(f"{t + 1},{n},{lr!r}" for t, n, lr in rows)])


def rates_table(life: RateCurve) -> str:
    """A line per update."""
    schedule = life.schedule
    lines = [
        f"{life.label}: {schedule.name}, meta {schedule.meta}",
        "update  steps       peak       mean       last",
    ]
    for update in range(life.updates):
        rates = life.rates(update)
        three = "  ".join(f"{value:9.3g}" for value in (max(rates), fmean(rates), rates[-1]))
        lines.append(f"{update + 1:6}  {life.steps:5,}  {three}")
    return "\n".join(lines)
