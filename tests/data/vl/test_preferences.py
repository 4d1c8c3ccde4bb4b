"""Pairs of answers: the shapes of TRL, ms-swift and LLaMA-Factory become the same examples; bad rows are named."""

import json

import pytest

from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import Example
from dora_mm.data.vl.readers import format_name
from dora_mm.data.vl.readers.preferences import find_pair_shape, read_preferences
from dora_mm.data.vl.report import cheap_lengths
from dora_mm.data.vl.rows import BadRows
from dora_mm.data.vl.tables import open_table
from tests.shared.data.chats import as_json, as_lines, as_parquet, items, messages, said, turns

Q, A, B = "What is it?", "A dog.", "I do not know."
ASKED, CHOSEN, REJECTED = messages(f"<image>{Q}"), messages("", A)[1:], messages("", B)[1:]
WITH_ITEMS = messages(items({}, Q))
SHAPES = {
    "TRL (prompt": {"prompt": WITH_ITEMS, "chosen": CHOSEN, "rejected": REJECTED, "images": ["a.jpg"]},
    "TRL (prompt, texts": {"prompt": f"<image>{Q}", "chosen": A, "rejected": B, "image": "a.jpg"},
    "TRL (chosen": {"chosen": ASKED + CHOSEN, "rejected": ASKED + REJECTED, "images": ["a.jpg"]},
    "TRL (chosen, with more": {  # ultrafeedback_binarized
        "prompt": Q,
        "chosen": ASKED + CHOSEN,
        "rejected": ASKED + REJECTED,
        "messages": ASKED + CHOSEN,
        "images": ["a.jpg"],
    },
    "ms-swift": {"messages": ASKED + CHOSEN, "rejected_response": B, "images": ["a.jpg"]},
    "ms-swift (messages, r": {
        "messages": ASKED + CHOSEN,
        "images": ["a.jpg"],
        "rejected_messages": ASKED + REJECTED,
        "rejected_images": ["a.jpg"],
    },
    "ms-swift (query": {"query": f"<image>{Q}", "response": A, "rejected_response": B, "images": ["a.jpg"]},
    "LLaMA-Factory (conv": {
        "conversations": said(f"<image>{Q}"),
        "chosen": {"from": "gpt", "value": A},
        "rejected": {"from": "gpt", "value": B},
        "images": ["a.jpg"],
    },
    "RLHF-V": {  # openbmb/RLHF-V-Dataset
        "ds_name": "RLHF-V",
        "text": json.dumps({"question": f"<image>{Q}", "chosen": A, "rejected": B}),
        "image": "a.jpg",
    },
    "LLaMA-Factory (mess": {"messages": ASKED, "chosen": CHOSEN[0], "rejected": REJECTED[0], "images": ["a.jpg"]},
    "LLaMA-Factory (instr": {
        "instruction": "<image>",
        "input": Q,
        "chosen": A,
        "rejected": B,
        "images": ["a.jpg"],
    },
}


def pairs(source: SourceConfig) -> SourceConfig:
    return source.model_copy(update={"format": "preferences"})


def read(source: SourceConfig) -> list[Example]:
    return list(read_preferences(pairs(source), BadRows("stop")))


@pytest.mark.parametrize("write", [as_json, as_lines, as_parquet])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_kind_of_file_gives_the_same_example(tmp_path, shape, write):
    source = write(tmp_path, [{"id": "x", **SHAPES[shape]}])
    (example,) = read(source)
    asked = f"<image>\n{Q}" if "instr" in shape else f"<image>{Q}"
    text = Q
    expected = Example("x", ("a.jpg",), text, (A,), (1.0,), turns=turns(asked, A), rejected=turns(asked, B))
    assert example == expected
    assert find_pair_shape(tmp_path / source.file).name.startswith(shape.partition(",")[0].partition(" (")[0])
    other = example.with_rejected()
    assert (other.turns, other.answers, other.rejected) == (turns(asked, B), (B,), ())


