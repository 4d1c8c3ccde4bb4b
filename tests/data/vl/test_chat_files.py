"""Files of conversations: of every kind, several, damaged; their images, and their tables."""

import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Turn
from dora_mm.data.vl.readers.chat import find_shape, read_chat
from dora_mm.data.vl.report import data_report, quantiles, table_figures
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.shared.data import chats
from tests.shared.data.chats import (
    QA,
    as_json,
    as_lines,
    as_parquet,
    items,
    llava,
    messages,
    only,
    read,
    refusal,
    said,
)


@pytest.mark.parametrize("text", ["[{row}]", "[1, {row}]", "{row}\n{row}\n"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path, text):
    """As programs on Windows write it; after a list's first value, reading begins anew with another parser."""
    row = json.dumps({"conversations": said("What?", "This.")})
    (tmp_path / "rows.json").write_bytes(b"\xef\xbb\xbf" + text.replace("{row}", row).encode())
    source = SourceConfig(format="chat", file=str(tmp_path / "rows.json"))
    assert {example.text for example in read_chat(source, BadRows("skip"))} == {"What?"}


def test_utf_16_is_named(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}", encoding="utf-16")
    with pytest.raises(ValueError, match=r"a\.jsonl is UTF-16: save it as UTF-8"):
        find_shape(tmp_path / "a.jsonl")


def test_ids_are_those_of_the_file_made_unique_by_their_place(tmp_path):
    rows = [{"id": name, "conversations": said("Q", "A")} for name in ("7", 7, "a", "7", None)]
    assert [row.id for row in read(as_json(tmp_path, rows))] == ["7", "7 (item 2)", "a", "7 (item 4)", "5"]
    lines = [{"messages": messages("Q", "A")}] * 2
    assert [row.id for row in read(as_lines(tmp_path, lines))] == ["1", "2"]
    assert [row.id for row in read(as_parquet(tmp_path, lines))] == ["1", "2"]


def test_a_folder_or_a_pattern_names_several_files_some_of_them_packed(tmp_path):
    folder = tmp_path / "shards"
    (folder / "deep").mkdir(parents=True)
    lines = [json.dumps({"conversations": said(f"Q{n}", "A")}) for n in range(4)]
    (folder / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0].encode() + b"\n\xef\xbb\xbf" + lines[1].encode())
    (folder / "b.json.gz").write_bytes(gzip.compress(f"[{lines[2]}]".encode()))
    as_parquet(folder / "deep", [{"messages": messages("Q3", "A")}])
    (folder / "readme.txt").write_text("no rows")
    for file, number in ((folder, 4), (folder / "*.json*", 3), (folder / "**" / "*.parquet", 1)):
        source = SourceConfig(format="chat", file=str(file))
        table = open_table(source, tmp_path / "tables", on_bad_data="stop")
        assert [row.text for row in table] == [f"Q{n}" for n in range(4)][-1 if number == 1 else 0 :][:number]
        assert len({row.id for row in table}) == number
    assert table_figures(SourceConfig(format="chat", file=str(folder)), table)["format"] == (
        "chat, LLaVA (conversations, image), Hugging Face (messages)"
    )
    (folder / "b.json.gz").write_bytes(gzip.compress(lines[2].encode())[:-9])
    with pytest.raises(ValueError, match=r"b\.json\.gz is truncated or not a valid gzip file$"):
        open_table(SourceConfig(format="chat", file=str(folder)), tmp_path / "tables", on_bad_data="stop")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty is a folder without files that end in \.json, "):
        read(SourceConfig(format="chat", file=str(tmp_path / "empty")))


def test_a_list_names_several_files_folders_and_patterns(tmp_path):
    for number, folder in enumerate(("a", "b", "c")):
        (tmp_path / folder).mkdir()
        as_lines(tmp_path / folder, [{"messages": messages(f"Q{2 * number + n}", "A")} for n in range(2)])
    files = [str(tmp_path / "c" / "rows.jsonl"), str(tmp_path / "a"), str(tmp_path / "b" / "*.jsonl")]
    source = SourceConfig.model_validate({"format": "chat", "file": files})
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert [row.text for row in table] == ["Q4", "Q5", "Q0", "Q1", "Q2", "Q3"]
    assert [row.id for row in table] == ["1", "2", *(f"{n} (file {file}, line {n})" for file in (2, 3) for n in (1, 2))]
    assert table.file == f"{files[0]} and 2 more"
    other = SourceConfig.model_validate({"format": "chat", "file": files[::-1]})
    assert open_table(other, tmp_path / "tables", on_bad_data="stop").identity != table.identity
    alone = SourceConfig.model_validate({"format": "chat", "file": files[:1]})
    assert len(open_table(alone, tmp_path / "tables", on_bad_data="stop")) == 2


