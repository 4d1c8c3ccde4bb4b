"""Validation of rows: types are checked, ids must be unique, and a bad row stops the run or is skipped and counted."""

import logging
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeVar

from pydantic import Field, StringConstraints, TypeAdapter, ValidationError

from dora_mm.config.schema import Text
from dora_mm.data.vl.json_items import Item, location

log = logging.getLogger(__name__)
MAX_ROWS_NAMED = 5  # listed per reason in a warning; the JSON file next to the table lists all

Line = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Index = Annotated[int, Field(ge=0)]
Id = Index | Text
Score = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

OnBadData = Literal["stop", "skip"]


@contextmanager
def quiet() -> Iterator[None]:
    """A context without the warnings of skipped rows, for callers that report these in another way."""
    logger = logging.getLogger("dora_mm.data.vl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


class HasId(Protocol):
    """A row with an id that must be unique in its file."""

    @property
    def id(self) -> Hashable: ...


T = TypeVar("T")
RowT = TypeVar("RowT", bound=HasId)


class RowError(ValueError):
    """A row cannot be used. The message contains no values of the row, so that equal reasons can be counted."""


class RowTooLongError(ValueError):
    """A row is longer than the model has positions. Such rows are left out, and do not stop a run."""


class BadRows:
    """Handles bad rows: raises at the first one ("stop"), or records the places of all of them ("skip").

    Args:
        on_bad_data: "stop" or "skip".
        found: Places that are already known, by reason; copied.

    Attributes:
        found: The places of all bad rows so far, by reason.
    """

    def __init__(self, on_bad_data: OnBadData, found: Mapping[str, list[str]] | None = None) -> None:
        self.on_bad_data = on_bad_data
        self.found = {reason: [*locations] for reason, locations in (found or {}).items()}

    def add(self, where: str, reason: str) -> None:
        """Records a bad row.

        Args:
            where: Its place, such as "questions.json, item 3 (question_id 17)".
            reason: Why it cannot be used, without values of the row.

        Raises:
            ValueError: `on_bad_data` is "stop"; the message is place and reason.
        """
        if self.on_bad_data == "stop":
            raise ValueError(f"{where}: {reason}")
        self.found.setdefault(reason, []).append(where)


def good_rows(
    path: Path, items: Iterable[Item], schema: TypeAdapter[T], make: Callable[[T], RowT], bad: BadRows
) -> Iterator[RowT]:
    """Validates the items of a file and converts them to rows.

    A row is bad if it does not fit `schema`, if `make` raises RowError, or if its id occurred before.

    Args:
        path: The file, for messages.
        items: Its items with their places (see json_items.py); a value of type bytes is parsed as JSON.
        schema: The required types.
        make: Converts a valid item to a row.
        bad: Receives the bad rows.

    Yields:
        The good rows, in order.

    Raises:
        ValueError: A row is bad and `bad` is set to "stop", or the file cannot be parsed (see json_items.py).
    """
    seen: set[Hashable] = set()
    for where, item in items:
        try:
            row = make(checked(schema, item))
            if row.id in seen:
                raise RowError("has a duplicate id")
        except RowError as error:
            bad.add(location(path, where, item), str(error))
        else:
            seen.add(row.id)
            yield row


def checked(schema: TypeAdapter[T], item: Any) -> T:
    """The item validated by `schema`; bytes are parsed as JSON first.

    Raises:
        RowError: The item does not fit the schema.
    """
    try:
        if isinstance(item, bytes):
            return schema.validate_json(item, strict=True)
        return schema.validate_python(item, strict=True)
    except ValidationError as error:
        raise RowError(_reason(error.errors(include_url=False, include_input=False)[0])) from None


def _reason(problem: Any) -> str:
    path = problem["loc"][problem["loc"][:1] == ("value",) :]  # see object_items
    keys = [part for part in path if isinstance(part, str)]
    if problem["type"] == "json_invalid":
        return "is truncated or not valid JSON"
    if not keys:
        return f"does not have the structure of this format's rows ({problem['msg']})"
    if problem["type"] == "missing":
        return f"{keys[-1]} is missing"
    return f"{keys[0]} is not valid in this format ({problem['msg']})"  # nested keys may be answers of this row


def count_of(number: int, name: str) -> str:
    """A number of things with their name, "1 image" or "2 images"."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def warn_skipped(skipped: dict[str, list[str]]) -> None:
    """Logs one warning with the number and the first places of skipped rows by reason; nothing if there are none."""
    if skipped:
        reasons = [
            f"{len(found)} x {reason} ({'; '.join(found[:MAX_ROWS_NAMED] + ['...'] * (len(found) > MAX_ROWS_NAMED))})"
            for reason, found in skipped.items()
        ]
        log.warning("Skipped rows: %s", ", ".join(reasons))
