"""Answers whose tokens are drawn: the right distribution, the same alone and in a batch."""

import pytest
import torch

from dora_mm.config.models import VLMModelConfig
from dora_mm.config.vl import DecodeConfig, TextSamplingConfig
from dora_mm.data.vl.answers import ModelAnswer, texts_of
from dora_mm.data.vl.example import Example
from dora_mm.models.vl.vlm.family import VLM
from dora_mm.models.vl.vlm.sampled import SampledTokens
from tests.shared.data.vlm_rows import write_images

READ = torch.zeros(1, 4, dtype=torch.long)


def drawn(config: TextSamplingConfig, logits: torch.Tensor, rows: list[str]) -> torch.Tensor:
    return SampledTokens(config, rows)(READ.expand(len(rows), -1), logits.expand(len(rows), -1)).argmax(dim=1)


def test_tokens_have_the_chances_of_their_logits():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    found = drawn(TextSamplingConfig(temperature=2.0), logits, [str(n) for n in range(4000)])
    shares = torch.bincount(found, minlength=4) / 4000
    assert torch.allclose(shares, (logits[0] / 2).softmax(0), atol=0.03)


def test_only_the_likeliest_tokens_of_a_share_are_drawn():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    found = drawn(TextSamplingConfig(temperature=1.0, top_p=0.6), logits, [str(n) for n in range(200)])
    assert set(found.tolist()) == {0}


def test_noise_depends_on_seed_row_and_position():
    logits = torch.zeros(1, 5000)
    first = drawn(TextSamplingConfig(temperature=1.0), logits, ["a", "b"]).tolist()
    assert first == drawn(TextSamplingConfig(temperature=1.0), logits, ["a", "b"]).tolist()
    assert first[1:] == drawn(TextSamplingConfig(temperature=1.0), logits, ["b"]).tolist()
    assert first[0] != first[1]
    assert first != drawn(TextSamplingConfig(temperature=1.0, seed=1), logits, ["a", "b"]).tolist()
    processor = SampledTokens(TextSamplingConfig(temperature=1.0), ["a"])
    assert processor(READ, logits).argmax() != processor(torch.zeros(1, 5, dtype=torch.long), logits).argmax()


def test_answers_end_before_the_first_text_that_stops_them():
    assert ModelAnswer("a cat. a dog\n").before((". ", "\n")).text == "a cat"
    assert ModelAnswer("a cat").before(("x",)).text == "a cat"


@pytest.fixture
def asked(tiny_vlm, tmp_path):
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm("llava"))))
    write_images(tmp_path)
    rows = [Example(str(n), ("wide.png",), f"What is {n}?", options=("cat", "dog")) for n in range(6)]

    def answers(task: str, **config) -> list[str]:
        return texts_of(vlm.answerer(task, DecodeConfig(max_new_tokens=4, **config), ())(rows, str(tmp_path)))

    return answers


def test_drawn_answers_of_a_model_differ_by_seed_and_stop(asked):
    greedy, one, two = asked("vqa"), asked("vqa", temperature=5.0), asked("vqa", temperature=5.0, seed=1)
    assert one == asked("vqa", temperature=5.0)
    assert len({tuple(greedy), tuple(one), tuple(two)}) == 3
    assert len(set(one)) > 1
    letter = one[0].strip()[1]
    assert asked("vqa", temperature=5.0, stop=(letter,))[0] == one[0].partition(letter)[0].strip()


@pytest.mark.slow
def test_captions_are_drawn_without_beams(asked):
    assert asked("caption", temperature=5.0) != asked("caption")


@pytest.mark.slow
def test_the_likeliest_letter_of_a_suite_is_its_answer(asked):
    assert set(asked("ai2d", answers="rank")) <= {"A", "B"}
    assert not set(asked("ai2d")) <= {"A", "B"}
    with pytest.raises(ValueError, match="answers: trie needs model.family vl_bart"):
        asked("ai2d", answers="trie")


@pytest.mark.slow
def test_rows_without_options_have_no_likeliest_letter(tiny_vlm):
    vlm = VLM(VLMModelConfig(path=str(tiny_vlm("llava"))))
    rank = vlm.answerer("mmmu", DecodeConfig(answers="rank"), ())
    with pytest.raises(ValueError, match="row 7 of mmmu has no options to choose from: decode.answers: generate"):
        rank([Example("7", (), "How many?")], None)