@pytest.mark.parametrize("file", [[], 7, [""], ["a", 7]])
def test_a_file_is_a_path_or_a_list_of_paths(file):
    with pytest.raises(ValueError, match=r"must be a path, or a list of paths, got "):
        SourceConfig.model_validate({"format": "chat", "file": file})
    with pytest.raises(ValueError, match=r"a list of files is only for format vqa_v2, .* and refcoco, not for nlvr2"):
        SourceConfig.model_validate({"format": "nlvr2", "file": ["a", "b"]})


def test_embedded_images_become_files_named_by_their_content(tmp_path):
    red, blue = chats.image(), chats.image("blue", "JPEG")
    given = [
        chats.packed(red),
        chats.data_url(blue, "jpeg"),
        {"bytes": chats.packed(red), "path": "lost.png"},
        "\n".join((chats.packed(blue)[:60], chats.packed(blue)[60:].rstrip("="))),  # folded, without padding
    ]
    rows = [{"images": [image], "messages": messages("<image>Q", "A")} for image in given]
    rows.append({"messages": messages(items({"base64": chats.packed(red)}, "Q"), "A"), "images": []})
    source = as_lines(tmp_path, rows)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    folder = tmp_path / "tables" / "images"
    names = [row.images[0] for row in table]
    assert len(set(names)) == 2
    assert names[0] == names[2] == names[4]
    assert names[1] == names[3]
    assert {path.read_bytes() for path in folder.iterdir()} == {red, blue}
    assert {path.suffix for path in folder.iterdir()} == {".png", ".jpeg"}
    assert all(Image.open(name).size == (3, 2) for name in names)
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    open_table(source.model_copy(update={"limit": 2}), tmp_path / "tables", on_bad_data="stop")
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written


def test_parquet_with_the_bytes_of_images(tmp_path):
    red, blue = chats.image(), chats.image("blue")
    stored = [{"bytes": red, "path": None}, {"bytes": None, "path": "a.jpg"}, {"bytes": blue, "path": "b.png"}]
    rows = [{"images": [image], "messages": messages(items({}, "Q"), items("A"))} for image in stored]
    rows.append({"images": [], "messages": messages(items("Q"), items("A"))})
    source = as_parquet(tmp_path, rows)
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.jpg").touch()
    source = source.model_copy(update={"images": str(tmp_path / "images")})
    first, second, third, fourth = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert [Path(row.images[0]).read_bytes() for row in (first, third)] == [red, blue]
    assert (second.images, fourth.images) == (("a.jpg",), ())
    raw = as_parquet(tmp_path, [{"image": red, "messages": messages("<image>Q", "A")}])
    (row,) = open_table(raw, tmp_path / "tables", on_bad_data="stop")
    assert row.images == first.images


def test_embedded_images_that_are_gone_are_written_again(tmp_path, caplog):
    source = as_lines(tmp_path, [{"image": chats.packed(chats.image()), "messages": messages("<image>Q", "A")}])
    (row,) = open_table(source, tmp_path / "tables", on_bad_data="stop")
    (stored,) = (tmp_path / "tables" / "images").iterdir()
    stored.unlink()
    assert list(open_table(source, tmp_path / "tables", on_bad_data="stop")) == [row]
    assert stored.is_file()
    assert "is damaged" in caplog.text
    stored.write_bytes(bytes(stored.stat().st_size))
    next((tmp_path / "tables").glob("*.json")).unlink()  # the table is made again
    (row,) = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert stored.read_bytes() == chats.image()
    (tmp_path / "tables").rename(tmp_path / "moved")
    (moved,) = open_table(source, tmp_path / "moved", on_bad_data="stop")
    assert moved.images == (str(tmp_path / "moved" / "images" / stored.name),)


