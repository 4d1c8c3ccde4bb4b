"""Which tokens of a conversation carry loss, against expectations written by hand."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.answers import ModelAnswer, texts_of
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.models.vl.vlm.chat import chat_template, render, render_prompt
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.loading import load_processor
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl import templates

TURNS = (
    Turn("user", f"{IMAGE}\nWhat is it?", False),
    Turn("assistant", "A red ball.", True),
    Turn("user", "And this?", False),
    Turn("assistant", "Nothing.", True),
)
TEXTS = {  # what is learned is between [ and ]
    "llava": "USER: <image>\nWhat is it? ASSISTANT:[ A red ball.</s>] USER: And this? ASSISTANT:[ Nothing.</s>] ",
    "qwen2_5_vl": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nWhat is it?<|im_end|>\n"
        "<|im_start|>assistant\n[A red ball.<|im_end|>]\n"
        "<|im_start|>user\nAnd this?<|im_end|>\n<|im_start|>assistant\n[Nothing.<|im_end|>]\n"
    ),
    "mllama": (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n<|image|>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[A red ball.<|eot_id|>]"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n[Nothing.<|eot_id|>]"
    ),
    "smolvlm": (
        "<|im_start|>User:<image>\nWhat is it?<end_of_utterance>\nAssistant:[ A red ball.<end_of_utterance>]\n"
        "User: And this?<end_of_utterance>\nAssistant:[ Nothing.<end_of_utterance>]\n"
    ),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("pictures"))


@pytest.fixture
def processor(tiny_vlm, request):
    return load_processor(VLMModelConfig(path=str(tiny_vlm(request.param))))


def marked(rendered) -> str:
    text, spans, _ = rendered
    for start, end in reversed(spans):
        text = f"{text[:start]}[{text[start:end]}]{text[end:]}"
    return text


@pytest.mark.parametrize(("processor", "expected"), TEXTS.items(), indirect=["processor"])
def test_answers_are_marked_in_the_text(processor, expected):
    assert marked(render(processor, TURNS)) == expected


@pytest.mark.parametrize(("processor", "expected"), TEXTS.items(), indirect=["processor"])
def test_an_answer_continues_the_prompt_that_asks_for_it(processor, expected):
    text, [first, second], _ = render(processor, TURNS)
    assert text[: first[0]] == render_prompt(processor, TURNS[:1])
    assert text[: second[0]].startswith(text[: first[1]])


@pytest.mark.parametrize("processor", ["llava_onevision"], indirect=True)
def test_a_template_that_renders_answered_turns_in_another_way(processor):
    """It has a space and a line break where the prompt has a line break alone."""
    text, [(start, end), _], _ = render(processor, TURNS)
    assert text[:start] == render_prompt(processor, TURNS[:1])
    assert text[start:end] == "A red ball.<|im_end|>"


@pytest.mark.parametrize("processor", TEXTS, indirect=True)
def test_turns_without_loss_are_read_only(processor):
    turns = (TURNS[0], TURNS[1]._replace(loss=False), *TURNS[2:])
    text, spans, ends = render(processor, TURNS)
    assert render(processor, turns) == (text, spans[1:], ends)


PAGES = f"Page 1:\n{IMAGE}\n\n Page 2:\r\n{IMAGE}\n"


@pytest.mark.parametrize(
    ("processor", "expected"),
    {
        "smolvlm": "User: Page 1:\n<image>\n\n Page 2:\r\n<image>\n<end_of_utterance>",
        "qwen2_5_vl": "user\nPage 1:\n<|vision_start|><|image_pad|><|vision_end|>\n\n Page 2:\r\n<|vision_start|>",
        "mllama": "<|end_header_id|>\n\nPage 1:\n<|image|>\n\n Page 2:\r\n<|image|>\n<|eot_id|>",
        "internvl": "user\nPage 1:\n<IMG_CONTEXT>\n\n\n Page 2:\r\n<IMG_CONTEXT>\n\n<|im_end|>",  # writes one itself
    }.items(),
    indirect=["processor"],
)
def test_what_is_written_beside_images_stays(processor, expected):
    assert expected in render_prompt(processor, [Turn("user", PAGES, False)])


@pytest.mark.parametrize("processor", ["llava", "fast_vlm"], indirect=True)
def test_a_line_break_that_the_template_writes_behind_the_images_of_a_turn_is_not_written_twice(processor):
    """As LLaVA's files have it, "<image>\\nQ", and its own template."""
    once = render_prompt(processor, [Turn("user", f"{IMAGE}{IMAGE}What?\n", False)])
    assert "<image>\nWhat?\n" in once
    for text in (f"{IMAGE}\n{IMAGE}\nWhat?\n", f"{IMAGE}{IMAGE}\r\nWhat?\n"):
        assert render_prompt(processor, [Turn("user", text, False)]) == once
    assert "<image>\n\nWhat?" in render_prompt(processor, [Turn("user", f"{IMAGE}\n\nWhat?", False)])


