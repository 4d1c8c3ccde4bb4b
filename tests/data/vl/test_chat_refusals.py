"""Conversations: each bad row is named by its place and its reason."""

import pytest

from dora_mm.data.vl.readers.chat import read_chat
from dora_mm.data.vl.report import table_figures
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.shared.data.chats import as_json, as_lines, items, llava, messages, refusal, said

OTHER = [
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "has chosen: preferences are read by task: preference"),
    ({"messages": messages("Q", "A"), "rejected_response": "B"}, "has rejected_response: preferences are read by"),
    ({"texts": "Q"}, "has no list of `texts`"),
    ({"query": "Q", "response": "A", "history": ["Q"]}, "has a `history` that is no list of pairs"),
    ({"instruction": ["Q"], "output": "A"}, "has a instruction or input that is not a text"),
]


@pytest.mark.parametrize(("row", "reason"), OTHER, ids=[reason for _, reason in OTHER])
def test_a_bad_row_of_another_shape_is_named(tmp_path, row, reason):
    assert refusal(as_lines(tmp_path, [row])).startswith(f", line 1: {reason}")


BAD = [
    (llava("<image>Q", "A", image=["a.jpg", "b.jpg"]), "has 2 images, but 1 <image> marker"),
    (llava("<image> <image>", "A", image="a.jpg"), "has 1 image, but 2 <image> markers"),
    (llava("<image>Q", "A"), "has 0 images, but 1 <image> marker"),
    (llava("<image>Q", "A <image>", image=["a.jpg", "b.jpg"]), "has an image in a turn of the assistant"),
    (llava(" ", "A"), "has an empty turn of the user"),
    (llava(), "has no turns"),
    (llava(system="S"), "has no turns"),
    (llava("Q", "A", system=7), "has a turn whose `system` is not a text"),
    (llava("Q", "A") | {"conversations": said("Q", "A")[1:]}, "has no turn of the user"),
    (llava() | {"conversations": said("Q", "A") + said("Q", "B")[1:]}, "has two turns of the assistant in a row"),
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
        "has tool calls that are not valid JSON",
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
    (llava("Q", "A", videos=[7]), "has a video that is neither the path of a file nor a list of its frames"),
    (llava("Q", "A", videos=[["a.jpg", 7]]), "has an image that is neither a path nor the bytes of a file"),
    (llava("Q", "A", video="https://x.org/a.mp4"), "names a video by its address on the network: download"),
    (llava("Q", "A", video="a.mp4", videos=["b.mp4"]), "has both video and videos"),
    (llava("Q", "A", audios=["a.wav"]), "has audios, but sounds are not read"),
    (llava("Q", "A", objects={"bbox": [[1, 2, 3, 4]]}), "has 1 `bbox` in its objects, but 0 <bbox> markers"),
    (llava("Q <bbox>", "<bbox>", objects={"bbox": [[1, 2]]}), "has 1 `bbox` in its objects, but 2 <bbox> markers"),
    (llava("<ref-object>", "A", objects={"ref": ["a", "b"]}), "has 2 `ref`s in its objects, but 1 <ref-object> marker"),
    (llava("Q", "A", objects=[[1, 2, 3, 4]]), "has `objects` that are no object with `bbox` and `ref`"),
    (llava("Q", "<bbox>", objects={"bbox": [[1, 2, 3]]}), "has a `bbox` that is neither two numbers (x, y) nor four"),
    (llava("Q", "<bbox>", objects={"bbox": [[1, 2]], "bbox_type": "x"}), "has a `bbox_type` that is neither real"),
    (llava("Q", "A", bbox=[[1, 2, 3, 4]]), "has bbox, but boxes beside `objects` are not read"),
    (llava("Q", "A", tools=[{"type": "x"}]), "has `tools` that are not a list of functions with a `name`"),
    (llava("Q", "A", tools="{"), "has tools that are not valid JSON"),
    (llava("Q", "A", rejected_response="B"), "has rejected_response: preferences are read by"),
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
    (messages("Q", 7), "has a message whose content is neither a text nor a list"),
    (messages([{"type": "text", "text": 7}]), "has content whose text is not a text"),
    ({"role": "user"}, "has no list of turns that each have `role`"),
    (None, "has no list of turns that each have `role`"),
    (
        [*messages("Q"), {"role": "assistant", "content": None, "tool_calls": [{"f": 1}]}],
        "has a tool call without the `name` of a function",
    ),
    (
        [*messages("Q"), {"role": "tool_call", "content": {"name": "f", "arguments": "{"}}],
        "has a tool call whose `arguments` are not valid JSON",
    ),
    (
        [*messages("Q"), {"role": "tool_call", "content": {"name": "f", "arguments": "[1]"}}],
        "has a tool call whose `arguments` are not an object",
    ),
    ([{"role": "user", "content": "Q", "tool_calls": [{"name": "f"}]}], "has tool calls in a turn of 'user'"),
    ([*messages("Q"), {"role": "assistant", "content": "A", "weight": 0.5}], "has a `weight` that is neither true (1)"),
    ([*messages("Q"), {"role": "assistant", "content": "A", "train": "no"}], "has a `train` that is neither true (1)"),
    (
        [*messages("Q"), {"role": "assistant", "content": "A", "train": True, "loss": False}],
        "has loss and train in a message, which say different things",
    ),
    ([*messages("Q"), {"role": "assistant", "content": "A", "loss_scale": 2}], "has `loss_scale` in a message, which"),
]


@pytest.mark.parametrize(("content", "reason"), BAD_MESSAGES, ids=[reason for _, reason in BAD_MESSAGES])
def test_a_bad_message_is_named_by_its_line(tmp_path, content, reason):
    source = as_lines(tmp_path, [{"messages": messages("Q", "A")}, {"messages": content}])
    assert refusal(source).startswith(f", line 2: {reason}")


def test_skipped_rows_are_counted_in_the_table_and_its_report(tmp_path, caplog):
    rows = [llava("Q", "A", id=n) for n in range(3)]
    rows += [llava("Q", "A", id=n, audios=["v"]) for n in (7, 8)] + [llava(" ", "A", id=9)]
    source = as_json(tmp_path, rows)
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    assert "2 x has audios, but sounds are not read" in caplog.text
    assert f"{source.file}, item 5 (id 8)" in caplog.text
    figures = table_figures(source, table)
    assert figures["skipped: has audios, but sounds are not read: leave it out"] == "2"
    assert figures["skipped: has an empty turn of the user"] == "1"
    with pytest.raises(ValueError, match=r"rows\.json, item 4 \(id 7\): has audios"):
        open_table(source, tmp_path / "tables", on_bad_data="stop")