def test_only_what_follows_the_shared_turns_is_learned(tmp_path):
    before = messages("One?", "1", "Two?")
    rows = [
        {"prompt": before, "chosen": messages("", "2")[1:], "rejected": messages("", "3", "Sure?", "yes")[1:]},
        {"messages": before + messages("", "2")[1:], "rejected_response": "3"},
    ]
    long, short = read(as_lines(tmp_path, rows[:1]))[0], read(as_lines(tmp_path, rows[1:]))[0]
    assert [turn.loss for turn in long.turns] == [False, False, False, True]
    assert [turn.loss for turn in long.rejected] == [False, False, False, True, False, True]
    assert short.turns == long.turns


def test_a_table_keeps_pairs_and_counts_the_longer_answer(tmp_path):
    rows = [
        {"prompt": "Q", "chosen": "A", "rejected": "a long answer"},
        {"prompt": "Q", "chosen": "AB", "rejected": "A"},
    ]
    source = pairs(as_lines(tmp_path, rows))
    table = open_table(source, tmp_path / "tables", on_bad_data="stop")
    assert list(table) == read(source)
    assert cheap_lengths(table).tolist() == [len("Qa long answer"), len("QAB")]
    assert format_name(source) == "preferences, TRL (prompt, chosen, rejected)"


def test_columns_have_other_names_and_turns_may_be_text(tmp_path):
    row = {"question": "Q", "better": '[1, 2] {"a"}', "worse": "[{]"}
    columns = {"prompt": "question", "chosen": "better", "rejected": "worse"}
    (example,) = read(as_lines(tmp_path, [row], columns=columns))
    assert (example.turns, example.rejected) == (turns("Q", '[1, 2] {"a"}'), turns("Q", "[{]"))
    text = '[{"role": "assistant", "content": "%s"}]'
    (example,) = read(as_lines(tmp_path, [{"prompt": messages("Q"), "chosen": text % "A", "rejected": text % "B"}]))
    assert (example.turns, example.rejected) == (turns("Q", "A"), turns("Q", "B"))


BAD = [
    (
        {"prompt": "Q", "chosen": "A", "rejected": "A"},
        "has no chosen answer that is learned: it is empty, without loss",
    ),
    ({"prompt": "Q", "chosen": "A", "rejected": None}, "has no `rejected`, or an empty one"),
    ({"prompt": "Q", "chosen": " ", "rejected": "B"}, "has no chosen answer that is learned"),
    (
        {"prompt": messages("Q"), "chosen": messages("", "A", "Q")[1:], "rejected": REJECTED},
        "has no chosen answer behind",
    ),
    ({"prompt": 7, "chosen": "A", "rejected": "B"}, "has no list of turns that each have `role`"),
    ({"prompt": "Q", "chosen": "A", "rejected": "B", "kto_tag": True}, "has kto_tag, but verdicts on single answers"),
    (
        {"prompt": "Q<bbox>", "chosen": "A", "rejected": "B", "objects": {"bbox": [[1, 2]]}},
        "has `objects`, and boxes are not read beside preferences",
    ),
]


@pytest.mark.parametrize(("row", "reason"), BAD, ids=[reason for _, reason in BAD])
def test_a_bad_row_is_named_and_can_be_skipped(tmp_path, row, reason):
    good = {"prompt": "Q", "chosen": "A", "rejected": "B"}
    source = pairs(as_lines(tmp_path, [good, row]))
    with pytest.raises(ValueError, match="line 2") as error:
        list(read_preferences(source, BadRows("stop")))
    assert f": {reason}" in str(error.value)
    bad = BadRows("skip")
    assert len(list(read_preferences(source, bad))) == 1
    assert next(iter(bad.found)).startswith(reason)


@pytest.mark.parametrize("key", ["rejected_images", "rejected_tools"])
def test_a_rejected_answer_to_other_images_or_tools_is_refused(tmp_path, key):
    value = {"rejected_images": ["b.jpg"], "rejected_tools": '[{"type": "function", "function": {"name": "f"}}]'}[key]
    for more in ({"rejected_messages": ASKED + REJECTED}, {"rejected_response": B}):
        row = {"messages": ASKED + CHOSEN, "images": ["a.jpg"], key: value, **more}
        with pytest.raises(ValueError, match="has other images, videos or tools with its rejected answer"):
            read(as_lines(tmp_path, [row]))


def test_a_file_of_no_known_shape_says_how_columns_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"no known shape of preferences: .*'better'.*columns: \{prompt: question, cho"
    ):
        read(as_lines(tmp_path, [{"question": "Q", "better": "A", "worse": "B"}]))
