"""Conversations: the shapes of all trainers become the same examples, and each bad row is named."""

import gzip
import json
import logging
from itertools import pairwise
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.data.vl.readers.chat import find_shape, read_chat
from dora_mm.data.vl.report import data_report, quantiles, table_figures
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from dora_mm.tasks.vl import draw_answer
from tests.data.vl import chats
from tests.data.vl.chats import as_json, as_lines, as_parquet, items, messages, said, turns

QA = ("<image>\nWhat is it?", "A dog.")


def read(source: SourceConfig) -> list[Example]:
    return list(read_chat(source, BadRows("stop")))


def only(source: SourceConfig) -> Example:
    (row,) = read(source)
    return row


def refusal(source: SourceConfig) -> str:
    with pytest.raises(ValueError, match=r"\S") as caught:
        read(source)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(source.file)
    return message.removeprefix(source.file)


# --- shapes ----------------------------------------------------------------------------------------------------------


SHAPES = {
    "LLaVA": {"id": "x", "image": "a.jpg", "conversations": said(*QA)},
    "LLaMA-Factory (conv": {"id": "x", "conversations": said(*QA), "images": ["a.jpg"]},
    "LLaMA-Factory (mess": {"id": "x", "messages": messages(*QA), "images": ["a.jpg"]},
    "ms-swift": {"id": "x", "messages": messages(*QA), "images": ["a.jpg"], "videos": [], "objects": {"bbox": []}},
    "Hugging Face": {"id": "x", "images": ["a.jpg"], "messages": messages(items({}, "\nWhat is it?"), items("A dog."))},
    "TRL": {
        "id": "x",
        "image": "a.jpg",
        "prompt": messages(items({}, "\nWhat is it?")),
        "completion": messages("", items("A dog."))[1:],
    },
    "FineVision": {"id": "x", "images": ["a.jpg"], "texts": [{"user": "<image>\nWhat is it?", "assistant": "A dog."}]},
    "Alpaca": {"id": "x", "image": "a.jpg", "instruction": "<image>", "input": "What is it?", "output": "A dog."},
    "ms-swift (query": {"id": "x", "images": ["a.jpg"], "query": "<image>\nWhat is it?", "response": "A dog."},
    "axolotl": {"id": "x", "messages": messages(items({"path": "a.jpg"}, "\nWhat is it?"), items("A dog."))},
}


@pytest.mark.parametrize("write", [as_json, as_lines, as_parquet])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_kind_of_file_gives_the_same_example(tmp_path, shape, write, caplog):
    row = SHAPES[shape]
    if write is as_parquet and shape == "ms-swift":
        row = row | {"objects": None}  # Parquet has no empty structs
    source = write(tmp_path, [row])
    with caplog.at_level(logging.INFO):
        example = only(source)
    assert example == Example("x", ("a.jpg",), "What is it?", ("A dog.",), (1.0,), turns=turns(*QA))
    assert find_shape(tmp_path / source.file).name.startswith(shape)
    (record,) = caplog.records
    assert record.message == f"{source.file}: {find_shape(tmp_path / source.file).name}"


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


@pytest.mark.parametrize("names", [("user", "assistant"), ("Human", "GPT"), ("USER", "ASSISTANT"), ("user", "model")])
def test_roles_have_other_names(tmp_path, names):
    row = {"conversations": [{"from": name, "value": "x"} for name in names]}
    assert [turn.role for turn in only(as_json(tmp_path, [row])).turns] == ["user", "assistant"]


def test_several_turns_and_images_stay_where_they_are(tmp_path):
    texts = ("First <image>, then <image>?", "A dog.", "And this?\n<image>", "A cat.", "Why?", "So.")
    row = {"image": ["a.jpg", "b.jpg", "c.jpg"], "conversations": said(*texts)}
    example = only(as_json(tmp_path, [row]))
    assert example.turns == turns(*texts)
    assert example.images == ("a.jpg", "b.jpg", "c.jpg")
    assert (example.text, example.answers) == ("Why?", ("So.",))


