"""The baseline that answers from the question alone."""

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.question_only import mean_accuracy, question_only_answers


def question(text: str, answer: str, votes: int = 10) -> Example:
    raw = (answer,) * votes + ("something else",) * (10 - votes)
    return Example(f"{text} {answer}", ("a.jpg",), text, (answer,), (min(1.0, 0.3 * votes),), raw)


TRAIN = [
    question("Is the cat red?", "no"),
    question("Is the cat red?", "no"),
    question("Is the cat red?", "yes"),
    question("Is the dog red?", "yes"),
    question("Is the dog red?", "yes"),
    question("Is the dog red?", "yes"),
    *[question("How many cats are there?", "2")] * 7,
]


def test_the_same_text_is_preferred_to_two_words_and_those_to_all():
    texts = ["Is the cat red?", "Is the bus red?", "How many dogs?", "What is it?"]
    assert question_only_answers(TRAIN, [question(text, "?") for text in texts]) == ["no", "yes", "2", "2"]


def question_only_accuracy(train, valid) -> float:
    return mean_accuracy(list(zip(valid, question_only_answers(train, valid), strict=True)))


def test_accuracy_is_the_official_one_in_per_cent():
    valid = [
        question("Is the cat red?", "no", votes=2),
        question("Is the cat red?", "yes"),
        question("What is it?", "2"),
    ]
    assert question_only_accuracy(TRAIN, valid) == pytest.approx((60 + 0 + 100) / 3)


def test_without_ten_answers_accuracy_is_exact_match():
    train = [Example("1", ("a.jpg",), "true?", ("true",), (1.0,))]
    valid = [Example(str(n), ("a.jpg",), "true?", (label,), (1.0,)) for n, label in enumerate(("true", "false"))]
    assert question_only_accuracy(train, valid) == 50.0


def test_answers_count_in_proportion_to_their_scores():
    split = Example("1", ("a.jpg",), "What is it?", ("boat", "ship"), (0.6, 0.9))
    assert question_only_answers([split], [question("What is it?", "?")]) == ["ship"]
    single = Example("2", ("a.jpg",), "What is it?", ("boat",), (1.0,))
    assert question_only_answers([split, single], [question("What is it?", "?")]) == ["boat"]


def test_splits_without_answers_or_rows_are_rejected():
    unanswered = Example("1", ("a.jpg",), "What is it?")
    with pytest.raises(ValueError, match="nothing to learn"):
        question_only_accuracy([unanswered], TRAIN)
    with pytest.raises(ValueError, match="nothing to score"):
        question_only_accuracy(TRAIN, [])
