"""Our own files of predictions: all that a table of scores is made of, so that it can be made again from them alone.

JSON lines. The first is about the whole: task, metric and rules, settings of the answers, digests of model, adapter and
data. Each other one is a row: id, prompt, images, answer, references and score, and what else its metric needs; of an
answer also its thought, why it ended and why it failed, where these are known.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from dora_mm.data.vl.answers import AnsweredRows, ModelAnswer
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.rows import RowError
from dora_mm.eval.vl.metrics import score_row
from dora_mm.eval.vl.scores import VLScores
from dora_mm.utils.atomic import write_text

VERSION = "predictions 1"  # of the files; the value of the first line's key `dora_mm`
UNKNOWN = "unknown"  # the day of the chat template of a server
SHOWN = ("id", "images", "answers")  # the fields of an example that a row has under names of its own
DEFAULTS = Example("", (), "")
EXAMPLE = TypeAdapter(Example)


@dataclass(frozen=True)
class About:
    """The metadata of a file of predictions, which hold for all its rows.

    Attributes:
        task: The task or suite.
        metric: The main metric.
        rules: The rule by which answers are right, by metric.
        settings: How the answers were made: sections of a config, by their names.
        digests: Of model, adapter and data, by a description of each; of the files of a model, by their paths.
        day: The date that the chat template read; UNKNOWN for that of a server; "": it read none.
    """

    task: str
    metric: str = ""
    rules: Mapping[str, str] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    digests: Mapping[str, Any] = field(default_factory=dict)
    day: str = ""

    @property
    def inputs(self) -> list[str]:
        """A line for each digest; one for all files of a model."""
        found = {name: value if isinstance(value, str) else _digest(value) for name, value in self.digests.items()}
        return [f"{name}: {digest}" for name, digest in found.items()]


ABOUT = TypeAdapter(About)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def write_scored(
    path: Path, answered: AnsweredRows, scores: VLScores | None, about: About, prompt: str = "{text}"
) -> None:
    """Writes a file atomically.

    Args:
        path: The file.
        answered: Examples with answers.
        scores: Their scores, whose metric and rules the first line has; None: there are no references.
        about: What else the first line has.
        prompt: What is asked, with {text} for the question.
    """
    first = {"dora_mm": VERSION, **asdict(about)}
    if not about.day:
        del first["day"]
    if scores is not None:
        first |= {"metric": scores.main, "rules": dict(scores.rules)}
    lines = [first, *(_line(about.task, prompt, *row) for row in answered)]
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def _line(task: str, prompt: str, example: Example, answer: ModelAnswer) -> dict[str, Any]:
    rest = {
        column.name: value
        for column in fields(Example)
        if column.name not in SHOWN and (value := getattr(example, column.name)) != getattr(DEFAULTS, column.name)
    }
    known = answer.fields()
    return {
        "id": example.id,
        "prompt": prompt.replace("{text}", example.text),
        "images": example.images,
        "answer": known.pop("text"),
        **known,
        "references": example.answers,
        "score": score_row(task, example, answer.text),
        "example": rest,
    }


def about_of(row: Any) -> About | None:
    """The metadata in the first line of a file; None if it is not one of ours.

    Raises:
        ValueError: It is of another version of this program.
    """
    if not isinstance(row, dict) or "dora_mm" not in row:
        return None
    known = {column.name for column in fields(About)}
    if row["dora_mm"] != VERSION or not isinstance(row.get("task"), str):
        raise ValueError(f"is of another version ({row['dora_mm']}): this one reads {VERSION}")
    try:
        return ABOUT.validate_json(json.dumps({key: value for key, value in row.items() if key in known}), strict=True)
    except ValidationError as error:
        raise ValueError(f"is damaged: {_problem(error)}") from None


def _problem(error: ValidationError) -> str:
    """The first key with a value of another type."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def example_of(row: Any) -> Example:
    """The example of a row.

    Raises:
        RowError: The row is not one of ours.
    """
    try:
        shown = {"id": row["id"], "images": row["images"], "answers": row["references"]}
        return EXAMPLE.validate_json(json.dumps({"text": "", **row["example"], **shown}), strict=True)
    except (KeyError, TypeError, ValidationError):
        raise RowError("is no row that this program has written") from None
