"""Items of large JSON files, and one sentence for a file that is incomplete."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.data.vl.json_items import json_lines, list_items, location, object_items, value_of
from dora_mm.utils import json_stream

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner),
    max_leaves=20,
)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("json") / "file.json"


@settings(max_examples=40)
@given(st.lists(VALUES, min_size=1, max_size=6), st.booleans())
def test_lists_are_read_as_written(path, values, indented):
    path.write_text(json.dumps({"info": [1, {"rows": 2}], "rows": values}, indent=2 if indented else None))
    assert [value for _, value in list_items(path, "rows")] == values
    path.write_text(json.dumps(values))
    assert [value for _, value in list_items(path)] == values


@settings(max_examples=40)
@given(st.dictionaries(st.text("abc.é\n"), VALUES, min_size=1, max_size=6))
def test_objects_are_read_as_written(path, values):
    path.write_text(json.dumps(values))
    assert {item["id"]: item["value"] for _, item in object_items(path)} == values


def test_a_duplicate_key_is_yielded_twice(path):
    path.write_text('{"7": 1, "7": 2}')
    assert list(object_items(path)) == [("id '7'", {"id": "7", "value": 1}), ("id '7'", {"id": "7", "value": 2})]


def test_lines(path):
    path.write_bytes(b'{"a": 1}\n\n  \r\nnot json\n')
    assert list(json_lines(path)) == [("line 1", b'{"a": 1}\n'), ("line 4", b"not json\n")]


def test_value_of(path):
    path.write_text('{"questions": [{"data_subtype": "x"}], "data_subtype": "val2014"}')
    assert value_of(path, "data_subtype") == "val2014"
    assert value_of(path, "data_type") is None
    path.write_text("[1]")
    assert value_of(path, "data_subtype") is None


def test_the_error_for_a_truncated_file_names_the_last_complete_item(path):
    path.write_text(json.dumps({"rows": [{"question_id": 10 + number} for number in range(5)]})[:-25])
    with pytest.raises(ValueError, match=r"file\.json is truncated or not valid JSON after item 3 \(question_id 12\)"):
        list(list_items(path, "rows"))
    path.write_text('{"00": {}, "01": {')
    with pytest.raises(
        ValueError, match=r"file\.json is truncated or not valid JSON after id '00', .* \(it ends too early\)"
    ):
        list(object_items(path))
    path.write_text('{"rows')
    with pytest.raises(ValueError, match=r"file\.json is truncated or not valid JSON \(it ends too early\)"):
        list(list_items(path, "rows"))


@pytest.mark.parametrize("content", ["[]", "{}", '{"rows": []}', '{"other": [1]}', '{"rows": {"a": 1}}', "3"])
def test_a_file_without_items(path, content):
    path.write_text(content)
    with pytest.raises(ValueError, match=r"file\.json has no rows: .*list 'rows'"):
        list(list_items(path, "rows"))


def test_files_that_cannot_be_read(path):
    with pytest.raises(ValueError, match="cannot be read: Is a directory"):
        list(json_lines(path.parent))
    path.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match=r"file\.json is .*not valid JSON"):
        list(list_items(path))
    path.write_bytes(b" \n")
    with pytest.raises(ValueError, match=r"file\.json has no rows: .*JSON object per line"):
        list(json_lines(path))


@pytest.mark.parametrize("read", [list_items, object_items, json_lines])
def test_utf_16_is_named(path, read):
    path.write_text('[{"id": 1}]', encoding="utf-16")
    with pytest.raises(ValueError, match=r"file\.json is UTF-16: save it as UTF-8"):
        list(read(path))


@pytest.mark.parametrize(
    ("read", "content", "reason"),
    [
        (list_items, "[[1]," + "[" * 100_000, "nested too deeply"),
        (list_items, '[[1],{"a' + "a" * 2**20 + '":' + "[" * 100_000, "nested too deeply"),
        (object_items, '{"a": 1, "b":' + '{"a":' * 100_000, "nested too deeply"),
        (lambda path: [value_of(path, "b")], '{"a":' * 100_000, "nested too deeply"),
        (list_items, "[1, " + "1" * 5000 + "]", "4300 digits"),
        (list_items, "[1, NaN]", "NaN"),
        (list_items, '[1, "\n"]', "control character"),
        (list_items, "[1 2]", "',' or ']' is missing"),
        (list_items, "[1] 2", "something follows"),
        (object_items, "{'a': 1}", "double quotes"),
        (object_items, '{"a" 1}', "':' is missing"),
    ],
)
def test_what_is_no_json_or_too_deep(path, read, content, reason):
    path.write_text(content)
    with pytest.raises(ValueError, match=rf"file\.json is truncated or not valid JSON.*{reason}"):
        list(read(path))


@pytest.mark.parametrize("size", [1, 7, json_stream.CHUNK])
def test_values_that_lie_across_what_is_read_at_a_time(path, monkeypatch, size):
    values = ["é" * 50, 12345.5, {"\U0001f600": [True, None, -1e-300]}, 7]
    monkeypatch.setattr(json_stream, "CHUNK", size)
    path.write_text(json.dumps({"a": [values, {"rows": [0]}], "rows": values}, ensure_ascii=False))
    assert [value for _, value in list_items(path, "rows")] == values


def test_rows_are_bounded(path, monkeypatch):
    monkeypatch.setattr(json_stream, "MOST_CHARACTERS", 2**17)
    path.write_text(json.dumps(["a", "b" * 2**20]))
    with pytest.raises(ValueError, match=r"file\.json .*after item 1, .*a value has more than 131,072 characters"):
        list(list_items(path))
    path.write_text(f'"a"\n"{"b" * 2**20}"\n')
    with pytest.raises(ValueError, match=r"file\.json .*after line 1, .*a line has more than 131,072 bytes"):
        list(json_lines(path))


def test_half_of_a_surrogate_pair_is_a_question_mark(path):
    path.write_text(r'["\ud83d\ude00", "a\ud800", "\\ud800"]')
    assert [value for _, value in list_items(path)] == ["\U0001f600", "a?", r"\ud800"]


def test_place_names_the_id_once(path):
    assert location(path, "item 3", {"id": 5, "question_id": 7}) == f"{path}, item 3 (question_id 7)"
    assert location(path, "id '5'", {"id": "5", "value": 1}) == f"{path}, id '5'"
    assert location(path, "line 2", b"{}") == f"{path}, line 2"
