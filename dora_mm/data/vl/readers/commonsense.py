"""Commonsense questions in the layout of LLM-Adapters: `commonsense_170k.json`, and eight test files."""

import re
from collections.abc import Iterator, Sequence

from pydantic import TypeAdapter
from typing_extensions import TypedDict

from dora_mm.config.schema import Text
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.json_items import list_items
from dora_mm.data.vl.rows import BadRows, RowError, good_rows

WORDS = tuple(  # that stand for options; a row has all words of a line, or the first of them
    line.split()
    for line in (
        "true false",
        "solution1 solution2",
        "answer1 answer2 answer3 answer4 answer5",
        "ending1 ending2 ending3 ending4",
        "option1 option2",
    )
)
FORMAT = re.compile(r"Answer format: *(\S+)\s*$")


class _Row(TypedDict):
    instruction: Text
    input: str
    output: Text
    answer: Text


PLACED = TypeAdapter(tuple[str, _Row])  # a row with its place in the file, which is its id


def read_commonsense(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every question of a JSON list of `{instruction, input, output, answer}`.

    An instruction ends with the words for its options, `Answer format: true/false`; `answer` is one of them, and
    `output` a sentence that names it.

    Raises:
        ValueError: The file is damaged, or a row is bad and `bad` is set to "stop".
    """
    items = ((where, (where, row)) for where, row in list_items(source.path))
    return good_rows(source.path, items, PLACED, _example, bad)


def _example(placed: tuple[str, _Row]) -> Example:
    where, row = placed
    if row["input"].strip():
        raise RowError("has an input, which the published rows leave empty: write it into the instruction")
    found = FORMAT.search(row["instruction"])
    options = tuple(found[1].split("/")) if found else ()
    if not any(len(options) > 1 and list(options) == words[: len(options)] for words in WORDS):
        raise RowError("has no end of its instruction as in Answer format: answer1/answer2/answer3")
    if row["answer"] not in options:
        raise RowError("has an answer that is not one of its options")
    if named_option(row["output"], options) != row["answer"]:
        raise RowError("has an output that does not name its answer first")
    return Example(where, (), row["instruction"], (row["output"],), (1.0,), options=options)


def named_option(text: str, options: Sequence[str]) -> str | None:
    """The word for an option that comes first in a text, also one that the row lacks; None: there is none."""
    words = next(words for words in WORDS if words[0] == options[0])
    found = re.search("|".join(words), text)
    return found[0] if found else None
