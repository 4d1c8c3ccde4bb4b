"""Decoding, ranking and restricting answers."""

import pytest
import torch

from dora_mm.config.vl import DecodeConfig
from dora_mm.models.vl.vl_bart.answering import Answerer, restricted_to
from dora_mm.models.vl.vl_bart.text import decode, encode_targets
from tests.shared.vl.small_vl_bart import small_inputs, small_tokenizer, small_vl_bart

CANDIDATES = ("yes", "no", "two dogs", "two", "a red cat")


@pytest.fixture
def model():
    return small_vl_bart()


def answerer(model, task="vqa", **settings) -> Answerer:
    return Answerer(model, small_tokenizer(), task, DecodeConfig(**settings), CANDIDATES)


@pytest.fixture
def inputs():
    return small_inputs(["is there a red cat?", "what color is the bus?", "two dogs?"])


def test_ranked_answers_are_the_likeliest_candidates(model, inputs):
    found = answerer(model, answers="rank")(inputs)
    ids = encode_targets(small_tokenizer(), "vqa", sorted(CANDIDATES), max_positions=1024)
    best = model.rank_candidates(inputs, ids).argmax(1)
    assert found == [sorted(CANDIDATES)[index] for index in best]


def test_a_trie_allows_candidates_and_nothing_else(model, inputs):
    assert set(answerer(model, answers="trie")(inputs)) <= set(CANDIDATES)
    assert not set(answerer(model)(inputs)) <= set(CANDIDATES)  # unrestricted, a random model answers something else


def test_every_candidate_can_be_reached(model):
    tokenizer = small_tokenizer()
    ids = encode_targets(tokenizer, "vqa", CANDIDATES, max_positions=1024)
    allowed = restricted_to(ids, model.config)
    for row in ids:
        prefix = [2]
        for token in row[row != 1].tolist():
            assert token in allowed(0, torch.tensor(prefix))
            prefix.append(token)
        assert allowed(0, torch.tensor(prefix)) == [1]
    assert decode(tokenizer, ids) == list(CANDIDATES)


@pytest.mark.parametrize("answers", ["trie", "rank"])
def test_candidates_must_be_given(model, answers):
    with pytest.raises(ValueError, match=f"answers: {answers} needs candidate answers of gqa.*train"):
        Answerer(model, small_tokenizer(), "gqa", DecodeConfig(answers=answers))


def test_nlvr2_compares_two_words(model, inputs):
    found = answerer(model, "nlvr2")(inputs)
    logits = model(*inputs, decoder_input_ids=torch.tensor([[2, 0]] * 3)).logits[:, -1]
    true, false = (
        encode_targets(small_tokenizer(), "nlvr2", [word], max_positions=1024)[0, 1] for word in ("true", "false")
    )
    assert found == ["true" if row[true] > row[false] else "false" for row in logits]


def test_captions_are_decoded_by_beams(model, inputs):
    found = answerer(model, "caption", beams=3)(inputs)
    assert found == decode(small_tokenizer(), model.answer_ids(inputs, beams=3, max_length=20))