def vlm(folder, **settings) -> VLM:
    return VLM(VLMModelConfig(path=str(folder), **settings))


@pytest.mark.parametrize("name", [*TEXTS, "gemma3", "internvl", "qwen3_vl", "idefics3", "fast_vlm"])
def test_the_labels_are_the_answers_and_their_ends(name, tiny_vlm, images):
    model = vlm(tiny_vlm(name))
    row = model.rows.row(
        "chat", Example("1", ("wide.png",), "And this?", ("Nothing.",), (1.0,), turns=TURNS), images, ""
    )
    learned = model.rows.processor.tokenizer.decode(row.labels[row.labels != IGNORED])
    ends = {"llava": "</s>", "mllama": "<|eot_id|>", "gemma3": "<end_of_turn>"}
    ends |= dict.fromkeys(("smolvlm", "idefics3"), "<end_of_utterance>")
    end = ends.get(name, "<|im_end|>")
    assert "".join(learned.split()) == f"Aredball.{end}Nothing.{end}"
    assert (row.labels[row.labels != IGNORED] == row.inputs["input_ids"][0][row.labels != IGNORED]).all()


@settings(max_examples=25)
@given(st.lists(st.text("abc dé\n.?☃", min_size=1).filter(str.strip), min_size=1, max_size=3))
def test_any_answers_come_back(answers):
    turns = [t for text in answers for t in (Turn("user", "q", False), Turn("assistant", text, True))]
    text, spans, _ = render(SIMPLE, turns)
    assert [text[start:end] for start, end in spans] == [f"{answer.strip()}</s>" for answer in answers]


def of(name: str, tiny_vlm, template: str, *tokens: str):
    """A processor with another template, and special tokens of its own."""
    processor = load_processor(VLMModelConfig(path=str(tiny_vlm(name))))
    processor.chat_template = template
    processor.tokenizer.add_tokens(list(tokens), special_tokens=True)
    return processor


def asked(*texts: str, system: str | None = None) -> list[Turn]:
    turns = [Turn(("user", "assistant")[n % 2], text, n % 2 == 1) for n, text in enumerate(texts)]
    return [*([Turn("system", system, False)] if system else []), *turns]


PHI = ("<|user|>", "<|assistant|>", "<|end|>")
PHI_TEXT = (
    "<|user|><|image_pad|>\nWhat is it?<|end|><|assistant|>[A red ball.<|end|>]"
    "<|user|>And this?<|end|><|assistant|>[Nothing.<|end|><|im_end|>]"
)


def test_the_template_of_a_tokenizer_serves_where_the_processor_has_none(tiny_vlm, tmp_path):
    """Phi-4-multimodal has its template in tokenizer_config.json; its end of sequence follows the last turn alone."""
    folder = shutil.copytree(tiny_vlm("qwen2_5_vl"), tmp_path / "model")
    (folder / "chat_template.jinja").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": templates.PHI_4}))
    vlm = VLM(VLMModelConfig(path=str(folder)))
    assert vlm.rows.processor.chat_template is None
    vlm.rows.processor.tokenizer.add_tokens(list(PHI), special_tokens=True)
    assert vlm.converses
    assert marked(render(vlm.rows.processor, TURNS)) == PHI_TEXT
    row = vlm.rows.row("chat", Example("1", (), "And this?", ("Nothing.",), (1.0,), turns=TURNS[2:]), None, "Nothing.")
    assert vlm.rows.processor.tokenizer.decode(row.labels[row.labels != IGNORED]) == "Nothing.<|end|><|im_end|>"


