"""Tools, their calls and conversations out of the ordinary, as published chat templates render the same messages."""

import json
from functools import cache

import pytest

from dora_mm.config.models import VLMModelConfig
from dora_mm.models.chat_templates import rendering_on
from dora_mm.models.vl.vlm.chat import render, render_prompt
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.loading import load_processor
from dora_mm.utils.day import Day
from tests.documented.trl_labels import PAGE, PUBLISHED, with_template
from tests.shared.data.chats import as_lines, only
from tests.shared.data.tool_rows import ANSWER, ROWS, SAID, TOOL

TEMPLATES = json.loads(PAGE.read_text(encoding="utf-8"))["templates"]


@pytest.fixture(scope="module")
def processor_of(tiny_vlm):
    """A processor with a published template, by the name of that; loaded once."""

    @cache
    def loaded(name):
        processor = load_processor(VLMModelConfig(path=str(tiny_vlm(PUBLISHED[name]))))
        return with_template(processor, name, TEMPLATES[name])

    return loaded


@pytest.fixture(autouse=True)
def some_day():
    """For the template that writes it."""
    with rendering_on(Day("2026-12-01")):
        yield


def without_ids(example):
    """The turns without the ids of calls, which only some files have."""
    return [
        turn._replace(calls=[call | {"id": None} for call in json.loads(turn.calls or "[]")]) for turn in example.turns
    ]


@pytest.mark.parametrize("form", ROWS)
def test_all_forms_of_calls_are_one_conversation(tmp_path, form):
    expected = only(as_lines(tmp_path, [ROWS["templates"]]))
    found = only(as_lines(tmp_path, [ROWS[form]]))
    assert without_ids(found) == without_ids(expected)
    assert (found.tools, found.answers) == (expected.tools, (ANSWER["content"],))
    assert [turn.loss for turn in found.turns] == [False, True, False, False, True]


TAKES_TOOLS = {  # what is learned, the white space that Qwen3.5 writes behind its thoughts included
    "qwen3_vl": '<tool_call>\n{"name": "weather", "arguments": {"place": "Rom"}}\n</tool_call>\n',
    "qwen3_5_think": "\n</think>\n\n<tool_call>\n<function=weather>\n<parameter=place>\nRom\n</parameter>\n",
    "qwen3_5_nothink": "<tool_call>\n<function=weather>\n<parameter=place>\nRom\n</parameter>\n",
    "lfm2_2_5_vl": "<|tool_call_start|>[weather(place='Rom'), weather(place='Ulm')]<|tool_call_end|><|im_end|>",
    "muse_glimmer": ' to=weather<|message|><atem:function_calls>\n<atem:invoke name="weather">\n',
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_learned_as_the_template_writes_them(tmp_path, processor_of, name):
    processor, row = processor_of(name), only(as_lines(tmp_path, [ROWS["OpenAI"]]))
    if name not in TAKES_TOOLS:
        with pytest.raises(ValueError, match=r"does not show a tool, 'weather'|refuses a conversation: "):
            render(processor, row.turns, row.tools)
        return
    text, [(start, end), (_, last)], _ = render(processor, row.turns, row.tools)
    assert text == processor.apply_chat_template(SAID, tools=[TOOL], tokenize=False)
    assert text[start:end].startswith(TAKES_TOOLS[name])
    assert text[:start] == processor.apply_chat_template(
        SAID[:1], tools=[TOOL], tokenize=False, add_generation_prompt=True
    )
    assert text[last - 40 : last].count(ANSWER["content"]) == 1
    assert text.startswith(render_prompt(processor, row.turns[:1], row.tools))


@pytest.mark.parametrize("name", ["qwen2_5_vl"])
def test_a_template_that_leaves_out_calls_is_refused(tmp_path, processor_of, name):
    row = only(as_lines(tmp_path, [{"messages": SAID}]))
    with pytest.raises(ValueError, match=r"the chat template does not show the call of a tool, 'weather'"):
        render(processor_of(name), row.turns)


ODD = {  # conversations, and whose templates refuse them
    "two questions": (("user", "A?"), ("user", "B?"), ("assistant", "b")),
    "an answer first": (("assistant", "Hello."), ("user", "B?"), ("assistant", "b")),
    "an empty answer": (("user", "A?"), ("assistant", ""), ("user", "B?"), ("assistant", "b")),
    "an empty last answer": (("user", "A?"), ("assistant", "a"), ("user", "B?"), ("assistant", "")),
    "developer": (("developer", "Be brief."), ("user", "B?"), ("assistant", "b")),
}
REFUSED = {("two questions", "gemma3"), ("an answer first", "gemma3")}
REFUSED |= {("an answer first", f"qwen3_5_{kind}") for kind in ("think", "nothink")}  # which asks for a question first
# Qwen3.5 shows an earlier answer otherwise than it was written: behind an empty thought, which it then drops
OTHERWISE = {
    (f"an empty {kind}", f"qwen3_5_{way}") for kind in ("answer", "last answer") for way in ("think", "nothink")
}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", ODD)
def test_conversations_out_of_the_ordinary_are_rendered_as_they_are(tmp_path, processor_of, case, name):
    said = [{"role": role, "content": text} for role, text in ODD[case]]
    turns, processor = only(as_lines(tmp_path, [{"messages": said}])).turns, processor_of(name)
    if (case, name) in REFUSED:
        with pytest.raises(ValueError, match="the chat template refuses a conversation: "):
            render(processor, turns)
        return
    items = [
        {"role": one["role"].replace("developer", "system"), "content": [{"type": "text", "text": one["content"]}]}
        for one in said
    ]
    text, spans, _ = render(processor, turns)
    if (case, name) not in OTHERWISE:
        assert text.rstrip() == processor.apply_chat_template(items, tokenize=False).rstrip()
    learned = [turn.text for turn in turns if turn.role == "assistant" and turn.text]
    assert [learned[n] in text[start:end] for n, (start, end) in enumerate(spans)] == [True] * len(learned)


def test_a_row_with_tools_is_asked_and_learned(tmp_path, tiny_vlm):
    """Of the whole way to tokens: what is in front of the answer begins the row."""
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm("qwen3_vl"))))
    with_template(vlm.rows.processor, "qwen3_vl", TEMPLATES["qwen3_vl"])
    row = only(as_lines(tmp_path, [ROWS["ms-swift"]]))
    asked, whole = (vlm.rows.row("chat", row, None, answer).inputs["input_ids"][0] for answer in (None, "20"))
    processor = vlm.rows.processor
    expected = processor.apply_chat_template(SAID[:-1], tools=[TOOL], tokenize=False, add_generation_prompt=True)
    assert processor.tokenizer.decode(asked) == expected
    assert processor.tokenizer.decode(whole).startswith(expected)
