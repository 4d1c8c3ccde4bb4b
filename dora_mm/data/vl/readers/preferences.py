"""Pairs of answers of which one is preferred, in the files of TRL, ms-swift and LLaMA-Factory.

    TRL            {"prompt": "Q" or [turns], "chosen": "A" or [turns], "rejected": "B" or [turns], "images": [...]}, or
                   without "prompt", and both are whole conversations
    ms-swift       {"messages": [..., the chosen answer], "rejected_response": "B", "images": [...]}, or
                   "rejected_messages", which are a whole conversation; or "query" and "response" instead of "messages"
    LLaMA-Factory  {"conversations" or "messages": [...], "chosen": {"from": "gpt", "value": "A"}, "rejected": {...}},
                   or {"instruction": "Q", "input": "", "chosen": "A", "rejected": "B"}
    RLHF-V         {"text": '{"question": "Q", "chosen": "A", "rejected": "B"}', "image": ...}, JSON in a text

A row stands for two of conversations, one with each answer. These have shapes of chat_shapes.py, and are read by them.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from pydantic_core import from_json

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example, Turn
from dora_mm.data.vl.readers.chat import PEEKED, Maker, first_shape, read_rows
from dora_mm.data.vl.readers.chat_shapes import JsonRow, shape_of
from dora_mm.data.vl.readers.conversation import ROLES, conversation
from dora_mm.data.vl.readers.file_rows import file_items
from dora_mm.data.vl.readers.named_rows import named_row
from dora_mm.data.vl.rows import BadRows, RowError
from dora_mm.utils.messages import log_once

log = logging.getLogger(__name__)
ANSWERS = ("chosen", "rejected")
OF_REJECTED = ("rejected_response", "rejected_messages", "rejected_images", "rejected_videos", "rejected_tools")


class PairShape(NamedTuple):
    """One shape of rows with two answers.

    Attributes:
        name: Whose shape it is, and its keys.
        divide: Makes a row the two of conversations that it stands for, with the chosen and with the rejected answer.
    """

    name: str
    divide: Callable[[JsonRow], tuple[JsonRow, JsonRow]]


def read_preferences(source: SourceConfig, bad: BadRows) -> Iterator[Example]:
    """Reads every pair of a file.

    Raises:
        ValueError: The file cannot be read or has no known shape, or a row is bad and `bad` is set to "stop".
    """

    def maker(path: Path) -> Maker:
        shape = find_pair_shape(path, source.columns)
        log_once(log, f"{path}: {shape.name}")
        return lambda row, name: pair(*(_read(one, name) for one in shape.divide(row)))

    return read_rows(source, bad, maker)


def find_pair_shape(path: Path, columns: Mapping[Any, str] | None = None) -> PairShape:
    """The shape of a file's rows, see `chat.find_shape`.

    Raises:
        ValueError: The file cannot be read, or its first rows have none of the known shapes.
    """
    example = "columns: {prompt: question, chosen: better, rejected: worse, image: image}"
    return first_shape(path, columns, pair_shape_of, "preferences", example, [shape.name for shape in PAIR_SHAPES])


def has_pairs(path: Path) -> bool:
    """Whether the first readable row of a file has two answers, of which one is preferred.

    Raises:
        ValueError: The file cannot be read.
    """
    for _, item in islice(file_items(path), PEEKED):
        try:
            return pair_shape_of(named_row(path, item, {})) is not None
        except RowError:  # reported when the row is read
            continue
    return False


def pair(chosen: Example, rejected: Example) -> Example:
    """Two conversations as one row, of which only the answers that differ are learned, and what is behind these.

    Raises:
        RowError: They have no answer of their own, or other images, videos or tools.
    """
    if chosen.boxes or rejected.boxes:
        raise RowError("has `objects`, and boxes are not read beside preferences")
    if (chosen.images, chosen.frames, chosen.tools) != (rejected.images, rejected.frames, rejected.tools):
        raise RowError("has other images, videos or tools with its rejected answer than with its chosen one")
    turns = zip(chosen.turns, rejected.turns, strict=False)
    shared = next((n for n, (ours, theirs) in enumerate(turns) if ours[:2] + ours[3:] != theirs[:2] + theirs[3:]), None)
    if shared is None:
        shared = min(len(chosen.turns), len(rejected.turns))
    turns_of = {
        name: _learned(found.turns, shared, name) for name, found in zip(ANSWERS, (chosen, rejected), strict=True)
    }
    return Example(
        chosen.id,
        chosen.images,
        chosen.text,
        chosen.answers,
        chosen.scores,
        turns=turns_of["chosen"],
        frames=chosen.frames,
        tools=chosen.tools,
        rejected=turns_of["rejected"],
    )


def _learned(turns: tuple[Turn, ...], shared: int, name: str) -> tuple[Turn, ...]:
    """The turns of a conversation, of which the first ones, that the other one has, too, are not learned."""
    found = tuple(turn._replace(loss=turn.loss and number >= shared) for number, turn in enumerate(turns))
    if found[-1].role != "assistant":
        raise RowError(f"has no {name} answer behind the last question")
    if not found[-1].loss:
        raise RowError(f"has no {name} answer that is learned: it is empty, without loss, or the same as the other one")
    return found


def _read(row: JsonRow, name: str) -> Example:
    shape = shape_of(row)
    if shape is None:
        raise RowError("does not have the keys of the file's first rows")
    return conversation(shape.read(row), name)


# --- shapes ----------------------------------------------------------------------------------------------------------


def prompts(row: JsonRow) -> tuple[JsonRow, JsonRow]:
    """Divides a row of TRL with a prompt. Where that is a text, the answers may be whole conversations with it."""
    if isinstance(row.get("prompt"), str) and all(map(_is_full, _answers(row))):
        return full_conversation(row)
    return _each(row, "completion", _answers(row))


def full_conversation(row: JsonRow) -> tuple[JsonRow, JsonRow]:
    """Divides a row of TRL whose answers are whole conversations."""
    return _each({key: value for key, value in row.items() if key != "prompt"}, "messages", _answers(row))


def continued(row: JsonRow) -> tuple[JsonRow, JsonRow]:
    """Divides a row of LLaMA-Factory with the turns in front of both answers."""
    key = "conversations" if "conversations" in row else "messages"
    turns = _list(row, key)
    speaker, text = ("from", "value") if turns and "from" in turns[0] else ("role", "content")
    turns_of = [{speaker: "assistant", text: one} if isinstance(one, str) else one for one in _answers(row)]
    return _each(row, key, [[*turns, *(one if isinstance(one, list) else [one])] for one in turns_of])


def instructions(row: JsonRow) -> tuple[JsonRow, JsonRow]:
    """Divides a row of LLaMA-Factory in the layout of Alpaca."""
    return _each(row, "output", _answers(row))


def prompt_and_answers(row: JsonRow) -> tuple[JsonRow, JsonRow]:
    """Divides a row with `query`."""
    return _each(row, "response", _answers(row))


def packed_answers(row: JsonRow) -> tuple[JsonRow, JsonRow]:
    """Divides a row whose question and answers are JSON in its `text`."""
    found = _packed(row)
    if found is None or not isinstance(found.get("question"), str):
        raise RowError("has no JSON of question, chosen and rejected in `text`")
    rest = {key: value for key, value in row.items() if key != "text"}
    return prompt_and_answers({**rest, "query": found["question"], **{key: found.get(key) for key in ANSWERS}})


def _packed(row: JsonRow) -> JsonRow | None:
    """The object of JSON in the `text` of a row, None if there is none with two answers."""
    text = row.get("text")
    if not isinstance(text, str) or not text.lstrip().startswith("{"):
        return None
    try:
        found = from_json(text)
    except ValueError:
        return None
    return found if isinstance(found, dict) and all(key in found for key in ANSWERS) else None


def swift(row: JsonRow) -> tuple[JsonRow, JsonRow]:
    """Divides a row of ms-swift: a conversation with the chosen answer, and the rejected one or its conversation."""
    chosen = {key: value for key, value in row.items() if key not in OF_REJECTED}
    if row.get("rejected_messages"):
        rejected = {**chosen, "messages": row["rejected_messages"]}
        for kind in ("images", "videos", "tools"):  # which it has once more
            if row.get(f"rejected_{kind}"):
                rejected[kind] = row[f"rejected_{kind}"]
        return chosen, rejected
    if any(row.get(f"rejected_{kind}") for kind in ("images", "videos", "tools")):
        raise RowError("has other images, videos or tools with its rejected answer than with its chosen one")
    answer, key = row.get("rejected_response"), "response" if "query" in row else "output"
    if "messages" not in row and "conversations" not in row:
        return chosen, {**chosen, key: answer}
    key = "messages" if "messages" in row else "conversations"
    turns = _list(row, key)
    if not turns:
        raise RowError(f"has no turns in `{key}`")
    text = "value" if "from" in turns[-1] else "content"
    turns_of = answer if isinstance(answer, list) else [{**turns[-1], text: answer}]
    return chosen, {**chosen, key: [*turns[:-1], *turns_of]}


TRL = PairShape("TRL (prompt, chosen, rejected)", prompts)
TRL_FULL = PairShape("TRL (chosen, rejected)", full_conversation)
SWIFT = PairShape("ms-swift (messages, rejected_response or rejected_messages)", swift)
LLAMA_FACTORY = PairShape("LLaMA-Factory (conversations or messages, chosen, rejected)", continued)
ALPACA = PairShape("LLaMA-Factory (instruction, chosen, rejected)", instructions)
QUERY = PairShape("query, chosen, rejected", prompt_and_answers)
PACKED = PairShape("RLHF-V (text: JSON of question, chosen, rejected)", packed_answers)
PAIR_SHAPES = (TRL, TRL_FULL, SWIFT, LLAMA_FACTORY, ALPACA, QUERY, PACKED)


def pair_shape_of(row: JsonRow) -> PairShape | None:
    """The shape of a row by its keys and the kinds of its answers, None if it has none of these shapes."""
    if any(row.get(key) for key in OF_REJECTED[:2]):
        return SWIFT
    if not all(key in row for key in ANSWERS):
        return PACKED if _packed(row) else None
    if isinstance(row.get("prompt"), list):
        return TRL
    if _is_full(row["chosen"]):
        return TRL_FULL
    by_key = {"conversations": LLAMA_FACTORY, "instruction": ALPACA, "query": QUERY, "prompt": TRL}
    return next((shape for key, shape in {**by_key, "messages": LLAMA_FACTORY}.items() if key in row), None)


def _is_full(answer: Any) -> bool:
    """Whether an answer is a conversation, with the question in front."""
    first = answer[0] if isinstance(answer, list) and answer else None
    speaker = first.get("role", first.get("from")) if isinstance(first, dict) else None
    return isinstance(speaker, str) and ROLES.get(speaker.lower()) != "assistant"


def _answers(row: JsonRow) -> list[Any]:
    if missing := [key for key in ANSWERS if not row.get(key)]:
        raise RowError(f"has no `{missing[0]}`, or an empty one")
    return [row[key] for key in ANSWERS]


def _each(row: JsonRow, key: str, values: list[Any]) -> tuple[JsonRow, JsonRow]:
    """The row once with each of two values under a key, without its answers and other conversations."""
    rest = {name: value for name, value in row.items() if name not in (*ANSWERS, "messages", "conversations")}
    return {**rest, key: values[0]}, {**rest, key: values[1]}


def _list(row: JsonRow, key: str) -> list[Any]:
    found = row.get(key)
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise RowError(f"has no list of turns in `{key}`")
    return found
