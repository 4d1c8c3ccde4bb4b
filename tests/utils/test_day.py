"""Midnight of a day, as templates write it."""

import locale
from datetime import date, datetime

import pytest

from dora_mm.utils.day import Day, midnight

DAYS = (date(2026, 12, 1), date(2028, 2, 29), date(2031, 1, 5), date(1999, 12, 31))
DIRECTIVES = "aAbBcdfGHIjmMpSuUVwWxXyYzZ%"  # those that Python documents


@pytest.mark.parametrize("day", DAYS, ids=str)
def test_it_is_what_strftime_writes_in_the_c_locale(day):
    before = locale.setlocale(locale.LC_TIME)
    locale.setlocale(locale.LC_TIME, "C")
    try:
        for letter in DIRECTIVES:
            assert midnight(day, f"%{letter}") == datetime(day.year, day.month, day.day).strftime(f"%{letter}"), letter
    finally:
        locale.setlocale(locale.LC_TIME, before)


def test_it_depends_on_no_locale_and_no_time_zone(monkeypatch):
    """Names are its own, other text stays as it is, and seconds since 1970 are those of no time zone."""
    assert midnight(date(2027, 3, 1), "%A %d. %B 今日 100 %% %-d %^b %H:%M %OB %p") == (
        "Monday 01. March 今日 100 % 1 MAR 00:00 March AM"
    )
    assert midnight(date(1970, 1, 2), "%s %r %h") == "86400 12:00:00 AM Jan"
    assert midnight(date(2027, 3, 1), "%100000000d") == "%100000000d"  # no width


def test_a_day_that_was_not_filled_in_is_a_bug():
    with pytest.raises(AssertionError, match=r"model\.date was not filled in"):
        Day().request()
