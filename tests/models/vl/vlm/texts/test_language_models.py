"""Decoder language models: their rows, what of them is learned, and what is refused."""

import pytest
import torch

from dora_mm.adapting.networks import adapt
from dora_mm.config.adapter import VLAdapterConfig
from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import Example, Turn
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM
from tests.shared.data.text_rows import BALL, BOOL, BOXES, QUESTION
from tests.shared.vl.language_models import LANGUAGE_MODELS

WRITTEN = {  # what is read and, between the marks, learned
    "llama": "<s> What colour is the ball?\n[red</s>]",
    "qwen2": "<|im_start|>user\nWhat colour is the ball?<|im_end|>\n<|im_start|>assistant\n[red<|im_end|>]\n",
    "gpt2": "What colour is the ball?\n[red<|endoftext|>]",
}
OFFICIAL = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n"
    "\n"
    "                ### Instruction:\n"
    "                is it?\n\nAnswer format: true/false\n"
    "                \n"
    "                ### Response:\n"
    "                "
)


@pytest.fixture
def open_model(tiny_vlm):
    return lambda name, **settings: VLM(VLMModelConfig(path=str(tiny_vlm(name)), **settings))


def marked(vlm, task, example):
    """A row as text, with marks around what has loss."""
    row = vlm.rows.row(task, example, None, example.answers[0])
    ids, learned = row.inputs["input_ids"][0], row.labels != IGNORED
    (places,) = torch.nonzero(learned, as_tuple=True)
    assert len(places) == int(places[-1] - places[0]) + 1
    start, end = int(places[0]), int(places[-1]) + 1
    decode = vlm.rows.processor.tokenizer.decode
    before, said = decode(ids[:start]), decode(ids[:end])
    return f"{before}[{said.removeprefix(before)}]{decode(ids).removeprefix(said)}"


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_the_answer_has_loss_and_its_end(name, open_model):
    assert marked(open_model(name), "chat", BALL) == WRITTEN[name]


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
@torch.no_grad()
def test_prompts_have_loss_where_that_is_chosen(name, open_model):
    """The loss is then that of transformers with the tokens as labels, as LLM-Adapters trains."""
    vlm = open_model(name, loss_over="prompts and answers")
    batch = vlm.batch("chat", [BALL], None, [("red", 1.0)])
    ids = batch.groups[0][0]["input_ids"]
    expected = vlm.model(input_ids=ids, labels=ids).loss
    torch.testing.assert_close(vlm.loss(batch, torch.Generator()).mean, expected)
    assert vlm.loss(batch, torch.Generator()).count == ids.shape[1] - 1
    only = open_model(name)
    assert only.loss(only.batch("chat", [BALL], None, [("red", 1.0)]), torch.Generator()).count < ids.shape[1] - 1


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_a_fresh_adapter_changes_no_bit_and_all_of_it_learns(name, open_model):
    vlm = open_model(name)
    batch = vlm.batch("chat", [BALL, BOXES], None, [("red", 1.0), ("two blue ones", 1.0)])
    ((inputs, labels, _),) = batch.groups
    with torch.no_grad():
        before = vlm.network.row_losses(inputs, labels)[0]
    config = VLAdapterConfig(rank=2)
    trained = adapt(vlm.networks, vlm.target_maps, config, seed=0, backend="torch")
    assert trained.reports["model"].num_modules == {"llama": 14, "qwen2": 14, "gpt2": 8}[name]
    with torch.no_grad():
        assert torch.equal(vlm.network.row_losses(inputs, labels)[0], before)
    optimizer = torch.optim.AdamW(trained.parameters.values(), lr=0.02)
    for _ in range(2):
        optimizer.zero_grad()
        vlm.loss(batch, torch.Generator()).mean.backward()
        optimizer.step()
    assert all(parameter.grad.any() for parameter in trained.parameters.values())


@pytest.mark.parametrize("name", LANGUAGE_MODELS)
def test_answers_do_not_depend_on_the_batch(name, open_model):
    vlm = open_model(name)
    for task, rows, settings in (
        ("chat", [BALL, BOXES], {"max_new_tokens": 5}),
        ("boolq", [BOOL, BOOL], {"max_new_tokens": 5, "beams": 2}),
        ("boolq", [BOOL], {"answers": "rank"}),
    ):
        answer = vlm.answerer(task, DecodeConfig(**settings), ())
        assert answer(rows, None) == [answer([row], None)[0] for row in rows]


def test_the_official_prompt_is_that_of_models_without_a_chat_template(open_model):
    """Byte for byte as LLM-Adapters' finetune.py (commit 8166572) writes it for rows without an input."""
    row = open_model("llama").rows.row("boolq", BOOL, None, None)
    decode = open_model("llama").rows.processor.tokenizer.decode
    assert decode(row.inputs["input_ids"][0]) == f"<s> {OFFICIAL}"
    said = "[the correct answer is true</s>]"
    assert marked(open_model("llama"), "boolq", BOOL).replace("[ the", " [the") == f"<s> {OFFICIAL}{said}"
    chat = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    assert marked(open_model("qwen2"), "boolq", BOOL) == f"{chat}[the correct answer is true<|im_end|>]\n"


def test_the_likeliest_option_is_that_of_the_smallest_loss(open_model):
    vlm = open_model("llama")
    names = [f"the correct answer is {option}" for option in BOOL.options]
    losses = [vlm.network.row_losses(*vlm.rows.collate([vlm.rows.row("boolq", BOOL, None, n)]))[0] for n in names]
    expected = names[int(torch.cat(losses).argmin())]
    assert vlm.answerer("boolq", DecodeConfig(answers="rank"), ())([BOOL], None) == [expected]


@pytest.mark.parametrize("settings", [{"max_pixels": 784}, {"image_size": 28}, {"max_tiles": 2}, {"fps": 1.0}])
def test_what_is_for_images_is_refused(settings, open_model):
    with pytest.raises(ValueError, match=rf"^model\.{next(iter(settings))}: .* reads no "):
        open_model("llama", **settings)


def test_rows_and_tasks_with_images_are_refused(open_model):
    vlm = open_model("qwen2")
    for task in ("vqa", "caption", "nlvr2"):
        with pytest.raises(ValueError, match=f"Qwen2ForCausalLM reads no images, and the rows of {task} have them"):
            vlm.check([task])
    vlm.check(["chat", "choice", "boolq"])
    with pytest.raises(ValueError, match="it has an image, and the model reads none"):
        vlm.rows.row("chat", Example("i", ("a.png",), "What?"), None, None)
    with pytest.raises(ValueError, match="trie needs"):
        vlm.answerer("boolq", DecodeConfig(answers="trie"), ())


def test_several_turns_need_a_chat_template(open_model):
    turns = (Turn("user", "Why?", False), Turn("assistant", "So.", True))
    assert marked(open_model("qwen2"), "chat", Example("t", (), "Why?", ("So.",), (1.0,), turns=turns)).count("[") == 1
    assert open_model("qwen2").converses
    assert not open_model("gpt2").converses


def test_a_decoder_of_its_own_learns_no_prompt(open_model):
    with pytest.raises(ValueError, match=r"model\.loss_over: Florence2ForConditionalGeneration reads its prompts"):
        open_model("florence2", loss_over="prompts and answers")
