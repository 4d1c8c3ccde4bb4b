"""Conversations by column: all rows of a piece of a file at once, if all of them are plain.

Plain are messages of text alone that alternate, with as many IMAGE markers as images, which are named by path. A piece
with any other row is left to conversation.py, which takes it row by row and says what is wrong with it. Both give the
same examples; by column, 600,000 rows take a quarter of the time.
"""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json

from dora_mm.data.vl.arrow import SCHEMA, TURN
from dora_mm.data.vl.example import IMAGE
from dora_mm.data.vl.readers.chat_shapes import UNREAD, UNREAD_IN_MESSAGES, Keys
from dora_mm.data.vl.readers.conversation import ROLES

BLOCK = 1 << 20  # bytes that a thread parses at a time; a longer row is not plain
KINDS = ("system", "user", "assistant")
SYSTEM, USER, ASSISTANT = range(3)
KIND_OF_NAME = np.array([KINDS.index(role) for role in ROLES.values()])
PATH = r"^[^:]*\.[^:/]*$"  # has a dot, unlike base64, and no colon, unlike addresses and data URLs
VISIBLE = "[!-~]"  # a text with such a character is not blank


def plain_rows(rows: bytes, keys: Keys, *, on_lines: bool) -> tuple[pa.RecordBatch, list[Any]] | None:
    """Rows by column.

    Args:
        rows: JSON objects with a line break between them.
        keys: Those of the shape.
        on_lines: No object has a line break, so that several threads can parse.

    Returns:
        The examples in the columns of SCHEMA, with empty ids, and their ids as the file has them; None if one is not
        valid or not plain.
    """
    table = next(filter(None, (_parsed(rows, keys, on_lines, kind) for kind in (pa.string(), pa.int64()))), None)
    if table is None or not table.num_rows:
        return None
    batch = table.combine_chunks().to_batches()[0]
    columns = _columns(batch, keys)
    return None if columns is None else (columns, batch["id"].to_pylist())


def _parsed(rows: bytes, keys: Keys, on_lines: bool, id_type: pa.DataType) -> pa.Table | None:
    """The keys that are read, as columns; None where a value has another type, as have those that are refused."""
    unread = {key: pa.list_(pa.null()) if key.endswith("s") else pa.null() for key in UNREAD}
    message = {keys.name: pa.string(), keys.text: pa.string(), "loss": pa.bool_()}
    message |= dict.fromkeys(UNREAD_IN_MESSAGES, pa.null())
    row = {"id": id_type, "system": pa.null(), "image": pa.string(), "images": pa.list_(pa.string())}
    schema = pa.schema(row | unread | {keys.turns: pa.list_(pa.struct(message))})
    try:
        rows.decode("utf-8")  # of which the parser checks nothing
        table = pyarrow.json.read_json(
            pa.BufferReader(rows),
            read_options=pyarrow.json.ReadOptions(block_size=BLOCK),
            parse_options=pyarrow.json.ParseOptions(schema, not on_lines, "ignore"),
        )
    except (pa.ArrowInvalid, UnicodeDecodeError):
        return None
    lists = (chunk for key in unread if key.endswith("s") for chunk in table[key].chunks)
    return None if any(len(chunk.flatten()) for chunk in lists) else table


def _columns(batch: pa.RecordBatch, keys: Keys) -> pa.RecordBatch | None:
    turns: Any = batch[keys.turns]
    said = turns.flatten()
    names, texts, losses = (said.field(key) for key in (keys.name, keys.text, "loss"))
    lengths = turns.value_lengths().fill_null(0).to_numpy()
    if turns.null_count or said.null_count or names.null_count or texts.null_count or not lengths.all():
        return None
    ends = np.cumsum(lengths)
    kinds = _kinds(names, ends - lengths, lengths)
    if kinds is None or _any_blank(texts):
        return None
    markers = _call("count_substring_regex", texts, pattern=IMAGE).to_numpy()  # a quarter of count_substring's time
    images = _images(batch, np.add.reduceat(markers, ends - lengths))
    learned = _learned(kinds, losses, ends)
    if images is None or learned is None or markers[kinds == ASSISTANT].any():
        return None
    answered = kinds[ends - 1] == ASSISTANT
    questions = texts.take(pa.array(ends - 1 - answered)).to_pylist()
    answers = _lists(answered, texts.take(pa.array(ends[answered] - 1)))
    roles = pa.array(KINDS).take(pa.array(kinds))
    found = {
        "id": pa.array([""] * len(ends)),
        "images": images,
        "text": pa.array([question.replace(IMAGE, "").strip() for question in questions], pa.string()),
        "answers": answers,
        "scores": _lists(answered, pa.array(np.ones(answered.sum()))),
        "turns": _lists(lengths, pa.StructArray.from_arrays([roles, texts, pa.array(learned)], fields=list(TURN))),
    }
    none = _lists(np.zeros(len(ends), int), pa.array([], pa.string()))
    return pa.record_batch([found.get(column.name, none) for column in SCHEMA], schema=SCHEMA)


def _kinds(names: pa.Array, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
    """Whose each turn is; None unless they alternate in each row, after at most one system turn."""
    known = _call("index_in", _call("utf8_lower", names), value_set=pa.array(list(ROLES)))
    if known.null_count:
        return None
    kinds = KIND_OF_NAME[known.to_numpy()]
    first = (kinds[starts] == SYSTEM).astype(int)
    place = np.arange(len(kinds)) - np.repeat(starts + first, lengths)
    expected = np.where(place < 0, SYSTEM, USER + place % 2)
    return kinds if (kinds == expected).all() and (lengths > first).all() else None


def _any_blank(texts: pa.Array) -> bool:
    visible = _call("match_substring_regex", texts, pattern=VISIBLE).to_numpy(zero_copy_only=False)
    return any(not text.strip() for text in texts.take(pa.array(np.flatnonzero(~visible))).to_pylist())


def _images(batch: pa.RecordBatch, markers: np.ndarray) -> pa.Array | None:
    """The images of each row; None if there are not as many as markers, or one is not named by a path."""
    single, several = batch["image"], batch["images"]
    if single.null_count == len(single):
        counts = several.value_lengths().fill_null(0).to_numpy()
        names = several.flatten()
    elif several.null_count == len(several):
        counts = single.is_valid().to_numpy(zero_copy_only=False)
        names = single.drop_null()
    else:
        return None
    paths = _call("match_substring_regex", names, pattern=PATH).to_numpy(zero_copy_only=False)
    return _lists(counts, names) if (counts == markers).all() and not names.null_count and paths.all() else None


def _learned(kinds: np.ndarray, losses: pa.Array, ends: np.ndarray) -> np.ndarray | None:
    """Which turns carry loss; None if one is the user's, or all answers of a row are without."""
    answers = kinds == ASSISTANT
    if losses.null_count == len(losses):
        return answers
    stated = losses.fill_null(False).to_numpy(zero_copy_only=False)
    learned = answers & losses.fill_null(True).to_numpy(zero_copy_only=False)
    per_row = np.add.reduceat(learned, np.concatenate([[0], ends[:-1]]))
    return None if (stated & ~answers).any() or (answers[ends - 1] & (per_row == 0)).any() else learned


def _lists(counts: np.ndarray, values: pa.Array) -> pa.ListArray:
    """Lists of so many of the values each."""
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(counts)]), pa.int32()), values)


def _call(function: str, values: pa.Array, **options: Any) -> Any:
    """Calls a function of pyarrow.compute, which are made at run time, unknown to its stubs."""
    return getattr(pc, function)(values, **options)