def test_items_with_and_without_their_own_image_keep_their_order(tmp_path):
    content = items({}, "one", {"path": "own.jpg"}, "two <image>", {"url": "file:///data/b c.jpg"})
    row = {"messages": messages(content, "x"), "images": ["a.jpg", "b.jpg"]}
    example = only(as_lines(tmp_path, [row]))
    assert example.images == ("a.jpg", "own.jpg", "b.jpg", "/data/b c.jpg")
    assert example.turns[0].text == "<image>one<image>two <image><image>"
    openai = {"type": "image_url", "image_url": {"url": "o.jpg"}}
    assert only(as_lines(tmp_path, [{"messages": messages([openai, *items("x")], "y")}])).images == ("o.jpg",)


def test_images_without_any_marker_come_first_in_the_users_first_turn(tmp_path):
    row = {"system": "Be brief.", "images": ["a.jpg", "b.jpg"], "messages": messages("Q", "A", "Q2", "A2")}
    assert only(as_lines(tmp_path, [row])).turns == turns("<image><image>Q", "A", "Q2", "A2", system="Be brief.")


def test_a_system_turn_is_a_key_or_a_message(tmp_path):
    rows = [
        {"system": "Be brief.", "conversations": said("Q", "A")},
        {"conversations": [{"from": "system", "value": "Be brief."}, *said("Q", "A")]},
    ]
    assert [row.turns for row in read(as_json(tmp_path, rows))] == [turns("Q", "A", system="Be brief.")] * 2


def test_rows_without_images_and_rows_without_an_answer(tmp_path):
    rows = [{"conversations": said("Q", "A", "Q2")}, {"conversations": said("Q"), "image": None}]
    first, second = read(as_json(tmp_path, rows))
    assert (first.images, first.text, first.answers, first.scores) == ((), "Q2", (), ())
    assert first.turns == turns("Q", "A", "Q2")
    assert (second.text, second.answers) == ("Q", ())


def test_the_file_says_which_answers_are_learned(tmp_path):
    row = {"messages": messages("Q", "A", "Q2", "A2", "Q3", "A3")}
    for index, loss in ((1, False), (3, True), (5, None)):
        row["messages"][index]["loss"] = loss
    assert [turn.loss for turn in only(as_lines(tmp_path, [row])).turns] == [False, False, False, True, False, True]


def test_answers_inside_a_prompt_are_not_learned(tmp_path):
    row = {"prompt": messages("Q", "A", "Q2"), "completion": messages("", "A2")[1:]}
    assert [turn.loss for turn in only(as_lines(tmp_path, [row])).turns] == [False, False, False, True]
    row = {"prompt": "Q", "completion": "A", "image": "a.jpg"}
    assert only(as_lines(tmp_path, [row])).turns == turns("<image>Q", "A")
    assert only(as_lines(tmp_path, [{"prompt": messages("Q")}])).answers == ()


def test_ids_are_those_of_the_file_made_unique_by_their_place(tmp_path):
    rows = [{"id": name, "conversations": said("Q", "A")} for name in ("7", 7, "a", "7", None)]
    assert [row.id for row in read(as_json(tmp_path, rows))] == ["7", "7 (item 2)", "a", "7 (item 4)", "5"]
    lines = [{"messages": messages("Q", "A")}] * 2
    assert [row.id for row in read(as_lines(tmp_path, lines))] == ["1", "2"]
    assert [row.id for row in read(as_parquet(tmp_path, lines))] == ["1", "2"]


def test_questions_and_answers_of_other_shapes_become_turns(tmp_path):
    history = [["Q", "A"], ["Q2", "A2"]]
    rows = [
        {"texts": [{"user": "Q", "assistant": "A"}, {"user": "Q2", "assistant": "A2"}], "images": ["a.jpg"]},
        {"query": "Q2", "response": "A2", "history": history[:1], "images": ["a.jpg"], "system": "S"},
        {"instruction": "Q2", "input": "", "output": "A2", "history": history[:1], "image": "a.jpg"},
    ]
    for row in rows:
        found = only(as_lines(tmp_path, [row]))
        assert found.turns == turns("<image>Q", "A", "Q2", "A2", system=row.get("system"))
        assert found.images == ("a.jpg",)
    unanswered = {"query": "Q3", "response": None, "history": history}
    assert only(as_lines(tmp_path, [unanswered])).turns == turns("Q", "A", "Q2", "A2", "Q3")


