"""Conversations: the shapes of all trainers become the same examples."""

import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.data.vl.example import IMAGE, Example
from dora_mm.data.vl.readers.chat import find_shape
from dora_mm.data.vl.tables import open_table
from dora_mm.tasks.vl import sample_answer
from tests.shared.data.chats import QA, as_json, as_lines, as_parquet, items, messages, only, read, refusal, said, turns

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
    ("Image 1: <img>b.jpg</img>\nQ <image>", ["a.jpg"], ("Image 1: <image>\nQ <image>", ("b.jpg", "a.jpg"))),
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
    assert sample_answer(table[0], 0.5) == ("", 1.0)
    assert sample_answer(table[1], 0.5) == ("", 0.0)


def test_a_video_is_found_by_its_id(tmp_path):
    """VATEX and ActivityNet name videos without their suffix, beside files that have it."""
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "v_abc.mp4").touch()
    (tmp_path / "videos" / "cover.png").touch()
    rows = [{"query": "Q", "response": "A", "vid": "v_abc"}, {"query": "Q", "response": "A", "vid": None}]
    source = as_lines(tmp_path, rows, images=str(tmp_path / "videos"), columns={"video": "vid"})
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert [row.images for row in table] == [("v_abc.mp4",), ()]
    assert table.filmed().tolist() == [True, False]
    other = as_lines(tmp_path, [*rows, {**rows[0], "vid": "v_xyz"}], images=source.images, columns=source.columns)
    with pytest.raises(ValueError, match="v_xyz: is not in"):
        open_table(other, tmp_path / "tables", on_bad_data="stop")


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
