"""Images and texts at which a processor or a chat template fails: their rows are left out, or named."""

import re

import pytest
import torch
from PIL import Image

from dora_mm.config.vl import DecodeConfig
from dora_mm.config.vl_data import SourceConfig
from dora_mm.data.vl.example import IMAGE, Example, Turn
from dora_mm.data.vl.splits import ValidationSet
from dora_mm.data.vl.tables import open_table
from dora_mm.sampling.answers import answer_all
from tests.models.vl.vlm.encoding.cut_rows import NAMES, WHOLE, opened, set_limit
from tests.shared.data.vl_files import write_json
from tests.shared.vl import tiny_vlm as tiny

# Height and width, from one pixel to strips, and images that every class reads
ODD = ((1, 1), (2, 500), (500, 2), (30, 9000), (9000, 30), (50, 20000), (20000, 50))
PLAIN = (40, 60)
TOO_LONG = 6000  # tokens: what a tiny model takes minutes for


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return tmp_path_factory.mktemp("odd")


def example(images, shape, question="What?", *, chat=True) -> Example:
    """A row with an image of this shape, which is written where it is not there yet."""
    file = images / "{}x{}.png".format(*shape)
    if not file.exists():
        Image.new("RGB", shape[::-1], (200, 30, 90)).save(file)
    asked = Turn("user", f"{IMAGE}\n{question}", False), Turn("assistant", "red", True)
    return Example(file.name, (file.name,), question, ("red",), (1.0,), turns=asked if chat else ())


def batch(vlm, images, *examples, **settings):
    task = "chat" if vlm.fallback is None else "vqa"
    return vlm.batch(task, examples, str(images), [("red", 1.0)] * len(examples), **settings)


@torch.no_grad()
def loss(vlm, found) -> float:
    return vlm.loss(found, torch.Generator()).mean.item()


def check_left_out(vlm, images, odd, reason) -> None:
    """Its row is missing in a batch, which has the loss of the other one; or it stops a training by its name."""
    plain = example(images, PLAIN)
    found = batch(vlm, images, odd, plain, on_bad_data="skip")
    (said,) = found.left_out
    assert re.fullmatch(rf"row {odd.id} of chat: .*{reason}.*", said)
    assert loss(vlm, found) == loss(vlm, batch(vlm, images, plain))
    with pytest.raises(ValueError, match=f"row {odd.id} of chat: .*{reason}.*; data.on_bad_data: skip"):
        batch(vlm, images, odd, plain)


def test_whatever_a_processor_raises_is_of_the_row(tiny_vlm, images):
    """LFM2-VL's raises a RuntimeError, which ended a run whatever `on_bad_data` said."""
    vlm = opened(tiny_vlm("lfm2_vl"))
    check_left_out(vlm, images, example(images, (50, 20000)), "processor fails at it .RuntimeError: stack expects")


@pytest.mark.parametrize("shape", [(20, 180), (180, 20)])
def test_a_strip_with_more_patches_than_its_processor_marks_is_of_the_row(shape, tiny_vlm, images):
    """LFM2-VL computed it alone, and ended a run where another row was in the batch."""
    vlm = opened(tiny_vlm("lfm2_vl"))
    check_left_out(vlm, images, example(images, shape), "makes 24 patches of its image, and marks 16")


def test_whatever_a_template_raises_is_of_the_row(tiny_vlm, images):
    vlm = opened(tiny_vlm("llava"))
    template = vlm.rows.processor.chat_template
    fails = "{% if 'odd' in messages[0]['content'] | string %}{{ 1 // 0 }}{% endif %}"
    vlm.rows.processor.chat_template = fails + template
    check_left_out(vlm, images, example(images, PLAIN, "Is it odd?"), "template refuses a conversation: .* by zero")


@pytest.mark.parametrize(("name", "counts"), [("qwen2_5_vl", (12, 2)), ("hunyuan_vl", (12, 5)), ("hy_v4_vl", (10, 3))])
def test_a_processor_that_writes_more_tokens_than_the_model_makes_features_is_found_before_the_model(
    name, counts, tiny_vlm, images
):
    vlm = opened(tiny_vlm(name))
    vlm.rows.processor.image_processor.merge_size = 1  # as that of another model
    reason = "writes {} tokens for its images, of which the model makes {} features".format(*counts)
    found = batch(vlm, images, example(images, PLAIN), on_bad_data="skip")
    assert found.left_out == (
        f"row 40x60.png of chat: the model's processor {reason}: give them another shape, or leave the row out",
    )
    assert "model" not in vars(vlm.network)  # it was not even loaded


def test_what_a_model_raises_stops_by_the_names_of_its_rows(tiny_vlm, images, tmp_path, caplog):
    vlm, examples = opened(tiny_vlm("llava")), [example(images, PLAIN), example(images, (1, 1))]
    conversations = [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "red"}]
    rows = [{"id": row.id, "image": row.id, "conversations": conversations} for row in examples]
    source = SourceConfig(format="chat", file=str(write_json(tmp_path / "chat.json", rows)), images=str(images))
    table = open_table(source, tmp_path / "tables", on_bad_data="skip")
    raised: list[Exception] = []

    def fail(module, given):
        raise raised[-1]

    vlm.model.model.language_model.register_forward_pre_hook(fail)
    answers = {"chat": vlm.answerer("chat", DecodeConfig(max_new_tokens=1), ())}
    sets = {"chat": ValidationSet(table, str(images))}
    for error in (ValueError("tokens: 3, features: 4"), IndexError("out of range")):
        raised.append(error)
        for compute in (
            lambda: loss(vlm, batch(vlm, images, *examples, on_bad_data="skip")),
            lambda: answer_all(answers, vlm.networks.values(), sets, 2),  # no row is left out of the answers
        ):
            caplog.clear()
            with pytest.raises((RuntimeError, IndexError)) as found:
                compute()
            assert "the model fails at rows 40x60.png, 1x1.png of chat" in f"{found.value} {caplog.text}"


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_every_class_reads_an_odd_image_or_its_row_is_left_out(name, tmp_path, images):
    """No model raises, and none computes a loss that is not finite."""
    vlm = opened(tiny.build(name, tmp_path))
    set_limit(vlm, WHOLE)
    for shape in (PLAIN, *ODD):
        row = example(images, shape, chat=vlm.fallback is None)
        found = batch(vlm, images, row, on_bad_data="skip")
        assert len(found.left_out) + len(found.groups) == 1
        assert shape != PLAIN or found.groups
        if found.groups and found.longest < TOO_LONG:
            assert torch.isfinite(torch.tensor(loss(vlm, found)))
