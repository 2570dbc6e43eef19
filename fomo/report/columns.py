"""The columns of a report's tables: in, rows of text for the page or CSV for the files beside it out.

A column holds texts, or Values: numbers of R runs, shown as their mean with the spread over the runs.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNKNOWN = "n/a"


@dataclass(frozen=True)
class Values:
    """A column of numbers."""

    rows: Sequence[np.ndarray]  # for each its runs' values, (R,); NaN where a run has none
    form: str = ".1f"

    @property
    def known(self) -> bool:
        return any(np.isfinite(row).any() for row in self.rows)

    def texts(self) -> list[str]:
        return [number(row, self.form) for row in self.rows]


Columns = Mapping[str, Sequence[str] | Values]  # title -> column


def number(of_runs: np.ndarray | float, form: str = ".1f") -> str:
    """The mean over runs (R,), with the spread if there are several; n/a where a run has no value."""
    values = np.atleast_1d(of_runs)
    if not np.isfinite(values).all():
        return UNKNOWN
    text = f"{values.mean():{form}}"
    return f"{text} ± {deviation(values):{form.lstrip('+')}}" if len(values) > 1 else text


def deviation(values: np.ndarray) -> np.ndarray:
    """Sample standard deviation over runs, (R, ...) -> (...); a single run has no spread."""
    return values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(values.shape[1:])


def as_rows(columns: Columns) -> list[list[str]]:
    """The titles, then a row of cells for each row; without the columns of which nothing is known."""
    texts = {
        title: list(column.texts() if isinstance(column, Values) else column)
        for title, column in columns.items()
    }
    known = {title: cells for title, cells in texts.items() if set(cells) != {UNKNOWN}}
    return [list(known), *map(list, zip(*known.values(), strict=True))]


def folded(rows: list[list[str]], ends: int) -> list[list[str]]:
    """A long table without its middle: the head, so many rows at either end, and how many are between."""
    left_out = len(rows) - 1 - 2 * ends
    if left_out < 2:
        return rows
    between = [f"… {left_out:,} between …", *[""] * (len(rows[0]) - 1)]
    return [*rows[: ends + 1], between, *rows[-ends:]]


def as_csv(columns: Columns) -> str:
    """The same columns as CSV, unrounded; of several runs the mean, and beside it its `sd`; unknown is empty."""
    plain: dict[str, Sequence] = {}
    for title, column in columns.items():
        if not isinstance(column, Values):
            plain[title] = column
        elif column.known:
            plain[title] = [cell(row.mean()) for row in column.rows]
            if any(len(row) > 1 for row in column.rows):
                plain[f"{title} sd"] = [cell(deviation(row)) if len(row) > 1 else "" for row in column.rows]
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows([list(plain), *zip(*plain.values(), strict=True)])
    return file.getvalue()


def cell(value: float) -> str:
    return f"{value:.10g}" if np.isfinite(value) else ""
