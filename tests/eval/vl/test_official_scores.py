"""Scores of answers equal those of the official scripts, of which official_scores.json keeps the results."""

import json
from dataclasses import replace

import pytest

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl import (
    anls,
    aokvqa,
    boxes,
    circular,
    letters,
    mmmu,
    nlvr2,
    ocrbench,
    pope,
    relaxed,
    rouge,
    scienceqa,
    textvqa,
)
from tests.eval.vl import made_up
from tests.eval.vl.made_up import MadeUp
from tests.eval.vl.official_scores import expected


def example(row: MadeUp) -> Example:
    box = {"bbox": [row.box], "norm1": False, "size": row.size}
    return Example(
        "1",
        (),
        "",
        (row.letter,) if row.letter else row.references,
        raw_answers=row.references,
        options=row.options,
        kinds=("", row.kind),
        boxes=json.dumps(box),
    )


OPEN, TEN, CHOICES = made_up.open_answers(1), made_up.open_answers(2, references=10), made_up.choices(3)
WORDS, YES_OR_NO, BOXED = made_up.open_answers(4), made_up.yes_or_no(5), made_up.boxed(6)
SENTENCES = made_up.sentences(8)
# The rules themselves: `row` scores an empty text 0, which some scripts take for an answer
METRICS = {
    "anls": (OPEN, lambda row, text: anls.SCORER.accuracy(row, text)),
    "anls_mmf": (OPEN, lambda row, text: max(anls.stripped(answer, text) for answer in row.answers)),
    "anls_pix2struct": (OPEN, lambda row, text: max(anls.lowered(answer, text) for answer in row.answers)),
    "relaxed": (OPEN, lambda row, text: relaxed.SCORER.accuracy(row, text)),
    "relaxed_stripped": (OPEN, lambda row, text: relaxed.SCORER.accuracy(row, text.strip())),
    "textvqa": (TEN, textvqa.row_accuracy),
    "ocrbench": (OPEN, ocrbench.row_accuracy),
    "ocrbench_folded": (OPEN, ocrbench.folded_accuracy),
    "mmmu": (CHOICES, lambda row, text: mmmu.SCORER.accuracy(row, text)),
    "mmmu_pro": (CHOICES, lambda row, text: mmmu.PRO.accuracy(row, text)),
    "mmmu_open": (WORDS, lambda row, text: mmmu.SCORER.accuracy(row, text)),
    "letters": (CHOICES, letters.row_accuracy),
    "scienceqa": (CHOICES, lambda row, text: scienceqa.SCORER.accuracy(row, text)),
    "scienceqa_own": (CHOICES, scienceqa.own_accuracy),
    "aokvqa": (CHOICES, lambda row, text: aokvqa.SCORER.accuracy(row, text)),
    "aokvqa_direct": (TEN, lambda row, text: aokvqa.DIRECT.accuracy(row, text)),
    "pope": (YES_OR_NO, pope.row_accuracy),
    "rouge_l": (SENTENCES, rouge.row_rouge_l),
    "boxes_qwen": (BOXED, lambda row, text: boxes.reads(boxes.qwen_box)(row, text)),
    "boxes_lmms": (BOXED, lambda row, text: boxes.reads(boxes.share_box)(row, text)),
}


@pytest.mark.parametrize("name", METRICS)
def test_scores_are_those_of_the_official_script(name):
    rows, score = METRICS[name]
    official = expected(name)
    assert len(official) == len(rows) == made_up.NUM
    scored = [score(example(row), row.prediction) for row in rows]
    wrong = [
        (row, ours, theirs)
        for row, ours, theirs in zip(rows, scored, official, strict=True)
        if theirs is not None and abs(ours - theirs) > 1e-6
    ]
    assert wrong == []
    assert len({theirs for theirs in official if theirs is not None}) > 1


def test_no_letter_is_found_just_where_the_official_parser_would_guess():
    for name, letter_of in (("mmmu", mmmu.mmmu_letter), ("mmmu_pro", mmmu.pro_letter)):
        found = [letter_of(row.prediction, row.options) is None for row in CHOICES]
        assert found == [theirs is None for theirs in expected(name)]
        assert any(found)


def test_precision_recall_f1_and_the_share_of_yes_are_those_of_the_official_script():
    counts = pope.outcomes([(example(row), row.prediction) for row in YES_OR_NO]).sum(axis=0)
    assert list(pope.shares(counts).values()) == pytest.approx(expected("pope_shares"), abs=1e-6)


def test_questions_in_several_orders_are_right_as_by_the_official_script():
    names = [str(number // 2 + number % 2 * circular.ORDERS) for number in range(len(CHOICES))]
    rows = [(replace(example(row), id=name), row.prediction) for name, row in zip(names, CHOICES, strict=True)]
    official = expected("circular")
    assert circular.SCORER.values(rows).tolist() == official
    assert 0 < sum(filter(None, official)) < len(official) == made_up.NUM / 2


def test_accuracy_and_consistency_of_nlvr2_are_those_of_the_official_script():
    rows = [(replace(example(row), id=name), row.prediction) for name, row in made_up.true_or_false(7)]
    found = nlvr2.score_nlvr2(rows).metrics
    assert list(found.values()) == pytest.approx([100 * share for share in expected("nlvr2_shares")], abs=1e-4)
