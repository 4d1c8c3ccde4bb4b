"""Lengths of rows, counted without pixels, against the rows themselves."""

from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.data.vl.tables import ExampleTable, open_table
from dora_mm.models.vl import likeliest_answer
from dora_mm.models.vlm.encoding import IGNORED
from dora_mm.models.vlm.family import VLM
from dora_mm.models.vlm.lengths import TokenCounter, blank
from tests.data.vl.files import write_json
from tests.models.vlm import tiny
from tests.models.vlm.vlm_rows import write_conversations, write_pictures, write_questions

LIMIT = 45  # cuts some rows of every class with a chat template, and the answer of some
PLACE = {"smolvlm": 80, "idefics3": 80, "internvl": 55, "llava_onevision": 45}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


def rows_of(source: dict, folder: Path, on_bad_data="skip") -> ExampleTable:
    return open_table(SourceConfig(**source), folder / "tables", on_bad_data=on_bad_data)


def said(number: int, images: list[str], *turns: str) -> dict:
    roles = ("human", "gpt")
    return {
        "id": str(number),
        "image": images,
        "conversations": [{"from": roles[i % 2], "value": text} for i, text in enumerate(turns)],
    }


@pytest.fixture
def table(tmp_path, pictures, request) -> tuple[str, ExampleTable]:
    """A task and its rows: with no, one and several images, one and several turns, short and long texts."""
    if request.param in tiny.PLAIN:
        return "vqa", rows_of(write_questions(tmp_path, pictures)["train"], tmp_path)
    source = write_conversations(tmp_path, pictures)["train"]
    rows = [
        said(0, ["wide.png"], "<image>\nWhat is it?", "noise", "Which colour?", "all of them"),
        said(1, ["tall.png", "square.png"], "<image>\n<image>\nAre these the same?", "no"),
        said(2, [], "What is one and one?", "two"),
        said(3, ["square.png"], "<image>\n" + "What is it? " * 20, "grey"),
        said(4, ["tall.png"], "<image>\nDescribe it.", "A ball. " * 25, "And more?", "No."),
        said(5, ["tall.png"], "What? <image> and this <image>?".replace("<image>", "", 1), "\n\nyes\n"),
    ]
    write_json(Path(source["file"]), rows)
    return "chat", rows_of(source, tmp_path)


def loses_answer(row, limit: int) -> bool:
    return row.num_cut > 0 and not (row.labels != IGNORED).any() if len(row.labels) == row.length else False


@pytest.mark.parametrize(("name", "table"), [(name, name) for name in tiny.NAMES], indirect=["table"])
def test_lengths_are_those_of_the_encoded_rows(name, table, tiny_vlm, pictures):
    task, rows = table
    limit = PLACE.get(name, LIMIT) if name in tiny.CHAT else None
    model = VLM(VLMModelConfig(path=str(tiny_vlm(name)), max_length=limit))
    found = model.lengths(task, rows, str(pictures))
    assert found.rows.tolist() == list(range(len(rows)))
    encoded = [model.row(task, row, str(pictures), likeliest_answer(row)) for row in rows]
    assert found.tokens.tolist() == [row.length + row.num_cut for row in encoded]
    assert found.image_tokens.tolist() == [row.num_image_tokens for row in encoded]
    assert found.cut.tolist() == [row.num_cut > 0 for row in encoded]
    assert found.loses_answer.tolist() == [loses_answer(row, found.limit) for row in encoded]
    assert "as in 4 rows that were encoded" in found.source
    if limit:
        assert found.limit_from == "model.max_length"
        assert found.cut.sum() >= 2
        assert 0 < found.loses_answer.sum() < found.cut.sum()


def test_a_prompt_that_fills_the_row_loses_the_answer_behind_it(tiny_vlm, tmp_path, pictures):
    """Of a class without a chat template, whose answer continues the prompt."""
    source = write_questions(tmp_path, pictures)["train"]
    for name in ("paligemma", "git"):
        whole = VLM(VLMModelConfig(path=str(tiny_vlm(name)))).lengths("vqa", rows_of(source, tmp_path), str(pictures))
        longest = int(whole.tokens.max())
        for limit in range(longest - 6, longest):
            model = VLM(VLMModelConfig(path=str(tiny_vlm(name)), max_length=limit))
            rows = rows_of(source, tmp_path)
            found = model.lengths("vqa", rows, str(pictures))
            encoded = [model.row("vqa", row, str(pictures), likeliest_answer(row)) for row in rows]
            assert found.loses_answer.tolist() == [loses_answer(row, limit) for row in encoded]
        assert found.cut.any()


PIECES = ["\n", "\n\n", " ", "What?", "é☃", "</s>", "<|im_end|>", "<bos>", "<eos>", "red ball", ".", "<|im_start|>user"]
TEXTS = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join).filter(str.strip)
SIZES = st.lists(st.tuples(st.integers(8, 130), st.integers(8, 130)), max_size=3)