def test_columns_with_other_names(tmp_path):
    row = {"question": "<image>Q", "answer": "A", "picture": "a.jpg", "image": 7}
    columns = {"query": "question", "response": "answer", "images": "picture", "image": "none"}
    found = only(as_parquet(tmp_path, [row], columns=columns))
    assert (found.images, found.turns) == (("a.jpg",), turns("<image>Q", "A"))
    assert "has the keys 'question', 'answer', 'picture', 'image'" in refusal(as_parquet(tmp_path, [row]))


def test_tools_speak_between_answers(tmp_path):
    said_ = [
        *said("Q", "call"),
        {"from": "observation", "value": "7"},
        {"from": "tool", "value": "8"},
        *said("", "A")[1:],
    ]
    found = only(as_json(tmp_path, [{"conversations": said_}]))
    assert [turn.role for turn in found.turns] == ["user", "assistant", "tool", "tool", "assistant"]
    assert [turn.loss for turn in found.turns] == [False, True, False, False, True]


MARKED = [  # a question, and the images of its row; as the model is shown them
    ("<img>b.jpg</img>Q", ["a.jpg"], None),
    ("Picture 1: <img>b.jpg</img>\nQ <image>", ["a.jpg"], ("Picture 1: <image>\nQ <image>", ("b.jpg", "a.jpg"))),
    ("<image_2> or <image 1>?", ["a.jpg", "b.jpg"], ("<image> or <image>?", ("b.jpg", "a.jpg"))),
    ("<image_1> and <image_1>?", ["a.jpg"], ("<image> and <image>?", ("a.jpg", "a.jpg"))),
    (r"<image>Is \<image> or \<img>x</img> or \<video> a tag?", ["a.jpg"], (
        r"<image>Is \<image> or <img>x</img> or \<video> a tag?", ("a.jpg",))),
    ("<b>Q</b> <images> <image_x>", [], ("<b>Q</b> <images> <image_x>", ())),
]  # fmt: skip


@pytest.mark.parametrize(("question", "images", "expected"), MARKED)
def test_markers_of_images_are_honoured_or_refused(tmp_path, question, images, expected):
    source = as_lines(tmp_path, [{"messages": messages(question, "A"), "images": images}])
    if expected is None:
        assert "has 2 images, but 1 <image> marker" in refusal(source)
        return
    found = only(source)
    assert (found.turns[0].text, found.images) == expected


def test_items_name_images_by_their_index(tmp_path):
    content = items({"index": 1}, "Q", {"index": 0})
    found = only(as_lines(tmp_path, [{"messages": messages(content, "A"), "images": ["a.jpg", "b.jpg"]}]))
    assert found.images == ("b.jpg", "a.jpg")
    source = as_lines(tmp_path, [{"messages": messages(items({"index": 2}), "A"), "images": ["a.jpg"]}])
    assert "has markers of images with numbers that are not" in refusal(source)


def test_an_escaped_marker_is_text_of_answers_and_questions(tmp_path):
    found = only(as_json(tmp_path, [{"conversations": said(r"Is \<image> a tag?", r"\<image> is.")}]))
    assert (found.text, found.answers) == ("Is <image> a tag?", ("<image> is.",))
    assert found.turns[1].text == r"\<image> is."


