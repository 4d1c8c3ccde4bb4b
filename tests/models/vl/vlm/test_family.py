"""Rows, batches, losses and answers of transformers' vision-language models."""

import re

import pytest
import torch

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.data.vl.tables import open_table
from dora_mm.models.vl.vlm.encoding import IGNORED
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.head import target_logits
from dora_mm.tasks.vl import sample_answer
from tests.shared.data.vl_files import write_json
from tests.shared.data.vlm_rows import write_images
from tests.shared.vl import tiny_vlm as tiny


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return str(write_images(tmp_path_factory.mktemp("pictures")))


@pytest.fixture
def vlm(tiny_vlm, request):
    return VLM(VLMModelConfig(path=str(tiny_vlm(request.param))))


def conversation(number: int, images: tuple[str, ...], answer: str = "It is grey.") -> Example:
    asked = "\n".join([IMAGE] * len(images) + ["What is it, and how many are there?"[: 18 + 6 * number]])
    turns = (Turn("user", asked, False), Turn("assistant", answer, True))
    return Example(str(number), images, asked, (answer,), (1.0,), turns=turns)


ROWS = [
    conversation(0, ()),
    conversation(1, ("wide.png",)),
    conversation(2, ("tall.png", "square.png"), "No."),
    conversation(3, ("square.png",), "Yes, two of them."),
]


def batch_of(vlm: VLM, rows, images, task="chat"):
    return vlm.batch(task, rows, images, [sample_answer(row, 0.5) for row in rows])


def sums_and_counts(vlm: VLM, batch):
    found = [vlm.network.row_losses(inputs, labels) for inputs, labels, _ in batch.groups]
    return torch.cat([sums for sums, _ in found]), torch.cat([counts for _, counts in found])


