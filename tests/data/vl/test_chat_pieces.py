"""Files of conversations read in pieces: the same examples, the same bad rows and the same messages as row by row."""

import json
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.arrow import Piece, example_at, record_batch, record_batches, selected
from dora_mm.data.vl.example import IMAGE, Example
from dora_mm.data.vl.readers import chat_pieces
from dora_mm.data.vl.readers.chat import read_chat
from dora_mm.data.vl.readers.chat_pieces import read_chat_in_pieces
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.data.vl import chats
from tests.data.vl.chats import as_json, as_lines, messages, said


def examples_of(pieces: Iterator[Piece]) -> list[Example]:
    return [
        example
        for piece in pieces
        for example in ([piece] if isinstance(piece, Example) else [example_at(piece, n) for n in range(len(piece))])
    ]


def outcome(reader, source: SourceConfig, on_bad_data) -> tuple[list[Example], dict, str]:
    bad = BadRows(on_bad_data)
    try:
        return examples_of(reader(source, bad)), bad.found, ""
    except ValueError as error:
        return [], {}, str(error)


def check_agreement(source: SourceConfig) -> None:
    for on_bad_data in ("stop", "skip"):
        assert outcome(read_chat_in_pieces, source, on_bad_data) == outcome(read_chat, source, on_bad_data)


def plain(source: SourceConfig) -> list[bool]:
    """Which pieces of a file were read by column."""
    return [isinstance(piece, pa.RecordBatch) for piece in read_chat_in_pieces(source, BadRows("stop"))]


ROWS = [
    {"id": "a", "image": "x/a.jpg", "conversations": said("<image>\nQ é", "A", "Q2 ", "\u3000日本")},
    {"id": "b", "conversations": said("Q", "A", "Q2")},
    {"id": "a", "model": "", "conversations": [{"from": "SYSTEM", "value": "S"}, *said("Q\u0000", "A")]},
    {"id": None, "image": "c.jpg", "conversations": said("Q", "A", "in the <image> middle", "B")},
    {"id": "", "conversations": said("\n Q \x1f", "A", deep={"er": ["x"]})},
]


@pytest.mark.parametrize("write", [as_json, as_lines])
def test_plain_rows_are_read_by_column(tmp_path, write):
    source = write(tmp_path, ROWS)
    assert plain(source) == [True]
    check_agreement(source)


def test_a_list_may_be_written_on_many_lines(tmp_path):
    source = as_json(tmp_path, ROWS)
    for text in (json.dumps(ROWS[:3], indent=2), json.dumps(ROWS[:3], indent=1).replace("\n", "\r\n") + "\r\n "):
        (tmp_path / "rows.json").write_bytes(text.encode())
        assert plain(source) == [True]
        check_agreement(source)


@pytest.mark.parametrize(
    "row",
    [
        {"id": 7, "conversations": said("Q", "A")},
        {"messages": messages("<image><image>Q", "A"), "images": ["a.jpg", "b.png"]},
        {"messages": messages("Q", "A"), "images": [], "videos": [], "audios": None},
        {"messages": [*messages("Q", "A", "Q2"), {"role": "assistant", "content": "B", "loss": False}]},
        {"messages": [{"role": "Human", "content": "Q"}, {"role": "model", "content": "A", "loss": True}]},
    ],
)
def test_other_plain_rows(tmp_path, row):
    source = as_lines(tmp_path, [row, row])
    assert plain(source) == [True]
    check_agreement(source)


OTHER = [
    {"conversations": said("Q", "A"), "image": "a.jpg"},  # without a marker
    {"conversations": said("<image>Q", "A"), "image": "data:image/png;base64," + chats.packed(chats.picture())},
    {"conversations": said("<image>Q", "A"), "image": "a" * 80},
    {"conversations": said("<image>Q", "A"), "image": "https://x.org/a.jpg"},
    {"conversations": said("<image>Q", "A"), "image": ["a.jpg"]},
    {"conversations": said("<image>Q", "A"), "image": ""},
    {"conversations": said("<image>Q", "A")},
    {"conversations": said("Q", "<image>"), "image": "a.jpg"},
    {"conversations": said("Q", "A"), "system": "S"},
    {"conversations": said("Q", "\u3000")},
    {"conversations": said("Q", "")},
    {"conversations": said("Q", "A", loss=True)},
    {"conversations": said("Q", "A", loss=False)},
    {"conversations": said("Q", "A", loss=3)},
    {"conversations": said("Q", "A") + said("B")},
    {"conversations": said("Q", "A")[::-1]},
    {"conversations": [{"from": "system", "value": "S"}]},
    {"conversations": [{"from": "tool", "value": "S"}]},
    {"conversations": [{"from": "human"}]},
    {"conversations": [None]},
    {"conversations": []},
    {"conversations": None},
    {"conversations": said("Q", "A"), "videos": ["a.mp4"]},
    {"conversations": said("Q", "A"), "videos": [None]},
    {"conversations": said("Q", "A"), "objects": {"bbox": []}},
    {"conversations": said("Q", "A"), "id": "a (item 4)"},
    {"conversations": said("Q", "A"), "id": 1.5},
    {"conversations": said("Q", "A"), "id": 12},
    {"x": {"id": "a", "conversations": said("Q", "A")}, "conversations": said("Q", "A")},
    "a text",
    7,
]