def test_of_several_templates_the_default_one_is_read(tiny_vlm):
    processor = of("qwen2_5_vl", tiny_vlm, "", *PHI)
    processor.chat_template = {"rag": templates.TEXT, "default": templates.PHI_4, "tool_use": "{{ tools[0].name }}"}
    assert marked(render(processor, TURNS)) == PHI_TEXT
    assert chat_template(processor, tools=True) == "{{ tools[0].name }}"
    processor.chat_template = {"rag": "", "tool_use": ""}
    with pytest.raises(
        ValueError, match="^model.path: the model has chat templates named rag, tool_use, and no default"
    ):
        chat_template(processor)


def test_a_system_turn_is_given_as_text_where_the_template_would_print_a_list(tiny_vlm):
    processor = of("mllama", tiny_vlm, templates.LLAMA3_2)
    for question in ("Q", f"{IMAGE}\nQ"):
        text = marked(render(processor, asked(question, "A", system="Be brief.")))
        image = "<|image|>\n" if IMAGE in question else ""
        assert text == (
            "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
            f"<|start_header_id|>user<|end_header_id|>\n\n{image}Q<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n[A<|eot_id|>]"
        )


def test_a_question_that_the_items_lose_is_given_as_text(tiny_vlm):
    """The system turn, which a template sets in front of the last question, is where it is when an answer is asked."""
    processor = of("llava", tiny_vlm, templates.PIXTRAL.replace("[IMG]", "<image>"))
    turns = asked(f"{IMAGE}\nQ", "A", "Q2", "A2", system="Be brief.")
    prompt = "<s>[INST]Be brief.\n\n<image>\nQ[/INST]"
    assert render_prompt(processor, turns[:2]) == prompt
    assert marked(render(processor, turns)) == f"{prompt}[A</s>][INST]Be brief.\n\nQ2[/INST][A2</s>]"


def test_a_text_that_no_form_of_contents_shows_is_one_sentence(tiny_vlm):
    processor = of("llava", tiny_vlm, templates.LLAVA.replace("message in messages", "message in messages[-1:]"))
    with pytest.raises(ValueError, match="^the chat template leaves out the text of a turn of the system$"):
        render_prompt(processor, asked("Q", system="Be brief."))


THOUGHT = "<think>\nShort.\n</think>\n\n"


def test_thoughts_that_a_template_drops_from_earlier_turns_are_not_learned_and_all_else_is(tiny_vlm):
    processor = of("qwen2_5_vl", tiny_vlm, templates.QWEN3_5)
    before, start, end = "<|im_start|>user\nQ<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>"
    after = f"\n<|im_start|>user\nQ2{end}\n{start}<think>\n"
    for first, expected in {
        "A": f"{before}{start}<think>\n[\n</think>\n\nA{end}]{after}",
        f"{THOUGHT}A": f"{before}{start}A{end}{after}",
    }.items():
        for second, learned in {"A2": "[\n</think>\n\nA2", f"{THOUGHT}A2": "[Short.\n</think>\n\nA2"}.items():
            assert marked(render(processor, asked("Q", first, "Q2", second))) == f"{expected}{learned}{end}]\n"
    single = asked("Q", "<think>Short.</think>A")
    assert marked(render(processor, single)) == f"{before}{start}<think>\n[Short.\n</think>\n\nA{end}]\n"
    unlearned = [*asked("Q", f"{THOUGHT}A", "Q2"), Turn("assistant", "A2", False)]
    with pytest.raises(ValueError, match="does not render this answer as it is"):
        render(processor, unlearned)


def test_a_short_answer_has_room_to_end_its_thought_which_is_no_part_of_it(tiny_vlm, monkeypatch):
    model = vlm(tiny_vlm("qwen2_5_vl"))
    longest = []
    written = torch.tensor([model.prompts.processor.tokenizer("\n</think>\n\nred")["input_ids"]])

    def generate(inputs, settings):
        longest.append(settings.max_new_tokens)
        return written

    monkeypatch.setattr(model.network, "generate", generate)
    row = Example("1", (), "Q", ("red",), (1.0,))
    assert texts_of(model.answerer("vqa", DecodeConfig(), ())([row], None)) == ["red"]
    thought = replace(row, answers=("<think>x</think>red",))
    assert texts_of(model.answerer("chat", DecodeConfig(), ())([thought], None)) == ["</think>\n\nred"]
    model.prompts.processor.chat_template = templates.QWEN3_5
    assert texts_of(model.answerer("vqa", DecodeConfig(), ())([row], None)) == ["red"]
    opening = model.prompts.processor.tokenizer("\n</think>\n\n")["input_ids"]
    assert longest == [16, 256, 16 + len(opening)]