def test_a_conversation_that_ends_with_a_question_is_trained_on_its_earlier_answers(tmp_path):
    rows = [{"conversations": said("Q", "A", "Q2")}, {"conversations": said("Q")}, {"conversations": said("Q", "A")}]
    rows.append({"conversations": said("Q", "A", loss=False)[:1] + said("", "A", loss=False)[1:] + said("Q2")})
    table = open_table(as_json(tmp_path, rows), tmp_path / "tables", on_bad_data="stop")
    assert [row.id for row in table.answered()] == ["1", "3"]
    assert [row.id for row in table[::-1].answered()] == ["3", "1"]
    assert draw_answer(table[0], 0.5) == ("", 1.0)
    assert draw_answer(table[1], 0.5) == ("", 0.0)


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
    with pytest.raises(ValueError, match=r"a list of files is only for format chat, not for vqa_v2"):
        SourceConfig.model_validate({"format": "vqa_v2", "file": ["a", "b"]})


def test_videos_are_shown_where_their_markers_are_or_first(tmp_path):
    qa = messages("Is <video> like <image>, \\<video>?", "A")
    video, image = {"type": "video", "video": "a.mp4"}, {"type": "image", "path": "b.jpg"}
    url = {"type": "video_url", "video_url": {"url": "file:///data/a.mp4"}}
    rows = [
        ({"messages": qa, "images": ["b.jpg"], "videos": ["a.mp4"]}, qa[0]["content"], ("a.mp4", "b.jpg")),
        ({"messages": messages("Q", "A"), "video": "a.mp4", "image": "b.jpg"}, "<image><video>Q", ("b.jpg", "a.mp4")),
        ({"conversations": said("<image>\nQ", "A"), "video": "a.mp4"}, "<video>\nQ", ("a.mp4",)),
        ({"messages": messages([image, video, *items("Q")], "A")}, "<image><video>Q", ("b.jpg", "a.mp4")),
        ({"messages": messages([{"type": "video"}, url], "A"), "videos": ["a.mkv"]}, "<video><video>",
         ("a.mkv", "/data/a.mp4")),
    ]  # fmt: skip
    for row, text, files in rows:
        found = only(as_lines(tmp_path, [row]))
        assert (found.turns[0].text, found.images) == (text, files)
    assert only(as_lines(tmp_path, [rows[0][0]])).text == "Is  like , <video>?"


OTHER = [
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "has chosen, but preferences are not read"),
    ({"messages": messages("Q", "A"), "rejected_response": "B"}, "has rejected_response, but preferences are"),
    ({"texts": "Q"}, "has no list of `texts`"),
    ({"query": "Q", "response": ""}, "has an empty answer"),
    ({"query": "Q", "response": "A", "history": ["Q"]}, "has a `history` that is no list of pairs"),
    ({"instruction": ["Q"], "output": "A"}, "has a instruction or input that is not a text"),
]


@pytest.mark.parametrize(("row", "reason"), OTHER, ids=[reason for _, reason in OTHER])
def test_a_bad_row_of_another_shape_is_named(tmp_path, row, reason):
    assert refusal(as_lines(tmp_path, [row])).startswith(f", line 1: {reason}")


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(
    lambda text: text.strip() and IMAGE not in text
)


@settings(max_examples=60)
@given(st.data())
def test_any_text_survives_every_shape_and_kind_of_file(tmp_path_factory, data):
    texts = data.draw(st.lists(TEXT, min_size=1, max_size=5))
    images = [f"{n}.jpg" for n in range(data.draw(st.integers(0, 3)))]
    marked = [IMAGE * len(images) + texts[0], *texts[1:]]
    contents = [items(*({} for _ in images), texts[0]), *map(items, texts[1:])]
    row = data.draw(
        st.sampled_from(
            [
                {"conversations": said(*marked), "images": images},
                {"messages": messages(*marked), "images": images},
                {"messages": messages(*contents), "images": images},
                {"messages": messages(items(*({"path": name} for name in images), texts[0]), *contents[1:])},
                {"prompt": messages(*contents[:1]), "completion": messages(*contents)[1:], "images": images},
            ]
        )
    )
    if "prompt" in row:
        row["completion"] = row["completion"][:1]
        marked = marked[:2]
    writers = [as_json, as_lines] if "\0" in "".join(texts) else [as_json, as_lines, as_parquet]
    source = data.draw(st.sampled_from(writers))(tmp_path_factory.mktemp("chat"), [row])
    example = only(source)
    assert example.turns == turns(*marked)
    assert example.images == tuple(images)
    assert example.answers == ((marked[-1],) if len(marked) % 2 == 0 else ())