@pytest.mark.parametrize("write", [as_json, as_lines])
@pytest.mark.parametrize("row", OTHER, ids=lambda row: json.dumps(row)[:60])
def test_any_other_row_is_read_as_row_by_row(tmp_path, row, write):
    named = {"id": "x"} | row if isinstance(row, dict) else row
    source = write(tmp_path, [ROWS[0], ROWS[1], named, ROWS[0], ROWS[1]])
    check_agreement(source)
    source = write(tmp_path, [ROWS[0], row, ROWS[1]])
    check_agreement(source)


@pytest.mark.parametrize("size", [64, 300, 1000])
@pytest.mark.parametrize("write", [as_json, as_lines])
def test_pieces_of_any_size(tmp_path, monkeypatch, write, size):
    monkeypatch.setattr(chat_pieces, "PIECE", size)
    rows = [{"id": f"{n}", "conversations": said(f"Q{n}", "A" * (n % 50))} for n in range(60)]
    rows[31]["conversations"] = said("Q")[::-1] * 2
    source = write(tmp_path, rows)
    check_agreement(source)
    monkeypatch.setattr(chat_pieces, "LONGEST", 200)
    check_agreement(source)
    assert outcome(read_chat_in_pieces, source, "skip")[1] == {
        "has an empty answer": [f"{source.file}, {w} {n}" for n, w in places(write, (1, 51))],
        "has two turns of the user in a row": [f"{source.file}, {w} {n}" for n, w in places(write, (32,))],
    }


def places(write, numbers: tuple[int, ...]) -> list[tuple[str, str]]:
    if write is as_lines:
        return [(f"{number}", "line") for number in numbers]
    return [(f"{number} (id '{number - 1}')", "item") for number in numbers]


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6) | st.sampled_from([IMAGE, "Q", "A", " "])
TURN = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt", "Human", "system"]), "value": TEXT},
    optional={"loss": st.sampled_from([True, False, None])},
)
ROW = st.fixed_dictionaries(
    {"conversations": st.lists(TURN, max_size=4) | st.just(said("Q", "A"))},
    optional={"id": st.sampled_from(["a", "b", "", None, 3]), "image": st.sampled_from(["a.jpg", "b", "", None])},
)


@settings(max_examples=60)
@given(st.lists(ROW, min_size=1, max_size=6), st.sampled_from([as_json, as_lines]), st.sampled_from([None, 2]))
def test_both_ways_agree_on_any_rows(tmp_path_factory, rows, write, indent):
    source = write(tmp_path_factory.mktemp("rows"), rows)
    if write is as_json:
        Path(source.file).write_text(json.dumps(rows, indent=indent))
    check_agreement(source)


# No numbers: NaN, which pandas writes, is no JSON to ijson, but does no harm in keys that are not read.
def damaged(content: bytes) -> st.SearchStrategy[bytes]:
    insertion = st.binary(max_size=2) | st.sampled_from([b"\n", b"]", b"},", b'{"id":', b"\\", b'"', b"\\ud800"])
    places = st.tuples(st.integers(0, len(content)), st.integers(0, 4), insertion)
    return places.map(lambda change: content[: change[0]] + change[2] + content[change[0] + change[1] :])


JSON, LINES = json.dumps(ROWS).encode(), b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


@settings(max_examples=150)
@given(damaged(JSON) | damaged(LINES))
def test_both_ways_agree_on_damaged_files(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("rows") / "rows.json"
    path.write_bytes(content)
    check_agreement(SourceConfig(format="chat", file=str(path)))


def test_a_table_takes_a_part_of_the_rows_of_a_piece(tmp_path):
    rows = [{"id": str(n), "conversations": said(f"Q{n}", "A")} for n in range(2500)]
    rows[2000]["conversations"] = said("Q", "")
    source = as_json(tmp_path, rows)
    whole = [row.id for row in open_table(source, tmp_path / "tables", on_bad_data="skip")]
    assert whole == [str(n) for n in range(2500) if n != 2000]
    part = open_table(source.model_copy(update={"skip": 3, "limit": 1500}), tmp_path / "tables", on_bad_data="stop")
    assert [row.id for row in part] == [str(n) for n in range(3, 1503)]
    assert [batch.num_rows for batch in part.batches] == [1000, 500]


@given(st.lists(st.integers(0, 7), max_size=8), st.integers(0, 9), st.none() | st.integers(0, 9), st.integers(1, 5))
def test_pieces_of_any_kind_become_batches_of_one_size(sizes, start, length, size):
    rows = [Example(str(n), (), "") for n in range(sum(sizes))]
    pieces, position = [], 0
    for number in sizes:  # 0: an example on its own
        part = rows[position : position + max(number, 1)]
        position += len(part)
        pieces += [record_batch(part)] if number and part else part
    end = None if length is None else start + length
    batches = list(record_batches(selected(pieces, start, end), size))
    assert examples_of(iter(batches)) == rows[:position][start:end]
    assert all(batch.num_rows == size for batch in batches[:-1])
