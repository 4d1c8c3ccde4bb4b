"""Files of predictions that anybody made: JSON, JSON lines, CSV, TSV, Excel and Parquet.

Which program a file is of, the keys of its first row say: ours, VLMEvalKit's tables, lmms-eval's samples, outputs of
OpenAI's batches (which vLLM's run-batch writes, too), or an id and an answer under one of the usual names.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from dora_mm.config.paths import resolve_path
from dora_mm.data.vl.answers import FAIL_MESSAGE, ModelAnswer, message_answer
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import Item, location
from dora_mm.data.vl.readers.choices import answer_cells, listed
from dora_mm.data.vl.readers.file_rows import file_items
from dora_mm.data.vl.rows import RowError
from dora_mm.eval.vl.predictions.scored import About, about_of, example_of

IDS = ("id", "question_id", "questionId", "index", "custom_id", "qid", "identifier", "image_id", "data_id")
ANSWERS = (
    *("prediction", "predict", "pred", "pred_answer", "response", "output", "outputs", "generated_text", "completion"),
    *("answer", "text", "caption"),  # a row with an answer may have the text of its question
)
THOUGHTS = ("reasoning_content", "reasoning")
MOST_NAMED = 5  # places in a message


class AnsweredRow(NamedTuple):
    """A prediction.

    Attributes:
        id: The id of its row; of lmms-eval the number of the row in the data set, from 0.
        answer: The answer, as the file has it.
        example: What the file says of its row; None: nothing that could be scored.
        where: Its place in the file.
    """

    id: str
    answer: ModelAnswer
    example: Example | None
    where: str


@dataclass(frozen=True)
class PredictionFile:
    """A file of predictions.

    Attributes:
        path: The file.
        rows: Its rows, whose ids differ.
        by_number: Whether ids are numbers of rows of the data set.
        about: What the first line says, of our own files.
    """

    path: Path
    rows: tuple[AnsweredRow, ...]
    by_number: bool
    about: About | None


Parse = Callable[[Mapping[str, Any], str], AnsweredRow]
OURS, VLMEVALKIT, LMMS_EVAL, BATCH, COLUMNS = "dora_mm", "VLMEvalKit", "lmms-eval", "an OpenAI batch", "a table"


def read_predictions(name: str) -> PredictionFile:
    """Reads a file.

    Args:
        name: Its path.

    Raises:
        ValueError: It cannot be read, or rows have no id, a repeated one, or no answer: they are counted and named.
    """
    path = resolve_path(name, "PREDICTIONS")
    if path.is_dir():
        raise ValueError(f"PREDICTIONS: {path} is a folder: name a file in it")
    items = iter(file_items(path))
    first = next(items)
    try:
        head = _parsed(first[1])
        about = about_of(head)
    except ValueError as error:
        raise ValueError(f"{location(path, first[0])}: {error}") from None
    kind = OURS if about else _kind_of(head)
    rows = _rows(path, kind, items if about else chain([first], items))
    if not rows:
        raise ValueError(f"{path} has no rows")
    return PredictionFile(path, rows, kind == LMMS_EVAL, about)


def _parsed(item: Any) -> Any:
    if isinstance(item, RowError):
        raise item
    try:
        return from_json(item) if isinstance(item, bytes) else item
    except ValueError:
        raise RowError("is truncated or not valid JSON") from None


def _kind_of(row: Any) -> str:
    keys = set(row) if isinstance(row, dict) else set()
    if keys >= {"doc_id", "filtered_resps"}:
        return LMMS_EVAL
    if keys >= {"custom_id", "response"}:
        return BATCH
    return VLMEVALKIT if keys >= {"index", "question", "prediction"} else COLUMNS


def _rows(path: Path, kind: str, items: Iterable[Item]) -> tuple[AnsweredRow, ...]:
    found: dict[str, AnsweredRow] = {}
    bad: dict[str, list[str]] = {}
    for where, item in items:
        try:
            values = _parsed(item)
            if not isinstance(values, dict):
                raise RowError("is no object with an id and an answer")
            row = PARSERS[kind](values, where)
            if row.id in found:
                raise RowError("has an id that an earlier row has")
            found[row.id] = row
        except RowError as error:
            bad.setdefault(str(error), []).append(where)
    if bad:
        reasons = [f"{len(locations)} x {reason} ({named(locations, '; ')})" for reason, locations in bad.items()]
        raise ValueError(f"{path}: {sum(map(len, bad.values()))} rows cannot be scored: {', '.join(reasons)}")
    return tuple(found.values())


def named(locations: Sequence[str], separator: str = ", ") -> str:
    """The first of some places or ids."""
    return separator.join([*locations[:MOST_NAMED], *(["..."] if len(locations) > MOST_NAMED else [])])


def _cell(row: Mapping[str, Any], name: str) -> Any:
    """A value that the first row has, by which the program is known."""
    if name not in row:
        raise RowError(f"has no {name}")
    return row[name]


def _text(value: Any) -> str:
    """An answer: a text, a number, or the only one of a list; "" where the program gave none."""
    while isinstance(value, list) and len(value) <= 1:
        value = value[0] if value else None
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise RowError("has an answer that is not a text")
    return str(value)


def _ours(row: Mapping[str, Any], where: str) -> AnsweredRow:
    example = example_of(row)
    known = {name: str(row[name]) for name in ("thought", "ended", "failure") if row.get(name)}
    return AnsweredRow(example.id, ModelAnswer(_text(row.get("answer")), **known), example, where)


def _vlmevalkit(row: Mapping[str, Any], where: str) -> AnsweredRow:
    """A row of its results, with its thought where `SPLIT_THINK` has it in a column; an empty cell is no answer."""
    cells = {name: "" if value is None else str(value) for name, value in row.items()}
    answer = message_answer({"content": _cell(cells, "prediction"), "reasoning": cells.get("thinking")})
    if FAIL_MESSAGE in answer.text:
        answer = ModelAnswer("", answer.thought, failure="could not be obtained, as VLMEvalKit says")
    return AnsweredRow(_cell(cells, "index"), answer, answer_cells(cells), where)


def _lmms_eval(row: Mapping[str, Any], where: str) -> AnsweredRow:
    """A row of its samples; `target` is a text, or a list of texts as one."""
    key, target = str(_cell(row, "doc_id")), row.get("target")
    answers = tuple(listed(str(target))) if target not in (None, "", "None") else ()
    question = str(row.get("input") or "")
    example = Example(key, (), question, answers, (1.0,) * len(answers)) if answers else None
    return AnsweredRow(key, ModelAnswer(_text(_cell(row, "filtered_resps"))), example, where)


def _batch(row: Mapping[str, Any], where: str) -> AnsweredRow:
    try:
        choice = row["response"]["body"]["choices"][0]
        answer = message_answer(choice["message"], choice.get("finish_reason"))
    except (KeyError, IndexError, TypeError, AttributeError):
        raise RowError("has no answer of the server, but an error") from None
    return AnsweredRow(str(_cell(row, "custom_id")), answer.stripped(), None, where)


def _columns(row: Mapping[str, Any], where: str) -> AnsweredRow:
    key = next((row[name] for name in IDS if row.get(name) is not None), None)
    if key is None:
        raise RowError(f"has no id, under none of {', '.join(IDS)}")
    name = next((name for name in ANSWERS if name in row), None)
    if name is None:
        raise RowError(f"has no answer, under none of {', '.join(ANSWERS)}")
    message = {"content": _text(row[name]), **{thought: row.get(thought) for thought in THOUGHTS}}
    return AnsweredRow(str(key), message_answer(message, row.get("finish_reason")), None, where)


PARSERS: Mapping[str, Parse] = {
    OURS: _ours,
    VLMEVALKIT: _vlmevalkit,
    LMMS_EVAL: _lmms_eval,
    BATCH: _batch,
    COLUMNS: _columns,
}
