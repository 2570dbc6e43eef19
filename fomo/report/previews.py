"""What `python fomo.py stream` and `python fomo.py schedule` print and draw: a run before anything is trained.

T updates of N steps each.
"""

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from statistics import fmean

import torch

from fomo.budget.mafs import planned_steps, work_of
from fomo.clip import Clip
from fomo.datasets.orders import Context, make_stream
from fomo.datasets.periods import read_for
from fomo.datasets.stream import Concept, composition, concepts_of, lines_of, summary, write_stream
from fomo.errors import UserError
from fomo.load_recipe import load
from fomo.recipe import Recipe, Stream
from fomo.report.figures import schedule_figure, stream_figure, write_figure
from fomo.schedules import RateCurve
from fomo.schema import build
from fomo.text import aligned

# --- stream ----------------------------------------------------------------------------------------------


def stream_section(
    how: Stream, order: str | None, updates: int | None, reverse: bool, per_dataset: bool
) -> Stream:
    """The stream section of a recipe with what the command line says over it; an ORDER may be a stream file."""
    if order and order.endswith(".json"):
        how = replace(how, file=order)
    elif order:
        how = replace(how, order=order, file=None)
    how = replace(how, updates=how.updates if updates is None else updates)
    how = replace(how, reverse=how.reverse or reverse, per_dataset=how.per_dataset or per_dataset)
    return build(Stream, asdict(how), "stream")  # checks what the command line says


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

    An order that needs no model opens neither it nor any picture.
    """
    data = read_for(recipe)
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
    write_figure(path, stream_figure, composition(stream))


# --- schedule --------------------------------------------------------------------------------------------


def rate_curves(paths: list[str], steps: int | None, options: dict) -> list[RateCurve]:
    """A curve per recipe, under the command line's options; `steps` instead of the budget's."""
    stems = [Path(path).stem for path in paths]
    labels = stems if len(set(stems)) == len(stems) else paths
    curves = []
    for label, path in zip(labels, paths, strict=True):
        recipe = load(path, **options)
        count = steps or steps_of(recipe, path)
        curves.append(RateCurve(label, recipe.schedule, recipe.optimizer.lr, recipe.stream.updates, count))
    return curves


def steps_of(recipe: Recipe, path: str) -> int:
    """N by the recipe's budget."""
    if recipe.budget.hours is not None:
        found = f"{recipe.budget.hours:g} h is as many steps as the machine makes of it"
        raise UserError(f"{path}: budget.hours: {found}; give the steps per update with --steps N")
    if recipe.budget.gflops is None:
        return recipe.steps
    try:
        return planned_steps(recipe, work_of(recipe), recipe.stream.updates)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def preview_schedule(curves: list[RateCurve], *, as_csv: bool = False, picture: str | None = None) -> str:
    """The text for standard output: every step as CSV, or a table; if only drawn, the picture's path."""
    if as_csv and len(curves) > 1:
        raise UserError(f"--csv: got {len(curves)} recipes, accepted: one, since its lines do not name them")
    if picture:
        write_figure(Path(picture), schedule_figure, curves)
    if as_csv:
        return csv_lines(curves[0])
    return picture or "\n\n".join(map(rates_table, curves))


def csv_lines(curve: RateCurve) -> str:
    """Every step; updates count from 1, steps from 0. The numbers are exact, as repr writes them."""
    rows = ((t, n, lr) for t in range(curve.updates) for n, lr in enumerate(curve.rates(t)))
    return "\n".join(["update,step,lr", *(f"{t + 1},{n},{lr!r}" for t, n, lr in rows)])


def rates_table(curve: RateCurve) -> str:
    """A line per update."""
    rows = [["update", "steps", "peak", "mean", "last"]]
    for update in range(curve.updates):
        rates = curve.rates(update)
        shown = [f"{value:.3g}" for value in (max(rates), fmean(rates), rates[-1])]
        rows.append([str(update + 1), f"{curve.steps:,}", *shown])
    return f"{curve.label}: {curve.schedule.name}, meta {curve.schedule.meta}\n{aligned(rows, left=0)}"