@pytest.mark.parametrize(
    ("begin", "end", "own"),
    [("[THINK]", "[/THINK]", False), ("<|channel>", "<channel|>", False), ("<hm>", "</hm>", True)],
)
def test_thoughts_between_special_tokens_are_taken_off(tiny_vlm, monkeypatch, begin, end, own):
    model = vlm(tiny_vlm("qwen2_5_vl"))
    tokenizer = model.prompts.processor.tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": [begin, end]}, replace_extra_special_tokens=False)
    if own:
        tokenizer.response_template = {"fields": {"reasoning_content": {"open": begin, "close": end}}}
    kind = "thought" if begin == "<|channel>" else ""
    written = tokenizer(f"{begin}{kind} green? {end} red")["input_ids"]
    monkeypatch.setattr(model.network, "generate", lambda *_: torch.tensor([[*written, tokenizer.eos_token_id]]))
    (answer,) = model.answerer("vqa", DecodeConfig(), ())([Example("1", (), "Q", ("red",), (1.0,))], None)
    assert answer == ModelAnswer("red", f"{begin}{kind} green? {end} ", "stop")
    (kept,) = model.answerer("vqa", DecodeConfig(keep_thoughts=True), ())([Example("1", (), "Q", ("red",))], None)
    assert kept == ModelAnswer(f"{begin}{kind} green? {end} red", "", "stop")


def test_an_answer_that_is_cut_in_the_thought_of_its_prompt_is_missing(tiny_vlm, monkeypatch):
    model = vlm(tiny_vlm("qwen2_5_vl"))
    tokenizer = model.prompts.processor.tokenizer
    model.prompts.processor.chat_template = templates.QWEN3_5
    written = [tokenizer("it is red")["input_ids"], [*tokenizer("it is red")["input_ids"], tokenizer.eos_token_id]]
    monkeypatch.setattr(model.network, "generate", lambda *_: torch.tensor([written.pop(0)]))
    answer, row = model.answerer("vqa", DecodeConfig(), ()), Example("1", (), "Q", ("red",), (1.0,))
    assert answer([row], None) == [ModelAnswer("", "it is red", "length")]
    assert answer([row], None) == [ModelAnswer("it is red", ended="stop")]


def test_a_turn_ends_by_the_token_of_the_next_role(tiny_vlm):
    processor = of("qwen2_5_vl", tiny_vlm, templates.GLM, "<|user|>", "<|assistant|>", "<|image|>")
    expected = "[gMASK]<sop><|user|>\nQ<|assistant|>\n[A<|user|>]\nQ2<|assistant|>\n[A2<|user|>]"
    assert marked(render(processor, asked("Q", "A", "Q2", "A2"))) == expected


def test_an_answer_that_its_question_has_or_the_template(tiny_vlm):
    processor = of("qwen2_5_vl", tiny_vlm, templates.QWEN3_5)
    for answer in ("user", "think", "Q", "im_end"):
        text = marked(render(processor, asked("Q", answer, "user Q", answer)))
        assert text.count(f"</think>\n\n{answer}<|im_end|>]") == 2


def test_a_literal_marker_is_text(tiny_vlm):
    """Where the model has another image token; else the row is refused, since its text has places for two images."""
    turns = asked(f"{IMAGE}\nIs \\<image> a tag?", "\\<image> is.")
    assert "Is <image> a tag?" in marked(render(of("qwen2_5_vl", tiny_vlm, templates.QWEN3_5), turns))
    assert "[\n</think>\n\n<image> is.<|im_end|>]" in marked(
        render(of("qwen2_5_vl", tiny_vlm, templates.QWEN3_5), turns)
    )


class Simple:
    """A processor with the simplest template, which trims what is said."""

    chat_template = "simple"

    class tokenizer:  # noqa: N801
        chat_template = None
        eos_token = "</s>"
        all_special_tokens = ("</s>",)

        @staticmethod
        def get_added_vocab() -> dict[str, int]:
            return {}

    @staticmethod
    def apply_chat_template(messages, chat_template, add_generation_prompt, tokenize):
        said = [f"<{m['role']}>{''.join(part['text'] for part in m['content']).strip()}" for m in messages]
        return "".join(said) + "<assistant>" * add_generation_prompt


SIMPLE = Simple()