@pytest.fixture(scope="module")
def counted(tiny_vlm):
    """Models with their counters by name, loaded when first asked for."""

    @cache
    def load(name: str) -> tuple[VLM, TokenCounter]:
        model = VLM(VLMModelConfig(path=str(tiny_vlm(name))))
        turns = (Turn("user", f"{IMAGE}\n?", False), Turn("assistant", "!", True))
        text = model.rendered("chat", Example("", ("",), "", turns=turns), "").text
        return model, TokenCounter(model.encoder, text)

    return load


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm", "gemma3", "internvl", "llava_onevision"])
@settings(max_examples=15)
@given(asked=TEXTS, answer=TEXTS, sizes=SIZES)
def test_any_text_beside_images_of_any_size(counted, name, asked, answer, sizes):
    """Line breaks, tokens of templates and other scripts, which may merge with what stands for an image."""
    model, counter = counted(name)
    turns = (Turn("user", IMAGE * len(sizes) + asked, False), Turn("assistant", answer, True))
    text, spans = model.rendered("chat", Example("", ("",) * len(sizes), "", turns=turns), "")
    row = model.encoder.conversation(text, spans, [blank(size) for size in sizes])
    images = counter.image_tokens(set(sizes), several=len(sizes) > 1).tokens
    num_image_tokens = sum(images[size] for size in sizes)
    (tokens,) = counter.text_tokens([text], [len(sizes)])
    assert row.length == tokens + num_image_tokens - counter.per_image * len(sizes)
    assert row.num_image_tokens == num_image_tokens
    before = (row.labels[~row.is_image] == IGNORED).int().tolist().index(0)
    assert counter.text_tokens_before(text, spans[0][0], len(sizes)) == before


@pytest.mark.parametrize("name", ["llava", "llava_onevision", "qwen3_vl", "smolvlm", "idefics3", "internvl", "mllama"])
@pytest.mark.parametrize("several", [False, True])
def test_the_tokens_of_images_of_all_sizes(name, several, tiny_vlm):
    model = VLM(VLMModelConfig(path=str(tiny_vlm(name))))
    token = model.processor.image_token
    counter = TokenCounter(model.encoder, f"{token}\nWhat?")
    sizes = {tuple(size) for size in np.random.default_rng(0).integers(20, 150, (25, 2)).tolist()}
    found = counter.image_tokens(sizes, several=several)
    for size in sizes:
        images = [blank(size)] * (1 + several)
        row = model.encoder.question(token * len(images) + "\nWhat?", images)
        assert found.tokens[size] * len(images) == row.num_image_tokens
    assert not found.refused


def test_an_image_that_a_processor_refuses(tiny_vlm):
    model = VLM(VLMModelConfig(path=str(tiny_vlm("qwen2_5_vl"))))
    counter = TokenCounter(model.encoder, f"{model.processor.image_token}\nWhat?")
    found = counter.image_tokens({(40, 60), (20, 5000), (20, 6000)})
    assert found.tokens.keys() == {(40, 60)}
    assert "aspect ratio" in found.refused[20, 5000]
    assert "aspect ratio" in found.refused[20, 6000]


def test_rows_that_cannot_be_trained_on_are_named(tiny_vlm, tmp_path, pictures):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    source = write_conversations(tmp_path, pictures)["train"]
    good = str(pictures / "wide.png")
    rows = [
        said(0, [good], "<image>\nWhat is it?", "noise"),
        said(1, [str(tmp_path / "broken.png")], "<image>\nWhat is it?", "noise"),
        said(2, [str(pictures / "square.png")] * 12, "<image>" * 12 + "\nWhat?", "noise"),
        said(3, [good], "<image>\nWhat is <|image_pad|>?", "noise"),
    ]
    write_json(Path(source["file"]), rows)
    model = VLM(VLMModelConfig(path=str(tiny_vlm("qwen2_5_vl")), max_length=40))
    found = model.lengths("chat", rows_of(source, tmp_path), str(pictures))
    assert found.rows.tolist() == [0, 2]
    assert found.overflow.tolist() == [False, True]
    assert "broken.png is not a complete image" in found.bad_rows[1]
    assert "no room for text in 40 tokens (model.max_length)" in found.bad_rows[2]
    assert "the text has 2 places for images, and the row has 1 images" in found.bad_rows[3]
    with pytest.raises(ValueError, match="id 2: has images that leave no room"):
        rows_of(source, tmp_path, "stop").without_rows({2: found.bad_rows[2]})
    images = model.lengths("chat", rows_of(source, tmp_path), str(pictures), texts=False)
    assert images.bad_rows.keys() == {1, 2}


def test_counts_that_are_not_those_of_the_rows_are_not_believed(tiny_vlm, tmp_path, pictures):
    """A processor whose formula and whose texts are others than those that it encodes: rows are encoded instead."""
    model = VLM(VLMModelConfig(path=str(tiny_vlm("llava"))))
    layout = model.processor.prepare_inputs_layout
    model.processor.prepare_inputs_layout = lambda images=None, text=None, **rest: (
        layout(images=images, text=text, **rest) if len(text) == 1 else layout(images=images, text=["x"] * len(text))
    )
    rows = rows_of(write_conversations(tmp_path, pictures)["train"], tmp_path)
    found = model.lengths("chat", rows, str(pictures))
    assert found.source.startswith("rows encoded one by one")
    encoded = [model.row("chat", row, str(pictures), "") for row in rows]
    assert found.tokens.tolist() == [row.length for row in encoded]