# --- embedded images -------------------------------------------------------------------------------------------------


def test_embedded_images_become_files_named_by_their_content(tmp_path):
    red, blue = chats.picture(), chats.picture("blue", "JPEG")
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
    red, blue = chats.picture(), chats.picture("blue")
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
    source = as_lines(tmp_path, [{"image": chats.packed(chats.picture()), "messages": messages("<image>Q", "A")}])
    (row,) = open_table(source, tmp_path / "tables", on_bad_data="stop")
    (stored,) = (tmp_path / "tables" / "images").iterdir()
    stored.unlink()
    assert list(open_table(source, tmp_path / "tables", on_bad_data="stop")) == [row]
    assert stored.is_file()
    assert "is damaged" in caplog.text
    (tmp_path / "tables").rename(tmp_path / "moved")
    (moved,) = open_table(source, tmp_path / "moved", on_bad_data="stop")
    assert moved.images == (str(tmp_path / "moved" / "images" / stored.name),)


# --- images by path --------------------------------------------------------------------------------------------------


def test_images_are_found_by_relative_and_by_absolute_path(tmp_path):
    for name in ("images/x/a.jpg", "images/y/a.jpg", "images/b.jpg", "else/c.jpg"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    outside = str(tmp_path / "else" / "c.jpg")
    rows = [{"image": name, "conversations": said("Q", "A")} for name in ("x/a.jpg", "y/a.jpg", "./b.jpg", outside)]
    source = as_json(tmp_path, rows, images=str(tmp_path / "images"))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert [row.images for row in table] == [("x/a.jpg",), ("y/a.jpg",), ("b.jpg",), (outside,)]
    bad = [*rows, {"id": 9, "image": "z/a.jpg", "conversations": said("Q", "A")}]
    source = as_json(tmp_path, bad, images=str(tmp_path / "images"))
    with pytest.raises(ValueError, match=r"rows\.json, id 9, image z/a\.jpg: is not in .*images"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert len(open_table(source, tmp_path / "tables", on_bad_data="skip")) == 4


def test_without_a_folder_only_absolute_paths_are_images(tmp_path):
    (tmp_path / "c.jpg").touch()
    rows = [{"image": str(tmp_path / "c.jpg"), "conversations": said("Q", "A")}]
    assert len(open_table(as_json(tmp_path, rows), tmp_path / "tables", on_bad_data="stop")) == 1
    rows.append({"image": "c.jpg", "conversations": said("Q", "A")})
    source = as_json(tmp_path, rows)
    with pytest.raises(
        ValueError, match=r"id 2, image c\.jpg: is not in the file system \(relative names need `images`"
    ):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert len(open_table(source, tmp_path / "tables", on_bad_data="stop", check_images=False)) == 2


# --- bad rows --------------------------------------------------------------------------------------------------------


def llava(*texts: str, **keys) -> dict:
    return {"id": 17, "conversations": said(*texts)} | keys


BAD = [
    (llava("<image>Q", "A", image=["a.jpg", "b.jpg"]), "has 2 images, but 1 <image> marker"),
    (llava("<image> <image>", "A", image="a.jpg"), "has 1 image, but 2 <image> markers"),
    (llava("<image>Q", "A"), "has 0 images, but 1 <image> marker"),
    (llava("<image>Q", "A <image>", image=["a.jpg", "b.jpg"]), "has an image in a turn of the assistant"),
    (llava("Q", " \n"), "has an empty answer"),
    (llava("Q", ""), "has an empty answer"),
    (llava(" ", "A"), "has an empty turn of the user"),
    (llava(), "has no turns"),
    (llava(system="S"), "has no turns"),
    (llava("Q", "A", system=7), "has a turn whose `system` is not a text"),
    (llava("Q", "A") | {"conversations": said("Q", "A")[1:]}, "begins with the assistant"),
    (llava() | {"conversations": said("Q", "A") + said("Q", "B")[1:]}, "has two turns of the assistant in a row"),
    (llava() | {"conversations": said("Q") * 2}, "has two turns of the user in a row"),
    (
        llava() | {"conversations": [*said("Q", "A"), {"from": "system", "value": "S"}]},
        "has a system turn that is",
    ),
    (llava() | {"conversations": [{"from": "bot", "value": "x"}]}, "has a turn of 'bot': the roles are user, human"),
    (llava() | {"conversations": [{"from": "tool", "value": "x"}]}, "begins with a tool"),
    (
        llava() | {"conversations": [*said("Q"), {"from": "tool", "value": "x"}]},
        "has a turn of the tool after one of the user: between them is the assistant's",
    ),
    (
        llava() | {"conversations": [*said("Q"), {"from": "function_call", "value": "x"}]},
        "has a turn of 'function_call': write the call as the assistant's text",
    ),
    (llava("Q <video>", "A"), "has 0 videos, but 1 <video> marker"),
    (llava("<video>Q <video>", "A", videos=["a.mp4"]), "has 1 video, but 2 <video> markers"),
    (llava("<image>Q", "A", videos=["a.mp4", "b.mp4"]), "has 2 videos, but 0 <video> markers"),
    (llava("Q", "A <audio>"), "has a <audio> marker, but sounds are not read"),
    (llava("Q", "A <image_1>", images=["a.jpg"]), "has an image in a turn of the assistant"),
    (llava("<image_2>Q", "A", images=["a.jpg"]), "has markers of images with numbers that are not those of its images"),
    (llava("<image_1><image>Q", "A", images=["a.jpg", "b.jpg"]), "has markers of images with a number and others"),
    (llava() | {"conversations": [{"from": "human"}]}, "has no list of turns that each have `value`"),
    (llava() | {"conversations": [{"from": "human", "value": None}]}, "has a turn whose `value` is not a text"),
    (llava() | {"conversations": "Q"}, "has no list of turns that each have `from`"),
    ("a text", "is not an object with keys"),
    (llava("Q", "A", id=1.5), "has an id that is neither a number nor a text"),
    (llava("Q", "A", image=3), "has an image that is neither a path nor the bytes of a file"),
    (llava("Q", "A", image=[""]), "has an image with an empty name"),
    (llava("Q", "A", image="https://x.org/a.jpg"), "names an image by its address on the network: download"),
    (llava("Q", "A", image="data:image/png,abc"), "has an image as a data URL that is not base64"),
    (llava("Q", "A", image="data:image/png;base64,???"), "has an image that is not valid base64"),
    (llava("Q", "A", image="AAAA" * 30), "has an embedded image that cannot be read"),
    (llava("Q", "A", image={"bytes": None, "path": None}), "has an image with an empty name"),
    (llava("Q", "A", image="a.jpg", images=["b.jpg"]), "has both image and images"),
    (llava("Q", "A", videos=["a.jpg"]), "has a video whose name does not end in .mp4, "),
    (llava("Q", "A", videos=[["a.jpg", "b.jpg"]]), "has a video that is not the path of a file"),
    (llava("Q", "A", video="https://x.org/a.mp4"), "names a video by its address on the network: download"),
    (llava("Q", "A", video="a.mp4", videos=["b.mp4"]), "has both video and videos"),
    (llava("Q", "A", audios=["a.wav"]), "has audios, but sounds are not read"),
    (llava("Q", "A", objects={"ref": [], "bbox": [[1, 2, 3, 4]]}), "has objects, but boxes are not read"),
    (llava("Q", "A", bbox=[[1, 2, 3, 4]]), "has bbox, but boxes are not read"),
    (llava("Q", "A", tools=[{"name": "f"}]), "has tools, but tools are not read"),
    (llava("Q", "A", rejected_response="B"), "has rejected_response, but preferences are not read"),
    (llava() | {"conversations": said("Q", "A", loss=True)}, "asks for loss on a turn that is not the assistant's"),
    (llava() | {"conversations": said("Q", "A", loss=False)}, "has `loss: false` for every answer"),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, row, reason):
    source = as_json(tmp_path, [llava("Q", "A", id="good"), row, llava("Q", "A", id="fine")])
    name = "" if not isinstance(row, dict) else f" (id {row['id']!r})"
    assert refusal(source).startswith(f", item 2{name}: {reason}")
    bad = BadRows("skip")
    assert [example.id for example in read_chat(source, bad)] == ["good", "fine"]
    ((found, places),) = bad.found.items()
    assert found.startswith(reason)
    assert places == [f"{source.file}, item 2{name}"]


@pytest.mark.parametrize(("write", "word"), [(as_json, "item"), (as_lines, "line")])
@pytest.mark.parametrize("place", [1, 3])
def test_a_null_as_the_first_or_last_row_is_a_bad_row(tmp_path, write, word, place):
    rows = [llava("Q", "A", id=n) for n in range(2)]
    source = write(tmp_path, [None, *rows] if place == 1 else [*rows, None])
    with pytest.raises(ValueError, match=rf"{word} {place}: is not an object with keys$"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert [row.id for row in table] == ["0", "1"]
    assert table.skipped == {"is not an object with keys": [f"{source.file}, {word} {place}"]}


BAD_MESSAGES = [
    (messages(items({"type": "audio"}), "A"), "has content of the type 'audio': only text, images and videos"),
    (messages(items({"path": "a.jpg", "url": "b.jpg"}), "A"), "has an image with both path and url"),
    (messages([{"text": "Q"}], "A"), "has content of the type 'None': only text, images and videos"),
    (messages("Q", items("A", {"path": "a.jpg"})), "has an image in a turn of the assistant"),
    (messages("Q", None), "has an empty answer"),
    (messages("Q", 7), "has a message whose content is neither a text nor a list"),
    (messages([{"type": "text", "text": 7}]), "has content whose text is not a text"),
    ({"role": "user"}, "has no list of turns that each have `role`"),
    (None, "has no list of turns that each have `role`"),
    ([*messages("Q"), {"role": "assistant", "content": None, "tool_calls": [{"f": 1}]}], "has tool calls in a message"),
    ([*messages("Q"), {"role": "assistant", "content": "A", "weight": 0}], "has `weight` in a message: only `loss`"),
    ([*messages("Q"), {"role": "assistant", "content": "A", "train": False}], "has `train` in a message: only `loss`"),
    ([*messages("Q"), {"role": "assistant", "content": "A", "loss": 0.5}], "has a `loss` that is neither true nor"),
]


@pytest.mark.parametrize(("content", "reason"), BAD_MESSAGES, ids=[reason for _, reason in BAD_MESSAGES])
def test_a_bad_message_is_named_by_its_line(tmp_path, content, reason):
    source = as_lines(tmp_path, [{"messages": messages("Q", "A")}, {"messages": content}])
    assert refusal(source).startswith(f", line 2: {reason}")


def test_skipped_rows_are_counted_in_the_table_and_its_report(tmp_path, caplog):
    rows = [llava("Q", "A", id=n) for n in range(3)]
    rows += [llava("Q", "A", id=n, audios=["v"]) for n in (7, 8)] + [llava("Q", "", id=9)]
    source = as_json(tmp_path, rows)
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert "2 x has audios, but sounds are not read" in caplog.text
    assert f"{source.file}, item 5 (id 8)" in caplog.text
    figures = table_figures(source, table)
    assert figures["skipped: has audios, but sounds are not read: leave it out"] == "2"
    assert figures["skipped: has an empty answer"] == "1"
    with pytest.raises(ValueError, match=r"rows\.json, item 4 \(id 7\): has audios"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")


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


# --- tables and reports ----------------------------------------------------------------------------------------------


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
