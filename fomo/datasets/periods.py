"""Data files in periods of time: what `stream.every` makes of the sets to learn, an update of each period.

A dated set `shop` becomes `shop/2024-05`, `shop/2024-06`, ...: each with the pictures of its period that the set
trains and tests on, and with all its classes. So all periods are scored after every update, and KA is their mean.
"""

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from fomo.datasets import datafile
from fomo.datasets.datafile import DataFile, Entry, write_once
from fomo.datasets.dates import ACCEPTED, equal_parts, periods_of, within
from fomo.errors import UserError
from fomo.recipe import Recipe
from fomo.text import plural, shortened

SHOWN = 12  # periods in a line
Dates = dict[str, dict[str, np.ndarray]]  # set -> split -> (n,) dates of its pictures


def read_for(recipe: Recipe, skip_bad: bool = False) -> DataFile:
    """A recipe's data file, in periods if its stream is."""
    data = datafile.read(recipe.data, skip_bad, recipe.chooses)
    return in_periods(data, recipe.stream.every) if recipe.stream.every else data


def in_periods(data: DataFile, every: str | int) -> DataFile:
    """With each set to learn cut into its periods, in time order; standard error says what comes of it."""
    for entry in data.adaptation.values():
        if "period" in entry.spec:
            problem = "is one period already, and stream.every would cut it again; leave one of the two out"
            raise UserError(f"{data.path}: {entry.where}.period: {problem}")
    dates = {name: entry.dates() for name, entry in data.adaptation.items()}
    periods = periods_in(data, dates, every)
    adaptation = {}
    for period in periods:
        for name, entry in data.adaptation.items():
            if any(within(known, period).any() for known in dates[name].values()):
                part = of_period(entry, period)
                adaptation[part.name] = part
    for line in told(data, dates, every, periods):
        write_once(line)
    return replace(data, adaptation=adaptation)


def periods_in(data: DataFile, dates: Dates, every: str | int) -> list[str]:
    """All periods that a picture to train or to test on is of, in time order."""
    known = np.concatenate([d for splits in dates.values() for d in splits.values()])
    known = known[known != ""]
    if isinstance(every, int):
        try:
            return equal_parts(known, every)
        except ValueError as error:
            raise UserError(f"{data.path}: stream.every: {error}") from None
    periods = periods_of(known, every)
    if not periods:
        exact = f", the most exact is {max(known, key=len)}" if len(known) else ""
        raise UserError(f"{data.path}: stream.every: no date says a {every}{exact}; accepted: {ACCEPTED}")
    return periods


def of_period(entry: Entry, period: str) -> Entry:
    return replace(entry, name=f"{entry.name}/{period}", spec={**entry.spec, "period": period})


def as_recorded(data: DataFile, names: Iterable[str]) -> DataFile:
    """With the periods of these names, whatever others its tables have grown by."""
    splits = [(data.adaptation[name.rpartition("/")[0]], name.rpartition("/")[2]) for name in names]
    parts = [of_period(entry, period) for entry, period in splits]
    return replace(data, adaptation={part.name: part for part in parts})


def count_updates(data: DataFile) -> int:
    """Periods that have something to learn, of a data file in periods."""
    entries = data.adaptation.values()
    return len({entry.spec["period"] for entry in entries if entry.open("train") is not None})


def told(data: DataFile, dates: Dates, every: str | int, periods: list[str]) -> Iterator[str]:
    """The periods with their pictures, and what is not as it should be."""
    counts = {
        period: {
            split: sum(int(within(d[split], period).sum()) for d in dates.values() if split in d)
            for split in ("train", "test")
        }
        for period in periods
    }
    learnt = [period for period in periods if counts[period]["train"]]
    shown = [f"{p} ({counts[p]['train']:,} to learn from, {counts[p]['test']:,} to test on)" for p in learnt]
    more = ", ..." * (len(shown) > SHOWN)
    where = f"{data.path}: stream.every {every}"
    yield f"{where}: {plural(len(learnt), 'update')}: {', '.join(shown[:SHOWN])}{more}"
    remedy = "fewer and longer periods, or a larger `holdout`, give each some"
    for lacking, what in (
        ("train", "no picture to learn from: no update of its own, but scored"),
        ("test", f"no picture to test on: learned, but not scored; {remedy}"),
    ):
        if found := [period for period in periods if not counts[period][lacking]]:
            yield f"{where}: {plural(len(found), 'period has', 'periods have')} {what} ({shortened(found)})"
    for name, splits in dates.items():
        for split, known in splits.items():
            outside = len(known) - sum(int(within(known, period).sum()) for period in periods)
            if outside:
                what = f"{plural(outside, 'picture is', 'pictures are')} in no period and left out"
                yield f"{where}: adaptation.{name} ({split}): {what}"
