"""Rows as models see them, against what a person would write down."""

import re
from dataclasses import replace

import pytest

from dora_mm.config.models import VLMModelConfig
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.data.vl.row_view import LONGEST, Piece, RowView
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.vlm_rows import write_images

TURNS = (
    Turn("user", f"{IMAGE}\nWhat is it?", False),
    Turn("assistant", "A red ball.", True),
    Turn("user", "And this?", False),
    Turn("assistant", "Nothing.", True),
)
CHAT = Example("1", ("wide.png",), "And this?", ("Nothing.",), (1.0,), turns=TURNS)
QUESTION = Example("2", ("wide.png",), "What colour is it?", ("blue", "red"), (0.3, 1.0))
SHOWN = {
    "llava": """\
  │ <s> USER: <image> x 4
  │ What is it? ASSISTANT:⟦ A red ball.</s>⟧ USER: And this? ASSISTANT:⟦ Nothing.</s>⟧ """,
    "qwen2_5_vl": """\
  │ <|im_start|>system
  │ You are a helpful assistant.<|im_end|>
  │ <|im_start|>user
  │ <|vision_start|><|image_pad|> x 2<|vision_end|>
  │ What is it?<|im_end|>
  │ <|im_start|>assistant
  │ ⟦A red ball.<|im_end|>⟧
  │ <|im_start|>user
  │ And this?<|im_end|>
  │ <|im_start|>assistant
  │ ⟦Nothing.<|im_end|>⟧
  │ """,
    "internvl": """\
  │ <|im_start|>user
  │ <img> <IMG_CONTEXT> x 20 </img>
  │ What is it?<|im_end|>
  │ <|im_start|>assistant
  │ ⟦A red ball.<|im_end|>⟧
  │ <|im_start|>user
  │ And this?<|im_end|>
  │ <|im_start|>assistant
  │ ⟦Nothing.<|im_end|>⟧
  │ """,
    "smolvlm": """\
  │ <|im_start|>User:<fake_token_around_image> <row_1_col_1> <image> x 4 ... 34 tokens in all ... <global-img> \
<image> x 4 <fake_token_around_image>
  │ What is it?<end_of_utterance>
  │ Assistant:⟦ A red ball.<end_of_utterance>⟧
  │ User: And this?<end_of_utterance>
  │ Assistant:⟦ Nothing.<end_of_utterance>⟧
  │ """,
}
ANSWERED = {
    "paligemma": "  │ <image> x 4<bos>answer en What colour is it?\n  │ ⟦red<eos>⟧",
    "florence2": "  │ <image> x 17<s>What colour is it?</s>\n  → ⟦<s>red</s>⟧",
    "blip_vqa": "  │ [CLS] what colour is it? [SEP]\n  → [DEC]⟦ red [SEP]⟧",
    "git": "  │ [CLS] what colour is it?⟦ red [SEP]⟧",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("pictures")))


def model(folder, **settings) -> VLM:
    return VLM(VLMModelConfig(path=str(folder), **settings))


@pytest.mark.parametrize(("name", "expected"), SHOWN.items())
def test_a_conversation(name, expected, tiny_vlm, images):
    heading, _, text = model(tiny_vlm(name)).row_view("chat", CHAT, images).text().partition("\n")
    assert text == expected
    assert re.fullmatch(r"\d+ tokens, \d+ for images, \d+ with loss", heading)


@pytest.mark.parametrize(("name", "expected"), ANSWERED.items())
def test_a_question_with_its_likeliest_answer(name, expected, tiny_vlm, images):
    assert model(tiny_vlm(name)).row_view("vqa", QUESTION, images).text().partition("\n")[2] == expected


def test_the_heading_counts_and_tells_what_was_cut(tiny_vlm, images):
    whole = model(tiny_vlm("llava")).row_view("chat", CHAT, images)
    row = model(tiny_vlm("llava")).rows.row("chat", CHAT, images, "")
    learned = int((row.labels >= 0).sum())
    assert whole.heading == f"{row.length} tokens, 4 for images, {learned} with loss"
    cut = model(tiny_vlm("llava"), max_length=row.length - 3).row_view("chat", CHAT, images)
    left = model(tiny_vlm("llava")).row_view("chat", replace(CHAT, turns=TURNS[:-2]), images)
    length = int(left.heading.split()[0])
    assert cut.heading == f"{left.heading}, {row.length - length} cut at the end, beyond {row.length - 3} " + (
        "(model.max_length): the last exchange"
    )
    assert whole.text().endswith("⟦ Nothing.</s>⟧ ")
    assert cut.text().partition("\n")[2] == left.text().partition("\n")[2]
    lost = model(tiny_vlm("llava"), max_length=7).row_view("chat", CHAT, images)
    end = "beyond 7 (model.max_length): the last exchange, left out: nothing of its answers is left"
    assert lost.heading.endswith(end)


def test_the_heading_of_a_text_that_was_cut(tiny_vlm, images):
    said = replace(CHAT, images=(), turns=(TURNS[0]._replace(text="What is it?"), *TURNS[1:]))
    row = model(tiny_vlm("llava")).rows.row("chat", said, images, "")
    learned = int((row.labels >= 0).sum())
    cut = model(tiny_vlm("llava"), max_length=row.length - 3).row_view("chat", said, images)
    assert cut.heading == f"{row.length - 3} tokens, 0 for images, {learned - 2} with loss, " + (
        f"3 cut at the end, beyond {row.length - 3} (model.max_length)"
    )
    assert re.search("⟦ Noth[ing]*⟧$", cut.text())


def test_turns_without_loss_are_not_marked(tiny_vlm, images):
    turns = (TURNS[0], TURNS[1]._replace(loss=False), *TURNS[2:])
    example = Example("1", ("wide.png",), "q", ("Nothing.",), (1.0,), turns=turns)
    text = model(tiny_vlm("qwen3_vl")).row_view("chat", example, images).text()
    assert text.count("⟦") == 1
    assert "⟦Nothing.<|im_end|>⟧" in text


def test_colours_begin_again_on_every_line():
    row = RowView("2 tokens", [Piece("a\n"), Piece("one\n\ntwo", learned=True), Piece("<image> x 2", is_image=True)])
    green, cyan, plain = "\x1b[1;32m", "\x1b[36m", "\x1b[0m"
    assert row.text(colour=True).split("\n") == [
        "2 tokens",
        "  │ a",
        f"  │ {green}⟦one{plain}",
        "  │ ",
        f"  │ {green}two⟧{plain}{cyan}<image> x 2{plain}",
    ]
    assert row.text() == "2 tokens\n  │ a\n  │ ⟦one\n  │ \n  │ two⟧<image> x 2"


def test_the_middle_of_a_long_text_is_left_out():
    text = RowView("", [Piece("a" * LONGEST + "b" * 5000, learned=True)]).text()
    assert text.endswith("b⟧")
    assert "[... 5,000 more characters ...]" in text
    assert len(text) < LONGEST + 100