@pytest.mark.parametrize("vlm", tiny.CHAT, indirect=True)
def test_a_mixed_batch_has_the_losses_of_its_rows_alone(vlm, images):
    """With no, one and two images, of several sizes."""
    stream = torch.Generator()
    with torch.no_grad():
        together = vlm.loss(batch_of(vlm, ROWS, images), stream).mean
        alone = [sums_and_counts(vlm, batch_of(vlm, [row], images)) for row in ROWS]
    sums, counts = (torch.cat(values) for values in zip(*alone, strict=True))
    torch.testing.assert_close(together, sums.sum() / counts.sum(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("vlm", ["llava", "florence2", "blip_vqa", "paligemma"], indirect=True)
def test_vqa_answers_are_weighted_by_their_scores(vlm, images):
    rows = [
        Example("1", ("wide.png",), "What colour?", ("red",), (1.0,)),
        Example("2", ("tall.png",), "How many balls?", ("two",), (0.3,)),
    ]
    with torch.no_grad():
        loss = vlm.loss(batch_of(vlm, rows, images, "vqa"), torch.Generator()).mean
        alone = [sums_and_counts(vlm, batch_of(vlm, [row], images, "vqa")) for row in rows]
    means = [float(sums / counts) for sums, counts in alone]
    assert float(loss) == pytest.approx((means[0] + 0.3 * means[1]) / 2, rel=1e-5)


@pytest.mark.parametrize("vlm", ["llava", "qwen2_5_vl", "gemma3", "mllama"], indirect=True)
def test_losses_are_those_of_the_models_own_output(vlm, images):
    """Which has logits at all positions, and no weights."""
    batch = batch_of(vlm, [ROWS[1]], images)
    ((inputs, labels, _),) = batch.groups
    with torch.no_grad():
        own = vlm.model(**vlm.network.moved(inputs), labels=labels).loss
        ours = vlm.loss(batch, torch.Generator()).mean
    torch.testing.assert_close(ours, own, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "mllama"])
def test_text_is_cut_and_image_tokens_never(name, tiny_vlm, images):
    long = conversation(1, ("wide.png", "tall.png"), "very " * 60 + "long")
    whole = VLM(VLMModelConfig(path=str(tiny_vlm(name)))).rows.row("chat", long, images, "")
    room = whole.length - 40
    cut = VLM(VLMModelConfig(path=str(tiny_vlm(name)), max_length=room))
    row = cut.rows.row("chat", long, images, "")
    assert row.length == room
    assert row.num_cut == 40
    assert row.num_image_tokens == whole.num_image_tokens
    image = torch.isin(whole.inputs["input_ids"], cut.rows.encoder.image_ids).sum()
    assert torch.isin(row.inputs["input_ids"], cut.rows.encoder.image_ids).sum() == image
    kept = (whole.labels != IGNORED).sum() - (row.labels != IGNORED).sum()
    assert 0 < kept <= 40
    assert torch.isfinite(cut.loss(batch_of(cut, [long, ROWS[0]], images), torch.Generator()).mean)
    assert cut.counts.num_cut == 1
    short = VLM(VLMModelConfig(path=str(tiny_vlm(name)), max_length=max(1, whole.num_image_tokens - 1)))
    batch = batch_of(short, [long, ROWS[0]], images)
    assert re.fullmatch(
        rf"row 1 of chat: its whole answer is beyond \d+ .*; {whole.num_image_tokens} of its {whole.length} are images",
        batch.left_out[0],
    )


@pytest.mark.parametrize("vlm", ["llava"], indirect=True)
def test_images_and_their_places_must_agree(vlm, images):
    turns = (Turn("user", f"{IMAGE} {IMAGE} q", False), Turn("assistant", "a", True))
    with pytest.raises(ValueError, match="row 7 of chat: the text has 2 places for images, and the row has 1 images"):
        vlm.rows.row("chat", Example("7", ("wide.png",), "q", ("a",), (1.0,), turns=turns), images, "a")


@pytest.mark.parametrize("vlm", ["llava"], indirect=True)
def test_prompts_can_be_configured(vlm, tiny_vlm, images):
    example = Example("1", ("wide.png",), "Is {it} red?", ("yes",), (1.0,))
    usual = vlm.rows.processor.tokenizer.decode(vlm.prompts.row("vqa", example, images, None).inputs["input_ids"][0])
    assert re.search(r"Is \{it\} red\?\nAnswer with a word or a short phrase\.", usual)
    other = VLM(VLMModelConfig(path=str(tiny_vlm("llava")), prompts={"vqa": "Q: {text} A:"}))
    text = other.rows.processor.tokenizer.decode(other.prompts.row("vqa", example, images, None).inputs["input_ids"][0])
    assert "Q: Is {it} red? A:" in text


@pytest.mark.parametrize("vlm", ["llava", "blip_vqa", "git"], indirect=True)
def test_the_likeliest_candidate_is_chosen(vlm, images):
    example = Example("1", ("wide.png",), "What colour?", ("red",), (1.0,))
    candidates = ("red", "blue", "a dark green")
    config = DecodeConfig(answers="rank")
    (chosen,) = vlm.answerer("vqa", config, candidates)([example], images)
    with torch.no_grad():
        losses = {
            answer: float(vlm.network.row_losses(*vlm.rows.collate([vlm.rows.row("vqa", example, images, answer)]))[0])
            for answer in candidates
        }
    assert chosen == min(losses, key=losses.__getitem__)


@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_candidates_are_ranked_by_whole_rows_and_in_batches(name, tiny_vlm, images):
    """Rows that a training cuts before their answers have no loss, which would make the first candidate the best."""
    example = Example("1", ("wide.png",), "What colour? " * 9)
    candidates = ("a colour of many words", "blue", "another colour of many words")
    for max_length, batch_size in ((None, 64), (None, 1), (40, 64)):
        vlm = VLM(VLMModelConfig(path=str(tiny_vlm(name)), max_length=max_length))
        answer = vlm.answerer("vqa", DecodeConfig(answers="rank", batch_size=batch_size), candidates)
        assert answer([example], images) == ["blue"]


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_questions_to_answer_are_not_cut(name, tiny_vlm, images):
    example = Example("1", ("wide.png",), "What colour? " * 9)
    whole, cut = (VLM(VLMModelConfig(path=str(tiny_vlm(name)), max_length=n)) for n in (None, 30))
    assert (
        cut.prompts.row("vqa", example, images, None).length == whole.prompts.row("vqa", example, images, None).length
    )


def test_what_a_model_cannot_do_is_refused_by_name(tiny_vlm):
    llava = VLM(VLMModelConfig(path=str(tiny_vlm("llava"))))
    with pytest.raises(ValueError, match="answers: trie needs model.family vl_bart"):
        llava.answerer("vqa", DecodeConfig(answers="trie"), ("a",))
    with pytest.raises(ValueError, match="set the task's train"):
        llava.answerer("vqa", DecodeConfig(answers="rank"), ())
    with pytest.raises(ValueError, match="the task tvqa needs model.family vl_bart"):
        llava.check(["tvqa"])
    with pytest.raises(ValueError, match="BlipForQuestionAnswering reads one image per row, and nlvr2 has two"):
        VLM(VLMModelConfig(path=str(tiny_vlm("blip_vqa")))).check(["nlvr2"])
    with pytest.raises(ValueError, match="model.prompts: chat has no effect"):
        VLM(VLMModelConfig(path=str(tiny_vlm("llava")), prompts={"chat": "Q: {text}"})).check(["chat"])
    with pytest.raises(ValueError, match=r"model.image_size: .* takes model.max_pixels or model.min_pixels instead"):
        VLM(VLMModelConfig(path=str(tiny_vlm("qwen2_5_vl")), image_size=56))


@pytest.mark.parametrize("vlm", ["blip2"], indirect=True)
def test_blip_2_learns_an_answer_that_follows_a_space(vlm, images):
    row = vlm.rows.row("vqa", Example("1", ("wide.png",), "What colour?"), images, "red")
    text = vlm.rows.processor.tokenizer.decode(row.inputs["input_ids"][0, row.num_image_tokens :])
    assert text.endswith("Question: What colour? Answer: red" + vlm.rows.processor.tokenizer.eos_token)


def test_a_class_without_a_chat_template_refuses_system_turns(tiny_vlm, images, tmp_path):
    """Also in rows to answer, which have as many turns as a question with its answer."""
    turns = [{"from": "system", "value": "Answer in French."}, {"from": "human", "value": "<image>What?"}]
    file = write_json(tmp_path / "rows.json", [{"image": "wide.png", "conversations": turns}])
    source = SourceConfig(format="chat", file=str(file), images=images)
    table = open_table(source, tmp_path, on_bad_data="stop")
    with pytest.raises(ValueError, match="has several turns before its answer, and BlipForQuestionAnswering reads one"):
        VLM(VLMModelConfig(path=str(tiny_vlm("blip_vqa")))).check_rows(table)


@pytest.mark.parametrize("vlm", ["blip_caption"], indirect=True)
def test_blip_writes_captions_after_all_of_its_prompt(vlm, images):
    """Its class drops the last token of what it continues: that of a caption, which has no prompt, was the only one."""
    examples = [Example("1", ("wide.png",), ""), Example("2", ("tall.png",), "")]
    answer = vlm.answerer("caption", DecodeConfig(max_new_tokens=3, beams=1), ())
    captions = answer(examples, images)
    assert captions == [answer([example], images)[0] for example in examples]
    row = vlm.rows.row("vqa", Example("3", ("wide.png",), "What colour?"), images, "red")
    inputs, labels = vlm.rows.collate([row])
    logits, targets = target_logits(vlm.network.form, vlm.model, inputs, labels)
    asked = vlm.rows.collate([vlm.rows.row("vqa", Example("3", ("wide.png",), "What colour?"), images, None)])[0]
    settings = vlm.answerer("vqa", DecodeConfig(max_new_tokens=1), ()).args[1]
    assert vlm.network.generate(asked, settings)[0, 0] == logits[0].argmax()
    assert targets[0] == vlm.rows.processor.tokenizer.convert_tokens_to_ids("red")


@pytest.mark.parametrize(
    ("name", "limit", "fewer"),
    [
        ("qwen2_vl", {"max_pixels": 784}, True),
        ("glm4v", {"max_pixels": 784}, False),
        ("smolvlm", {"image_size": 28}, True),
        ("internvl", {"max_tiles": 1}, True),
        ("llava_onevision", {"max_tiles": 1}, True),
        ("fast_vlm", {"image_size": 64}, False),
    ],
)
def test_images_are_limited_by_what_a_processor_takes(name, limit, fewer, tiny_vlm, images):
    """The loss is computed: tokens and features agree."""
    usual, limited = (VLM(VLMModelConfig(path=str(tiny_vlm(name)), **keys)) for keys in ({}, limit))
    rows = [conversation(1, ("tall.png",))]
    counts = [vlm.rows.row("chat", rows[0], images, "").num_image_tokens for vlm in (usual, limited)]
    assert counts[1] < counts[0] if fewer else counts[1] <= counts[0]
    with torch.no_grad():
        assert torch.isfinite(limited.loss(batch_of(limited, rows, images), torch.Generator()).mean)


@pytest.mark.parametrize(
    ("name", "limit", "message"),
    [
        ("llava", {"image_size": 56}, "are squares of 28 pixels, .*takes no other size"),
        ("paligemma", {"max_pixels": 784}, "have a fixed size; its processor, a SiglipImageProcessor, takes no other"),
        ("internvl", {"image_size": 56}, "are squares of 28 pixels, .*takes model.max_tiles instead"),
        ("mllama", {"max_tiles": 1}, "are not cut into tiles whose number could be limited"),
        ("qwen2_vl", {"max_tiles": 1}, "takes model.max_pixels or model.min_pixels instead"),
        ("fast_vlm", {"image_size": 50}, "model.image_size 50: the sides of this model's images are multiples of 32"),
    ],
)
def test_other_limits_are_told_in_a_sentence_when_the_model_is_loaded(name, limit, message, tiny_vlm):
    """They ended in tracebacks about tokens and features, or about positions, when the first row was computed."""
    with pytest.raises(ValueError, match=message):
        VLM(VLMModelConfig(path=str(tiny_vlm(name)), **limit))


@pytest.mark.parametrize("vlm", ["gemma3"], indirect=True)
def test_a_token_that_stands_for_a_part_of_an_image_is_refused_in_a_text(vlm, images):
    turns = (Turn("user", f"{IMAGE} what is <image_soft_token>?", False), Turn("assistant", "a", True))
    with pytest.raises(ValueError, match="row 7 of chat: the text has <image_soft_token>, which this model reads as a"):
        vlm.rows.row("chat", Example("7", ("wide.png",), "q", ("a",), (1.0,), turns=turns), images, "a")
