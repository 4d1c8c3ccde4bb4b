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
from tests.eval.vl.official_scores import HARD, USUAL, Rows, expected


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


# The rules themselves: `row` scores an empty text 0, which some scripts take for an answer
METRICS = {
    "anls": ("several", lambda row, text: anls.SCORER.accuracy(row, text)),
    "anls_mmf": ("several", lambda row, text: max(anls.stripped(answer, text) for answer in row.answers)),
    "anls_pix2struct": ("several", lambda row, text: max(anls.lowered(answer, text) for answer in row.answers)),
    "relaxed": ("several", lambda row, text: relaxed.SCORER.accuracy(row, text)),
    "relaxed_stripped": ("several", lambda row, text: relaxed.SCORER.accuracy(row, text.strip())),
    "textvqa": ("ten", textvqa.row_accuracy),
    "ocrbench": ("several", ocrbench.row_accuracy),
    "ocrbench_folded": ("several", ocrbench.folded_accuracy),
    "mmmu": ("wide", lambda row, text: mmmu.SCORER.accuracy(row, text)),
    "mmmu_pro": ("wide", lambda row, text: mmmu.PRO.accuracy(row, text)),
    "mmmu_open": ("words", lambda row, text: mmmu.SCORER.accuracy(row, text)),
    "letters": ("wide", letters.row_accuracy),
    "scienceqa": ("choices", lambda row, text: scienceqa.SCORER.accuracy(row, text)),
    "scienceqa_own": ("choices", scienceqa.own_accuracy),
    "aokvqa": ("choices", lambda row, text: aokvqa.SCORER.accuracy(row, text)),
    "aokvqa_direct": ("ten", lambda row, text: aokvqa.DIRECT.accuracy(row, text)),
    "pope": ("yes_or_no", pope.row_accuracy),
    "rouge_l": ("sentences", rouge.row_rouge_l),
    "boxes_qwen": ("points", lambda row, text: boxes.reads(boxes.qwen_box)(row, text)),
    "boxes_lmms": ("shares", lambda row, text: boxes.reads(boxes.share_box)(row, text)),
}


SETS = pytest.mark.parametrize(("rows", "suffix"), [(USUAL, ""), (HARD, "_hard")], ids=["usual", "hard"])


@SETS
@pytest.mark.parametrize("name", METRICS)
def test_scores_are_those_of_the_official_script(name, rows: Rows, suffix):
    kind, score = METRICS[name]
    official, scored = expected(name + suffix), getattr(rows, kind)
    assert len(official) == len(scored) == made_up.NUM
    ours = [score(example(row), row.prediction) for row in scored]
    wrong = [
        (row, own, theirs)
        for row, own, theirs in zip(scored, ours, official, strict=True)
        if theirs is not None and abs(own - theirs) > 1e-6
    ]
    assert wrong == []
    assert len({theirs for theirs in official if theirs is not None}) > 1


@SETS
def test_no_letter_is_found_just_where_the_official_parser_would_guess(rows: Rows, suffix):
    for name, letter_of in (("mmmu", mmmu.mmmu_letter), ("mmmu_pro", mmmu.pro_letter)):
        found = [letter_of(row.prediction, row.options) is None for row in rows.wide]
        assert found == [theirs is None for theirs in expected(name + suffix)]
        assert any(found)


@SETS
def test_precision_recall_f1_and_the_share_of_yes_are_those_of_the_official_script(rows: Rows, suffix):
    counts = pope.outcomes([(example(row), row.prediction) for row in rows.yes_or_no]).sum(axis=0)
    assert list(pope.shares(counts).values()) == pytest.approx(expected("pope_shares" + suffix), abs=1e-6)


@SETS
def test_questions_in_several_orders_are_right_as_by_the_official_script(rows: Rows, suffix):
    names = [str(number // 2 + number % 2 * circular.ORDERS) for number in range(len(rows.wide))]
    ordered = [(replace(example(row), id=name), row.prediction) for name, row in zip(names, rows.wide, strict=True)]
    official = expected("circular" + suffix)
    assert circular.SCORER.values(ordered).tolist() == official
    assert 0 < sum(filter(None, official)) < len(official) == made_up.NUM / 2


@SETS
def test_accuracy_and_consistency_of_nlvr2_are_those_of_the_official_script(rows: Rows, suffix):
    named = [(replace(example(row), id=name), row.prediction) for name, row in rows.statements]
    found = nlvr2.score_nlvr2(named).metrics
    assert list(found.values()) == pytest.approx([100 * share for share in expected("nlvr2_shares" + suffix)], abs=1e-4)
