"""Rows with images that are too long lose whole exchanges, and what is left is read and learned as a row of its own."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig
from dora_mm.data.vl.example import IMAGE, VIDEO, Example, Turn
from dora_mm.data.vl.rows import RowTooLongError
from dora_mm.models.vl.vlm.encoding import IGNORED, TEXT_INPUTS, TokenRow
from dora_mm.models.vl.vlm.family import VLM
from tests.models.vl.vlm.encoding import cut_rows
from tests.models.vl.vlm.encoding.cut_rows import Oracle, conversation, encoded, first_exchanges, opened, set_limit
from tests.shared.data.video_rows import write_visuals
from tests.shared.vl import tiny_vlm as tiny

# Of each mechanism one: positions of images, tiles, tiles of an image alone in its row, an image that is one token with
# a mask per token, inputs per token of an own name.
MECHANISMS = ("qwen2_5_vl", "internvl", "llava_onevision", "mllama", "ernie4_5_vl_moe")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_visuals(tmp_path_factory.mktemp("visuals"))


def equal(ours, theirs) -> bool:
    return torch.equal(ours, theirs) if isinstance(ours, Tensor) else ours == theirs


def check_is_start(row: TokenRow, whole: TokenRow, limit: int) -> None:
    """Checks that a row has the first tokens of another one, and all of its images."""
    assert row.inputs.keys() == whole.inputs.keys()
    for name, value in row.inputs.items():
        expected = whole.inputs[name][:, :limit] if name in TEXT_INPUTS else whole.inputs[name]
        assert equal(value, expected), name
    assert row.labels.tolist() == whole.labels[:limit].tolist()
    assert row.num_images == whole.num_images
    assert row.num_image_tokens == whole.num_image_tokens


@torch.no_grad()
def check_cut(vlm: VLM, example: Example, images: str, limits=()) -> None:
    """Checks what is left of a conversation at each length, by rows of its first exchanges, and what is computed."""
    oracle = Oracle.of(vlm, example, images)
    limits = limits or oracle.limits()
    for limit in limits:
        set_limit(vlm, limit)
        batch = vlm.batch("chat", [example], images, [("", 1.0)])
        loss = vlm.loss(batch, torch.Generator())
        assert loss.mean.isfinite()
        assert int(loss.count) == sum(label != IGNORED for label in oracle.labels(limit))
        assert (len(batch.groups), len(batch.left_out)) == ((1, 0) if loss.count else (0, 1))
    for limit in limits:
        row, (whole, count) = encoded(vlm, example, images, limit), oracle.left(limit)
        if row.loses_answer:
            assert all(label == IGNORED for label in oracle.labels(limit))
        else:
            check_is_start(row, whole, limit)
        assert row.length + row.num_cut == oracle.prefixes[-1].length
        assert row.num_image_tokens + row.num_image_cut == oracle.prefixes[-1].num_image_tokens
        assert row.num_exchanges_cut == len(oracle.prefixes) - count


@pytest.mark.parametrize("name", MECHANISMS)
def test_whole_exchanges_go_until_the_rest_fits(name, tiny_vlm, folder):
    vlm = opened(tiny_vlm(name))
    for row in ("three, apart", "two, later"):
        check_cut(vlm, conversation(cut_rows.ROWS[row]), str(folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", cut_rows.NAMES)
def test_every_class_learns_what_has_room_of_rows_with_up_to_four_images(name, tmp_path, folder):
    vlm = opened(tiny.build(name, tmp_path))
    if vlm.fallback is not None:
        pytest.skip("it has no chat template")
    for counts in cut_rows.ROWS.values():
        check_cut(vlm, conversation(counts), str(folder))
    if "video" in vlm.rows.encoder.kinds:
        filmed = conversation((0, 1), marker=VIDEO)  # Molmo 2 takes one of a row
        check_cut(vlm, filmed, str(folder), Oracle.of(vlm, filmed, str(folder)).limits()[:3])


def test_what_fits_is_found_by_encoding_twice(tiny_vlm, folder, monkeypatch):
    """Images are read and tiled again each time."""
    vlm, example, calls = opened(tiny_vlm("internvl")), conversation((1, 1, 1, 1)), []
    encode = vlm.rows.encoder.conversation
    monkeypatch.setattr(vlm.rows.encoder, "conversation", lambda *given: (calls.append(given), encode(*given))[1])
    for limit in Oracle.of(vlm, example, str(folder)).limits()[1:]:
        calls.clear()
        encoded(vlm, example, str(folder), limit)
        assert len(calls) <= 2


def test_the_system_turn_stays_and_its_image_with_it(tiny_vlm, folder):
    vlm = opened(tiny_vlm("qwen2_5_vl"))
    example = conversation((0, 2, 1), system=f"Be brief, as in {IMAGE}.")
    example = replace(example, images=("tall.png", *example.images))
    check_cut(vlm, example, str(folder))


@torch.no_grad()
def test_prompts_that_have_loss_are_cut_as_texts_up_to_an_image_that_has_no_room(tiny_vlm, folder):
    path = str(tiny_vlm("qwen2_5_vl"))
    vlm, example = VLM(VLMModelConfig(path=path, loss_over="prompts and answers")), conversation((1, 0, 2))
    prefixes = Oracle.of(vlm, example, str(folder)).prefixes
    last_images = [int(row.is_image.nonzero()[-1]) for row in prefixes]
    first_answer = int((encoded(VLM(VLMModelConfig(path=path)), example, str(folder)).labels != IGNORED).nonzero()[0])
    edges = [*last_images, first_answer, prefixes[0].length, prefixes[1].length, prefixes[2].length - 1]
    for limit in sorted({each + more for each in edges for more in (0, 1)}):
        set_limit(vlm, limit)
        assert vlm.loss(vlm.batch("chat", [example], str(folder), [("", 1.0)]), torch.Generator()).mean.isfinite()
        row = encoded(vlm, example, str(folder), limit)
        count = max((number for number, image in enumerate(last_images, 1) if image < limit), default=1)
        assert row.num_exchanges_cut == 3 - count
        assert row.loses_answer == (limit <= first_answer)
        if not row.loses_answer:
            check_is_start(row, prefixes[count - 1], limit)


def test_a_row_whose_learned_answers_all_go_is_left_out(tiny_vlm, folder):
    for over in ("answers", "prompts and answers"):
        vlm = VLM(VLMModelConfig.model_validate({"path": str(tiny_vlm("llava")), "loss_over": over}))
        example, images = conversation((1, 1, 1), unlearned=[0]), str(folder)
        lengths = [encoded(vlm, first_exchanges(conversation((1, 1, 1)), n), images).length for n in (1, 2)]
        for limit, left_out in ((lengths[0], True), (lengths[1], False)):
            set_limit(vlm, limit)
            batch = vlm.batch("chat", [example], images, [("", 1.0)])
            assert len(batch.left_out) == left_out
            assert batch.num_cut == (not left_out)


def test_a_question_at_the_end_goes_with_its_image(tiny_vlm, folder):
    """It has no answer, and nothing of it was read but its image."""
    vlm, whole = opened(tiny_vlm("internvl")), conversation((1, 1))
    asked = replace(whole, turns=whole.turns[:-1], answers=(), scores=())
    row = encoded(vlm, asked, str(folder))
    assert torch.equal(row.labels, encoded(vlm, first_exchanges(whole, 1), str(folder)).labels)
    assert row.num_images == 1
    assert vlm.rows.row("chat", asked, str(folder), None).num_images == 2  # to answer it


def test_exchanges_with_a_tool(tiny_vlm, folder):
    vlm = opened(tiny_vlm("qwen2_5_vl"))
    said = [("user", f"{IMAGE}How warm is it there?"), ("assistant", "weather()"), ("tool", f"8 {IMAGE}")]
    turns = tuple(Turn(role, text, role == "assistant") for role, text in [*said, ("assistant", "8 degrees.")])
    example = Example("r", ("wide.png", "tall.png"), "", ("8 degrees.",), (1.0,), turns=turns)
    check_cut(vlm, example, str(folder))


def test_what_the_assistant_says_first_stays_with_the_first_exchange(tiny_vlm, folder):
    vlm, whole, greeting = opened(tiny_vlm("qwen2_5_vl")), conversation((1, 1)), Turn("assistant", "Hello.", True)
    greeted, first = (
        replace(example, turns=(greeting, *example.turns)) for example in (whole, first_exchanges(whole, 1))
    )
    alone = encoded(vlm, first, str(folder))
    row = encoded(vlm, greeted, str(folder), alone.length)
    assert torch.equal(row.labels, alone.labels)
    assert (row.num_exchanges_cut, row.num_images) == (1, 1)
    shorter = encoded(vlm, greeted, str(folder), alone.length - 4)
    assert torch.equal(shorter.labels, alone.labels[: alone.length - 4])


@pytest.mark.parametrize("name", ["paligemma", "florence2"])
def test_without_a_chat_template_the_question_is_whole_or_the_row_left_out(name, tiny_vlm, folder):
    """The answer of PaliGemma, which is in the row, is cut; Florence-2 writes it elsewhere."""
    vlm = opened(tiny_vlm(name))
    example = Example("r", ("wide.png",), "What colour is the ball by the door?", ("a very dark red",), (1.0,))
    whole, asked = (vlm.rows.row("vqa", example, str(folder), answer) for answer in ("a very dark red", None))
    for length in (whole.length, asked.length + 1, asked.length, asked.length - 1, 3):
        set_limit(vlm, length)
        row = vlm.rows.row("vqa", example, str(folder), "a very dark red")
        has_room = length > asked.length if name == "paligemma" else length >= asked.length
        assert row.loses_answer == (not has_room)
        batch = vlm.batch("vqa", [example], str(folder), [("a very dark red", 1.0)])
        assert len(batch.groups) == has_room
        if has_room:
            check_is_start(row, whole, length)


def test_a_question_whose_images_have_no_room_is_not_answered(tiny_vlm, folder):
    vlm = opened(tiny_vlm("qwen2_5_vl"))
    asked = conversation((1, 1, 1))
    answer = vlm.answerer("chat", DecodeConfig(max_new_tokens=2), ())
    whole = vlm.prompts.row("chat", asked, str(folder), None)
    last = int(whole.is_image.nonzero()[-1])
    vlm.prompts.max_length = vlm.prompts.encoder.max_length = last + 1
    assert len(answer([asked], str(folder))) == 1
    vlm.prompts.max_length = vlm.prompts.encoder.max_length = last
    with pytest.raises(
        RowTooLongError, match=rf"row r of chat: its images are longer than the model's {last} positions"
    ):
        answer([asked], str(folder))