def test_images_are_found_by_relative_and_by_absolute_path(tmp_path):
    for name in ("images/x/a.jpg", "images/y/a.jpg", "images/b.jpg", "else/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    outside = str(tmp_path / "else" / "c.jpg")
    rows = [{"image": name, "conversations": said("Q", "A")} for name in ("x/a.jpg", "y/a.jpg", "./b.jpg", outside)]
    source = as_json(tmp_path, rows, images=str(tmp_path / "images"))
    with pytest.raises(
        ValueError, match=r"else/c\.jpg: is an absolute path, and not in .*/images: .*absolute_paths=true"
    ):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    table = open_table(source, tmp_path / "tables", on_bad_data="stop", absolute_paths=True)
    assert [row.images for row in table] == [("x/a.jpg",), ("y/a.jpg",), ("b.jpg",), (outside,)]
    bad = [*rows, {"id": 9, "image": "z/a.jpg", "conversations": said("Q", "A")}]
    source = as_json(tmp_path, bad, images=str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"rows\.json, id 9, image z/a\.jpg: is not in .*images"):
        open_table(source, tmp_path / "tables", on_bad_data="stop", absolute_paths=True)
    assert len(open_table(source, tmp_path / "tables", on_bad_data="skip", absolute_paths=True)) == 4
    assert len(open_table(source, tmp_path / "tables", on_bad_data="skip")) == 3


def test_without_a_folder_only_absolute_paths_are_images(tmp_path):
    """And only with a key of the config: anybody's table could show any image of this machine."""
    (tmp_path / "c.jpg").touch()
    rows = [{"image": str(tmp_path / "c.jpg"), "conversations": said("Q", "A")}]
    source, anywhere = as_json(tmp_path, rows), {"on_bad_data": "stop", "absolute_paths": True}
    with pytest.raises(
        ValueError, match=r"may be read: .*c\.jpg is an absolute path: .*`images`, or set data\.absolute"
    ):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert len(open_table(source, tmp_path / "tables", **anywhere)) == 1
    named = as_json(tmp_path, rows, images=str(tmp_path))
    assert [row.images for row in open_table(named, tmp_path / "tables", on_bad_data="stop")] == [(rows[0]["image"],)]
    rows.append({"image": "c.jpg", "conversations": said("Q", "A")})
    source = as_json(tmp_path, rows)
    with pytest.raises(
        ValueError, match=r"id 2, image c\.jpg: is not in the file system \(relative names need `images`"
    ):
        open_table(source, tmp_path / "tables", **anywhere)
    assert len(open_table(source, tmp_path / "tables", on_bad_data="stop", check_images=False)) == 2


@pytest.mark.parametrize("rows", [[{"question": "Q", "answer": "A"}], [{"prompt": "Q", "response": "A"}], [7], [{}]])
def test_a_file_of_an_unknown_shape_is_refused_with_the_known_ones(tmp_path, rows):
    message = refusal(as_json(tmp_path, rows))
    assert message.startswith(" has no known shape of conversations: its first row ")
    for word in (*rows[0],) if isinstance(rows[0], dict) else ("not an object",):
        assert word in message
    for name in ("LLaVA", "LLaMA-Factory", "ms-swift", "Hugging Face", "TRL", "axolotl"):
        assert name in message


def test_a_damaged_first_row_does_not_hide_the_shape(tmp_path):
    source = as_lines(tmp_path, [{"messages": messages("Q", "A")}])
    path = tmp_path / "rows.jsonl"
    path.write_text("{\n\n" + path.read_text())
    assert refusal(source) == ", line 1: is truncated or not valid JSON"
    assert [row.id for row in read_chat(source, BadRows("skip"))] == ["3"]


def test_files_that_cannot_be_parsed(tmp_path):
    source = as_json(tmp_path, [llava("Q", "A")] * 3)
    content = (tmp_path / "rows.json").read_text()
    (tmp_path / "rows.json").write_text(content[:-40])
    assert refusal(source).startswith(" is truncated or not valid JSON after item 2 (id 17), the last complete item")
    source = as_parquet(tmp_path, [{"messages": messages("Q", "A")}] * 3)
    (tmp_path / "rows.parquet").write_bytes((tmp_path / "rows.parquet").read_bytes()[:-40])
    assert refusal(source).startswith(" is truncated or not a valid Parquet file")
    for name, content in (("a.jsonl", ""), ("b.json", "[]")):
        (tmp_path / name).write_text(content)
        assert "has no rows" in refusal(SourceConfig(format="chat", file=str(tmp_path / name)))
    assert "cannot be read" in refusal(SourceConfig(format="chat", file=str(tmp_path / "missing.json")))
    pq.write_table(
        pq.read_table(as_parquet(tmp_path, [{"messages": messages("Q")}]).file)[:0], tmp_path / "rows.parquet"
    )
    assert refusal(source) == " has no rows"


# No numbers are inserted: NaN, which pandas writes, is no JSON to the parser of lists.
INSERTIONS = st.binary(max_size=2) | st.sampled_from([b"\n", b"]", b"},", b'{"id":', b"null", b'"', b"\\ud800"])
WHOLE_FILES = [json.dumps([llava(*QA, id=n) for n in range(3)]).encode(), b'{"messages": []}\n' * 3]


@settings(max_examples=60)
@given(st.sampled_from(WHOLE_FILES), st.floats(0, 1), st.integers(0, 4), INSERTIONS)
def test_a_damaged_file_is_read_or_refused_in_a_sentence(tmp_path_factory, content, place, removed, inserted):
    path, start = tmp_path_factory.mktemp("rows") / "rows.json", int(place * len(content))
    path.write_bytes(content[:start] + inserted + content[start + removed :])
    message = str(path)
    try:
        list(read_chat(SourceConfig(format="chat", file=str(path)), BadRows("skip")))
    except ValueError as error:
        message = str(error)
    assert message.startswith(str(path))
    assert "\n" not in message


def test_a_table_keeps_turns_and_options_are_empty(tmp_path):
    rows = [llava(*["Q", "A"] * (n % 4 + 1), id=n, system="S" if n % 3 else None) for n in range(2500)]
    source = as_json(tmp_path, rows)
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert list(table) == read(source)
    assert isinstance(table[1].turns[0], Turn)
    assert all(one.turns[-1] == Turn("assistant", "A", True) for one, _ in pairwise(table))


def test_the_report_counts_images_turns_and_characters(tmp_path):
    rows = [
        llava("<image>Q", "A", id=1, image="a.jpg"),
        llava("<image><image>", "AA", "BB", "CC", id=2, image=["a.jpg", "b.jpg"]),
        llava("four", id=3),
    ]
    for name in ("a.jpg", "b.jpg"):
        (tmp_path / name).touch()
    source = as_json(tmp_path, rows, images=str(tmp_path))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    figures = table_figures(source, table)
    assert figures == {
        "format": "chat, LLaVA (conversations, image)",
        "rows": "3",
        "rows without an answer": "1",
        "rows without an image": "1",
        "images per row (lowest / median / highest)": "0 / 1 / 2",
        "turns per row (lowest / median / highest)": "1 / 2 / 4",
        "characters per row (5% / 50% / 95% / 100%)": "9 / 9 / 20 / 20",
    }
    assert table_figures(source, table.select([2]))["characters per row (5% / 50% / 95% / 100%)"] == "4 / 4 / 4 / 4"
    assert quantiles(table.rows[:0]) == ""
    lines = data_report({"chat train": figures, "chat valid": {"rows": "1", "tokens per row": "5"}}).splitlines()
    assert lines[0].split() == ["data", "chat", "train", "chat", "valid"]
    assert next(line.split()[1:] for line in lines if line.startswith("rows ")) == ["3", "1"]
    assert lines[-1].split() == ["tokens", "per", "row", "5"]


def test_a_row_is_one_line_of_json_with_any_key_beside(tmp_path):
    """Keys that no shape has are not read, such as LLaVA's `model`."""
    row = llava("Q", "A", model="", source="x", meta={"deep": [1]})
    assert only(as_lines(tmp_path, [row])) == only(as_json(tmp_path, [json.loads(json.dumps(row))]))
