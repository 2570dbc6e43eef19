"""Dates as tables have them, and periods: by hand, and with datetime as the judge."""

from datetime import date, timedelta

import numpy as np
import pytest

from fomo.datasets.dates import date_of, equal_parts, is_period, period_of, spanned, within


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (2024, "2024"),
        (2024.0, "2024"),  # years of a column that lacks some
        ("2024", "2024"),
        (" 2024-05 ", "2024-05"),
        ("2024-05-17", "2024-05-17"),
        ("2024-5-7", "2024-05-07"),
        ("2024-05-17T23:59:59", "2024-05-17"),
        ("2024-05-17 23:59:59.123456", "2024-05-17"),
        ("2024-05-31T23:30:00-05:00", "2024-05-31"),  # June in UTC: the day that is written
        ("2024-01-01T00:30:00+09:00", "2024-01-01"),
        ("2024-05-17T10:00:00Z", "2024-05-17"),
        ("20240517", "2024-05-17"),
        ("20240517T101500Z", "2024-05-17"),
        (20240517, "2024-05-17"),
        ("2024:05:17 10:00:00", "2024-05-17"),  # EXIF
        ("2024/05/17", "2024-05-17"),
        (date(2024, 5, 17), "2024-05-17"),
        ("2024-02-29", "2024-02-29"),
        *(
            (text, "")
            for text in ("2023-02-29", "2024-13", "2024-00-10", "0000", "spring 2024", "17.05.2024")
        ),
        *(
            (text, "")
            for text in ("05/17/2024", "2024-W20", "1715904000", "99", "2024-05/17", "", None, "nan", True)
        ),
    ],
)
def test_a_date_is_what_is_written_as_exact_as_it_is(written, read):
    assert date_of(written) == read


def test_every_day_is_in_the_year_quarter_and_month_that_datetime_says():
    days = [date(2023, 1, 1) + timedelta(days=n) for n in range(731)]
    for day in days:
        text = day.isoformat()
        assert period_of(text, "year") == str(day.year)
        assert period_of(text, "month") == f"{day:%Y-%m}"
        assert period_of(text, "quarter") == f"{day.year}-Q{(day.month - 1) // 3 + 1}"
    texts = np.array([day.isoformat() for day in days])
    assert within(texts, "2024-Q1").sum() == 31 + 29 + 31 and within(texts, "2023-02").sum() == 28
    assert within(texts, "2024").sum() == 366 and within(texts, "2023-12-30..2024-01-02").sum() == 4


def test_a_date_that_is_less_exact_than_the_periods_is_in_none():
    dates = np.array(["2024", "2024-05", "2024-05-17", ""])
    assert within(dates, "2024-05").tolist() == [False, True, True, False]
    assert within(dates, "2024-Q2").tolist() == [False, True, True, False]
    assert within(dates, "2024").tolist() == [True, True, True, False]
    assert period_of("", "year") == period_of("2024", "month") == ""
    assert spanned(dates) == "dated 2024 to 2024-05-17 (1 year, 1 quarter, 1 month)"
    assert spanned(np.array(["2023", "2025"])) == "dated 2023 to 2025 (2 years)"
    assert spanned(np.array([""])) == ""


@pytest.mark.parametrize("text", ["2024", "2024-Q4", "2024-05", "2024..2025", "2024-05-17..2024-06"])
def test_what_a_period_is(text):
    assert is_period(text)


@pytest.mark.parametrize("text", ["24", "2024-Q5", "2024-5", "May", "2024-05-17", "..", "2024-Q1..2024-Q2"])
def test_what_no_period_is(text):
    assert not is_period(text)


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ([1] * 12, ["01-01..01-04", "01-05..01-08", "01-09..01-12"]),
        ([8, 1, 1, 1, 1], ["01-01..01-01", "01-02..01-03", "01-04..01-05"]),
        ([1, 1, 10], ["01-01..01-01", "01-02..01-02", "01-03..01-03"]),
        ([4, 4, 4, 4, 4, 4], ["01-01..01-02", "01-03..01-04", "01-05..01-06"]),
    ],
)
def test_equal_parts_keep_a_day_together_and_leave_none_empty(counts, parts):
    dates = np.repeat([f"2024-01-{day:02d}" for day in range(1, len(counts) + 1)], counts)
    found = equal_parts(np.random.default_rng(0).permutation(dates), 3)
    assert [part.replace("2024-", "") for part in found] == parts
    assert sum(within(dates, part) for part in found).tolist() == [1] * len(dates)


def test_more_parts_than_dates_are_refused():
    with pytest.raises(ValueError, match="3 parts need as many different dates, there are 2"):
        equal_parts(np.array(["2024", "2024", "2025"]), 3)
