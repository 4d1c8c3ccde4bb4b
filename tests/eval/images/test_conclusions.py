"""The sentences at the end of an evaluation."""

import pytest

from dora_mm.eval.images import own_style, scores
from dora_mm.eval.statistics import ConfidenceInterval
from dora_mm.eval.vl import metrics
from dora_mm.eval.vl.scores import VLScores

NONE = ConfidenceInterval(0.0, -0.1, 0.1)
UP, DOWN, SLIGHTLY = (
    ConfidenceInterval(0.2, 0.1, 0.3),
    ConfidenceInterval(-0.2, -0.3, -0.1),
    ConfidenceInterval(0.05, 0.01, 0.09),
)
FAR, NEAR = ConfidenceInterval(0.5, 0.4, 0.6), ConfidenceInterval(0.9, 0.8, 1.0)


@pytest.mark.parametrize(
    ("styled", "plain", "nearest", "said"),
    [
        (UP, SLIGHTLY, FAR, ["closer", "+0.200 (+0.100 to +0.300) likeness", "keep it"]),
        (UP, UP, FAR, ["closer", "without being asked"]),
        (UP, NONE, NEAR, ["closer", "copies single ones"]),
        (NONE, NONE, FAR, ["With 4 prompts", "not distinguishable", "more prompts", "train longer"]),
        (DOWN, NONE, FAR, ["away", "lower rate"]),
    ],
)
def test_an_own_style(styled, plain, nearest, said):
    found = own_style.conclusion({"likeness": styled}, {"likeness": plain}, nearest, FAR, None, 4)
    assert [part for part in said if part not in found] == []
    cures = {"keep it", "without being asked", "copies single ones", "train longer", "lower rate"}
    assert {cure for cure in cures if cure in found} == cures & set(said)


@pytest.mark.parametrize(
    ("trigger", "said"),
    [
        (None, "The style shows without being asked, too: put a word for it into captions, or lower the strength."),
        (
            "TOK",
            "The style shows without being asked, although every caption has TOK: set preserve, or lower the strength.",
        ),
    ],
)
def test_a_word_that_every_caption_has_is_not_advised(trigger, said):
    assert own_style.conclusion({"likeness": UP}, {"likeness": UP}, FAR, FAR, trigger, 4).endswith(said)


@pytest.mark.parametrize(
    ("after", "style", "said"),
    [
        (NEAR, 0.7, ["better", "90 % (80 to 100) against 50 % (40 to 60)", "the style, for which more steps"]),
        (NEAR, 0.95, ["better", "the thing, for which fewer steps"]),
        (FAR, 0.7, ["not distinguishable", "concepts.count"]),
        (DOWN, 0.7, ["worse"]),
    ],
)
def test_a_judged_style(after, style, said):
    adapted = {"both": after, "style": ConfidenceInterval(style, 0, 1), "concept": ConfidenceInterval(0.8, 0, 1)}
    found = scores.conclusion({"both": FAR}, adapted)
    assert [part for part in said if part not in found] == []
    assert "adapter.path=RUN" in scores.conclusion({"both": FAR}, None)


def test_answers():
    looks = {"vqa": VLScores("accuracy", {"accuracy": 59.7, metrics.QUESTION_ONLY: 34.7})}
    guesses = {"vqa": VLScores("accuracy", {"accuracy": 34.7, metrics.QUESTION_ONLY: 34.7}), "gqa": VLScores("x", {})}
    enough = {"vqa": 20, "gqa": 20}
    assert "adapter=null" in metrics.conclusion(looks, enough, adapted=True)
    assert "train longer" not in metrics.conclusion(looks, enough, adapted=True)
    assert "not above question-only accuracy (34.7)" in metrics.conclusion(guesses, enough, adapted=True)
    assert metrics.conclusion({}, {}, adapted=False).startswith("These are the base model's: --set adapter=RUN")


@pytest.mark.parametrize("number", [1, 19])
def test_a_few_answers_are_no_verdict(number):
    guesses = {"vqa": VLScores("accuracy", {"accuracy": 0.0, metrics.QUESTION_ONLY: 34.7})}
    found = metrics.conclusion(guesses, {"vqa": number}, adapted=True)
    assert f"{number} independent answer" in found
    assert "train longer" not in found


def test_pairs_are_compared_already():
    """Their evaluation has no model without the adapter to name."""
    pairs = {"preference": VLScores("accuracy", {"accuracy": 60.0})}
    assert "adapter=null" not in metrics.conclusion(pairs, {"preference": 40}, adapted=True)
