"""A clock that stands where a test sets it, for all that reads the day."""

from datetime import date, datetime, timedelta

import pytest
from transformers.utils import chat_template_utils


class Clock:
    """The local day, and noon of it for templates that transformers would let read the clock.

    Args:
        monkeypatch: Puts the real clock back.
        day: The first day, in ISO format.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, day: str):
        clock = self
        self.day = date.fromisoformat(day)

        class SetDate(date):
            @classmethod
            def today(cls) -> date:
                return clock.day

        class SetTime(datetime):
            @classmethod
            def now(cls, tz: object = None) -> datetime:
                return datetime(clock.day.year, clock.day.month, clock.day.day, 12)

        monkeypatch.setattr("dora_mm.utils.day.date", SetDate)
        monkeypatch.setattr(chat_template_utils, "datetime", SetTime)

    def pass_days(self, count: int) -> None:
        self.day += timedelta(days=count)
