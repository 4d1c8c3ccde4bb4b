"""Conversations: what messages of the trainers say beside texts and images, and turns in an order of their own."""

import json
import logging

import pytest

from dora_mm.config.vl_data import VLDataConfig
from dora_mm.data.vl.example import Turn
from dora_mm.data.vl.report import table_figures
from dora_mm.data.vl.splits import open_training
from dora_mm.data.vl.tables import open_table
from tests.shared.data.chats import (
    as_json,
    as_lines,
    as_parquet,
    data_url,
    image,
    items,
    messages,
    only,
    read,
    said,
    turns,
)


@pytest.mark.parametrize(
    ("key", "no", "yes"), [("loss", False, True), ("weight", 0, 1), ("weight", 0.0, 1.0), ("train", False, True)]
)
def test_each_trainer_says_in_its_way_which_answers_are_learned(tmp_path, key, no, yes):
    """ms-swift, OpenAI (fine-tuning with weights) and axolotl."""
    row = {"messages": messages("Q", "A", "Q2", "A2", "Q3", "A3")}
    row["messages"][1][key], row["messages"][3][key] = no, yes
    expected = [False, False, False, True, False, True]
    for write in (as_lines, as_parquet):
        assert [turn.loss for turn in only(write(tmp_path, [row])).turns] == expected
    llava = {"conversations": said("Q", "A", "Q2", "A2")}
    llava["conversations"][1][key] = no
    assert [turn.loss for turn in only(as_json(tmp_path, [llava])).turns] == [False, False, False, True]


def test_openai_s_items_and_the_developer(tmp_path):
    url = data_url(image())
    row = {
        "messages": [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "content": [{"type": "input_image", "image_url": url}, {"type": "input_text", "text": "Q"}],
            },
            {"role": "assistant", "content": [{"type": "output_text", "text": "A"}]},
        ]
    }
    found = only(as_lines(tmp_path, [row]))
    assert (found.turns, found.images) == (turns("<image>Q", "A", system="Be brief."), (url,))


def test_turns_may_follow_in_another_order(tmp_path):
    asked, answered = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
    for row, roles in (
        ([asked, asked, answered], ("user", "user", "assistant")),
        ([answered, asked, answered], ("assistant", "user", "assistant")),
    ):
        found = only(as_lines(tmp_path, [{"messages": row, "images": ["a.jpg"]}]))
        assert tuple(turn.role for turn in found.turns) == roles
        assert next(turn.text for turn in found.turns if turn.role == "user") == "<image>Q"
        assert [turn.loss for turn in found.turns] == [role == "assistant" for role in roles]


def test_a_greeting_alone_is_not_learned(tmp_path):
    row = {"messages": [{"role": "assistant", "content": "Hello."}, *messages("Q")]}
    assert [turn.loss for turn in only(as_lines(tmp_path, [row])).turns] == [False, False]


class Reads:
    """A model that reads all rows."""

    def check_rows(self, table):
        return table


def test_empty_answers_are_counted_and_not_learned(tmp_path, caplog):
    rows = [{"messages": messages("Q", "", "Q2", "A2", "Q3", " \n")}, {"messages": messages("Q", "A")}]
    rows += [{"messages": messages("Q", "")}, {"query": "Q", "response": ""}]
    source = as_lines(tmp_path, rows[:3])
    first, _, third = read(source)
    assert [turn.loss for turn in first.turns] == [False, False, False, True, False, False]
    assert (first.text, first.answers, third.answers) == ("Q3", (), ())
    assert only(as_json(tmp_path, rows[3:])).turns == (Turn("user", "Q", False), Turn("assistant", "", False))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert table_figures(source, table)["empty answers, not learned"] == "3"
    config = VLDataConfig.model_validate({"train": source, "tables": str(tmp_path / "tables")})
    with caplog.at_level(logging.INFO):
        trained = open_training(config, 1, Reads())["chat"].table
    assert [row.id for row in trained] == ["1", "2"]
    assert "3 answers are empty and not learned" in caplog.text
    assert "1 of 3 rows have no answer to learn" in caplog.text
    only_full = as_lines(tmp_path, rows[1:2])
    assert "empty answers, not learned" not in table_figures(
        only_full, open_table(only_full, tmp_path, on_bad_data="stop")
    )


def test_calls_are_joined_to_what_the_assistant_says(tmp_path):
    call = {"role": "tool_call", "content": {"name": "f", "arguments": {"a": 1, "b": None}}}
    row = {"messages": [*messages("Q", "I look."), call, {"role": "tool", "content": {"x": 1}}, *messages("", "A")[1:]]}
    found = only(as_lines(tmp_path, [row]))
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}]
    assert [(turn.role, turn.text) for turn in found.turns] == [
        ("user", "Q"), ("assistant", "I look."), ("tool", '{"x": 1}'), ("assistant", "A")]  # fmt: skip
    assert json.loads(found.turns[1].calls) == calls
    last = only(as_lines(tmp_path, [{"messages": row["messages"][:3]}]))
    assert (last.answers, last.turns[-1].loss) == ((), True)  # learned, and not scored
    table = open_table(as_lines(tmp_path, [row]), tmp_path / "tables", on_bad_data="stop")
    assert (list(table), table.empty_answers()) == ([found], 0)


def test_frames_of_a_video_are_a_list_of_images(tmp_path):
    frames = ["1.jpg", "2.jpg", "3.jpg"]
    qa = messages("<image> or <video>?", "A")
    shown = items({"type": "video", "video": frames}, "Q")
    rows = [
        ({"messages": qa, "images": ["a.jpg"], "videos": [frames]}, ("a.jpg", *frames), (0, 3)),
        ({"messages": messages("Q", "A"), "video": frames}, tuple(frames), (3,)),
        ({"messages": messages("Q", "A"), "videos": [frames[:1], frames[1:]]}, tuple(frames), (1, 2)),
        ({"messages": messages(shown, "A")}, tuple(frames), (3,)),
        ({"messages": messages("Q", "A"), "video": "a.mp4"}, ("a.mp4",), ()),
    ]
    for row, images, sizes in rows:
        found = only(as_lines(tmp_path, [row]))
        assert (found.images, found.frames) == (images, sizes)
    for name in frames:
        (tmp_path / name).write_bytes(image())
    source = as_lines(tmp_path, [rows[1][0]], images=str(tmp_path))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert (table[0].frames, table.filmed().tolist()) == ((3,), [True])
    (tmp_path / "2.jpg").unlink()
    with pytest.raises(ValueError, match=r"image 2\.jpg: is not in "):
        open_table(source, tmp_path / "tables", on_bad_data="stop")


def test_boxes_stay_beside_their_markers(tmp_path):
    objects = {"ref": ["the dog"], "bbox": [[10, 20, 50, 40.5], [1, 2]], "bbox_type": "real", "image_id": [1]}
    row = {"messages": messages("<image><image>Where is <ref-object>?", "At <bbox>, not <bbox>."), "images": ["a", "b"]}
    found = only(as_lines(tmp_path, [row | {"objects": objects}]))
    assert json.loads(found.boxes) == {
        "bbox": objects["bbox"], "ref": ["the dog"], "norm1": False, "image": [1, 0]}  # fmt: skip
    assert (found.turns[-1].text, found.answers) == ("At <bbox>, not <bbox>.", ())
    assert only(as_lines(tmp_path, [row])).boxes == ""
    assert only(as_parquet(tmp_path, [row | {"objects": objects}])).boxes == found.boxes.replace(
        "10, 20, 50", "10.0, 20.0, 50.0"
    ).replace("[1, 2]", "[1.0, 2.0]")
