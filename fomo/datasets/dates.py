"""Dates of pictures, and the periods of time that a stream makes updates of (`stream.every`).

A date is a text, as exact as what it was read from: 2024, 2024-05 or 2024-05-17; "" where none is known. Such
texts sort as time does. A period is a text, too: 2024, 2024-Q2, 2024-05, or FIRST..LAST, the dates that it spans.
"""

import re
from datetime import date

import numpy as np

from fomo.text import plural

ACCEPTED = "ISO 8601 (2024-05-17, with or without a time of day; 2024-05), or years"
WRITTEN = re.compile(r"(\d{4})(?:\.0|([-/:.])(\d\d?)(?:\2(\d\d?)(?:[T ].*)?)?)?")
WITHOUT_DASHES = re.compile(r"(\d{4})(\d\d)(\d\d)(T.*)?")
PERIODS = {"year": r"\d{4}", "quarter": r"\d{4}-Q[1-4]", "month": r"\d{4}-\d\d"}  # of `stream.every`
SPAN = r"[\d-]+\.\.[\d-]+"


def date_of(value: object) -> str:
    """Of a cell, the year first: ISO 8601, or with slashes, colons (of EXIF) or dots. "" if it is none.

    The day is the one that is written there, whatever the time zone. `2024.0` is a year among missing ones.
    """
    text = WITHOUT_DASHES.sub(r"\1-\2-\3", "" if value is None else str(value).strip())
    match = WRITTEN.fullmatch(text)
    if not match:
        return ""
    year, _, month, day = match.groups()
    try:
        date(int(year), int(month or 1), int(day or 1))
    except ValueError:
        return ""
    return "-".join([year, *(f"{int(part):02d}" for part in (month, day) if part)])


def period_of(date: str, every: str) -> str:
    """The year, quarter or month of a date; "" if it is not that exact."""
    if every == "year":
        return date[:4]
    if len(date) < len("2024-05"):
        return ""
    return date[:7] if every == "month" else f"{date[:4]}-Q{(int(date[5:7]) + 2) // 3}"


def periods_of(dates: np.ndarray, every: str) -> list[str]:
    """All that some of the (n,) dates are in, in time order."""
    return sorted({period_of(text, every) for text in np.unique(dates).tolist()} - {""})


def is_period(text: str) -> bool:
    return any(re.fullmatch(form, text) for form in (*PERIODS.values(), SPAN))


def within(dates: np.ndarray, period: str) -> np.ndarray:
    """(n,) bool: which dates lie in the period."""
    first, dots, last = period.partition("..")
    if not dots:
        year, _, quarter = period.partition("-Q")
        first, last = (f"{year}-{3 * int(quarter) + k:02d}" for k in (-2, 0)) if quarter else (period, period)
        last += "~"  # comes after all texts that begin so
    return (dates >= first) & (dates <= last)


def equal_parts(dates: np.ndarray, count: int) -> list[str]:
    """`count` periods with about as many of the (n,) known dates each; those of one date stay together.

    Raises a ValueError where there are fewer different dates than that.
    """
    known, counts = np.unique(dates, return_counts=True)
    if len(known) < count:
        found = plural(len(known), "different date")
        raise ValueError(
            f"{count} parts need as many different dates, there {'is' if len(known) == 1 else 'are'} {found}"
        )
    before = np.cumsum(counts)  # dates up to each known one, itself included
    starts = [0]
    for part in range(1, count):
        done = before[starts[-1] - 1] if starts[-1] else 0
        wanted = done + (len(dates) - done) / (count - part + 1)
        nearest = 1 + int(abs(before - wanted).argmin())
        starts.append(min(max(nearest, starts[-1] + 1), len(known) - (count - part)))
    ends = [*starts[1:], len(known)]
    return [f"{known[a]}..{known[b - 1]}" for a, b in zip(starts, ends, strict=True)]


def spanned(dates: np.ndarray) -> str:
    """From when to when, and how many updates each kind of period would make; "" where no date is known."""
    known = np.unique(dates[dates != ""])
    if not len(known):
        return ""
    counts = {every: len(periods_of(known, every)) for every in PERIODS}
    periods = ", ".join(plural(count, every) for every, count in counts.items() if count)
    return f"dated {known[0]} to {known[-1]} ({periods})"
