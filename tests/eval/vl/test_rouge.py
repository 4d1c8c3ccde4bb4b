"""ROUGE-L of sentences beside exact match; that it equals rouge-score's, test_official_scores.py says."""

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.metrics import score, score_row
from dora_mm.eval.vl.rouge import common_length, rouge_l, words_of


def test_words_of_other_alphabets_count():
    assert words_of("Die Straße, 2_5!") == ["die", "straße", "2", "5"]
    assert words_of("東京に bus") == ["東", "京", "に", "bus"]
    assert rouge_l("красный автобус", "Красный трамвай.") == 0.5


def test_common_words_are_counted_in_their_order():
    assert common_length(list("abcbdab"), list("bdcaba")) == 4
    assert common_length([], ["a"]) == 0
    assert rouge_l("", "") == 0.0


def test_sentences_are_scored_by_rouge_l_beside_exact_match():
    row = Example("1", (), "What is it?", ("A red bus.",), (1.0,))
    predictions = [(row, "a red bus"), (row, "A red tram.")]
    found = score("chat_sentences", predictions)
    assert found.main == "ROUGE-L"
    assert found.metrics == pytest.approx({"ROUGE-L": 100 * (1 + 2 / 3) / 2, "accuracy": 50.0, "exact": 0.0})
    assert score_row("chat_sentences", *predictions[1]) == pytest.approx(2 / 3)
    assert score("chat", predictions).main == "accuracy"
    assert score("chat", predictions).metrics == found.metrics
