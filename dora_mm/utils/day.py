"""The date in chat templates: one for all that a run renders, never read from a clock while rendering."""

from __future__ import annotations

import calendar
import logging
import re
from dataclasses import dataclass
from datetime import date, datetime, time

log = logging.getLogger(__name__)
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)
DIRECTIVE = re.compile(r"%([-_0^#]?)[EO]?([A-Za-z%])")
COMPOSITES = {"c": "%a %b %e %H:%M:%S %Y", "x": "%m/%d/%y", "X": "%H:%M:%S", "r": "%I:%M:%S %p"}  # in the C locale


def today() -> str:
    """The local day, in ISO format. Nothing else reads the clock for the day of a run."""
    return date.today().isoformat()


@dataclass
class Day:
    """The day of all that a model renders.

    Attributes:
        date: In ISO format; None: no template may request it.
        num_requests: How often chat templates have requested it; all requests before a resumption count as one.
        source: The origin of the day, which is reported on the first request.
    """

    date: str | None = None
    num_requests: int = 0
    source: str = ""

    @property
    def recorded(self) -> str | None:
        """The day in ISO format, where a template has requested it; else None."""
        return self.date if self.num_requests else None

    def request(self) -> date:
        """The day, for a chat template."""
        assert self.date is not None, "a chat template asks for the day, and model.date was not filled in"
        if not self.num_requests and self.source:
            log.info("The chat template asks for the day: rows have %s, %s", self.date, self.source)
        self.num_requests += 1
        return date.fromisoformat(self.date)


def midnight(day: date, format: str) -> str:
    """Midnight of a day as `strftime` writes it in the C locale, in any locale and time zone."""
    moment = datetime.combine(day, time())
    month = MONTHS[day.month - 1]
    words = {"a": DAYS[day.weekday()][:3], "A": DAYS[day.weekday()], "b": month[:3], "h": month[:3], "B": month}
    words |= {"p": "AM", "P": "am", "s": str(calendar.timegm(day.timetuple())), "%": "%"}

    def written(found: re.Match[str]) -> str:
        flag, letter = found.groups()
        if letter in COMPOSITES:
            return midnight(day, COMPOSITES[letter])
        if letter in words:
            return words[letter].upper() if flag == "^" else words[letter]
        return moment.strftime(f"%{flag}{letter}")

    return DIRECTIVE.sub(written, format)
