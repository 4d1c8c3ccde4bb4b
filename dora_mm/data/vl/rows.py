"""Rows of data files: types checked, ids unique, and what cannot be used stopped at or counted by reason."""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from dora_mm.data.vl.json_items import Item, place

log = logging.getLogger(__name__)
NAMED = 5  # places of each reason in a warning; the table's file of left-out rows lists all

Text = Annotated[str, StringConstraints(min_length=1)]
Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Index = Annotated[int, Field(ge=0)]
Id = Index | Text
Score = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

OnBadData = Literal["stop", "skip"]


class HasId(Protocol):
    @property
    def id(self) -> Hashable: ...


T = TypeVar("T")
Row = TypeVar("Row", bound=HasId)


class RowError(ValueError):
    """Why one row cannot be used. The sentence says it without the row's own values, so that equal reasons add up."""


class BadRows:
    """Stops at the first bad row, or keeps where all of them stand.

    found: the places by reason, from those given on.
    """

    def __init__(self, on_bad_data: OnBadData, found: Mapping[str, list[str]] | None = None) -> None:
        self.on_bad_data = on_bad_data
        self.found = {reason: [*places] for reason, places in (found or {}).items()}

    def add(self, where: str, reason: str) -> None:
        """Raises ValueError with place and reason where `on_bad_data` is "stop"."""
        if self.on_bad_data == "stop":
            raise ValueError(f"{where}: {reason}")
        self.found.setdefault(reason, []).append(where)


def good_rows(
    path: Path, items: Iterable[Item], schema: TypeAdapter[T], make: Callable[[T], Row], bad: BadRows
) -> Iterator[Row]:
    """`make` of every item that has the types of `schema`; an id that was there before is bad, too.

    Raises:
        ValueError: a row is bad and `bad` stops at it, or the file itself is (see json_items.py).
    """
    seen: set[Hashable] = set()
    for where, item in items:
        try:
            row = make(checked(schema, item))
            if row.id in seen:
                raise RowError("its id was there before")
        except RowError as error:
            bad.add(place(path, where, item), str(error))
        else:
            seen.add(row.id)
            yield row


def checked(schema: TypeAdapter[T], item: Any) -> T:
    """The item with the types of `schema`, parsed first if it is a line. Raises RowError."""
    try:
        if isinstance(item, bytes):
            return schema.validate_json(item, strict=True)
        return schema.validate_python(item, strict=True)
    except ValidationError as error:
        raise RowError(_reason(error.errors(include_url=False, include_input=False)[0])) from None


def _reason(problem: Any) -> str:
    keys = [part for part in problem["loc"] if isinstance(part, str) and part != "value"]  # "value": see object_items
    if problem["type"] == "json_invalid":
        return "is cut off or no JSON"
    if not keys:
        return f"has another form than this format's rows ({problem['msg']})"
    if problem["type"] == "missing":
        return f"{keys[-1]} is missing"
    return f"{keys[0]} is not as this format has it ({problem['msg']})"  # further keys may be the row's own answers


def warn_of(left_out: dict[str, list[str]]) -> None:
    """One warning that counts and names what was left out, nothing without."""
    if left_out:
        reasons = [
            f"{len(places)} x {reason} ({'; '.join(places[:NAMED])}{'; ...' if len(places) > NAMED else ''})"
            for reason, places in left_out.items()
        ]
        log.warning("Left out: %s", ", ".join(reasons))
