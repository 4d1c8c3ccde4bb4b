"""What the rules of suites do where tools differ: raw lengths, percent signs, years, guesses, the share of yes."""

import json
import random
from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dora_mm.data.vl.example import Example
from dora_mm.eval.vl import anls, boxes, captions, letters, mmmu, pope, relaxed
from dora_mm.eval.vl.confidence_intervals import answer_scores, confidence_intervals
from dora_mm.eval.vl.metrics import report, score
from dora_mm.registries.scorers import SCORERS
from dora_mm.registries.vl_tasks import TASKS


def row(key: str, references: Sequence[str], prediction: str, **more: Any) -> tuple[Example, str]:
    answers = tuple(references)
    return Example(key, (f"{key}.png",), "?", answers, (1.0,) * len(answers), **more), prediction


def one(suite: str, references: Sequence[str], prediction: str, **more: Any) -> dict[str, float]:
    return score(suite, [row("1", references, prediction, **more)]).metrics


BOX = json.dumps({"bbox": [[0, 0, 1, 1]], "norm1": True, "size": [9, 9]})
MADE_UP: dict[str, dict[str, Any]] = {  # by scorer, what its rows need beside an answer
    "vqa": {"raw_answers": ("yes",) * 10, "kinds": ("yes/no", "is")},
    "textvqa": {"raw_answers": ("yes",) * 10},
    "aokvqa_direct": {"raw_answers": ("yes",) * 10},
    "gqa": {"kinds": ("query", "rel")},
    "nlvr2": {"id": "dev-1-0-1"},
    "clip_choices": {"answers": ("a1",)},
    "options": {"options": ("true", "false"), "answers": ("true",)},
    "boxes": {"boxes": BOX},
    "mmmu": {"options": ("yes", "no"), "answers": ("A",)},
}
LETTERS = ("mmmu", "mmmu_pro", "letters", "circular", "choices", "scienceqa", "aokvqa")


@pytest.mark.parametrize("scorer", sorted(set(SCORERS) - {"captions", "clip_captions"}))
def test_every_metric_has_a_rule_in_its_table(scorer):
    task = next(name for name, record in TASKS.items() if record.scorer == scorer)
    made_up = MADE_UP["mmmu"] if scorer in LETTERS else MADE_UP.get(scorer, {})
    example = replace(Example("1-2-3", ("a.png",), "?", ("yes",), (1.0,)), **made_up)
    scores = score(task, [(example, "1.5" if scorer == "preferences" else "yes"), (replace(example, id="1-2-4"), "0")])
    assert set(scores.rules) == set(scores.metrics)
    assert scores.main in scores.metrics
    for name, rule in scores.rules.items():
        assert rule
        assert f"| {name} | {scores.metrics[name]:.2f} | {rule} | {scores.counts.get(name, 2)} |" in report(
            task, scores
        )


@pytest.mark.parametrize(("task", "rule"), [("caption", "CIDEr-D, of Penn Treebank tokens"), ("tvc", "as VALUE")])
def test_caption_metrics_have_rules(monkeypatch, task, rule):
    found = captions.CaptionScores({"CIDEr": 1.0, "BLEU-4": 2.0}, (1.0,))
    monkeypatch.setattr(captions, "caption_scores", lambda *_, **__: found)
    scores = score(task, [row("1", ("a cat",), "a dog")])
    assert set(scores.rules) == set(scores.counts) == {"CIDEr", "BLEU-4"}
    assert rule in scores.rules["CIDEr"]


def test_a_double_space_changes_the_length_that_edits_are_divided_by():
    assert anls.official("abcd", "abxd") == 0.75
    assert anls.official("a b d", "a  b  x") == pytest.approx(1 - 1 / 7)
    assert anls.stripped("a b d", "a  b  x") == pytest.approx(1 - 3 / 7)


def test_a_similarity_below_a_half_is_nothing_and_empty_answers_are_equal():
    assert anls.official("abcd", "abxy") == 0.5
    assert anls.lowered("abcd", "abxy") == 0.0
    assert anls.official("abcd", "axyz") == 0.0
    assert anls.official("", "") == anls.stripped("", " ") == 1.0
    assert anls.official("москва", "Москвы") == pytest.approx(5 / 6)


@pytest.mark.parametrize(
    ("reference", "prediction", "right"),
    [
        ("12", "12%", False),
        ("12%", "12.5%", True),
        ("0.12", "12%", True),
        ("0", "0.0", False),  # a target of 0 has to be equal
        ("0", "0", True),
        ("1200", "1,200", False),
        ("1,200", "1,200", True),
        ("2019", "2010", True),  # a year, too, may be 5 % off
        ("2019", "1900", False),
        ("100", "105", True),
        ("100", "105.1", False),
        ("Blue", "blue", True),
    ],
)
def test_numbers_may_be_five_percent_off(reference, prediction, right):
    assert relaxed.is_near(reference, prediction) is right


def test_years_that_are_right_by_the_tolerance_are_counted():
    scores = score("chartqa", [row("1", ("2019",), "2010"), row("2", ("2019",), "2019"), row("3", ("7",), "7 ")])
    assert scores.metrics["relaxed accuracy"] == pytest.approx(100)
    assert scores.notes == ("1 answers are another year than the right one, and right by the 5 %",)


def test_textvqa_takes_commas_and_question_marks_off_before_all_else():
    ten = ("john's, inc?",) * 3 + ("x",) * 7
    found = one("textvqa", ("a",), "John 's inc", raw_answers=ten)
    assert found["accuracy"] == pytest.approx(90)
    assert found["accuracy (VQA v2)"] == 0
    with pytest.raises(ValueError, match="question 1: TextVQA accuracy is defined over ten answers, got 2"):
        one("textvqa", ("a",), "a", raw_answers=("a", "b"))


def test_where_mmmu_would_guess_the_answer_is_wrong_and_the_expected_gain_is_beside_it():
    options = ("red", "green", "blue", "none of these")
    rows = [row("1", ("B",), "It is (A) or maybe (B)", options=options, kinds=("Art",))]
    rows += [row("2", ("B",), "green", options=options), row("3", ("C",), "no idea", options=options)]
    scores = score("mmmu", rows)
    assert scores.metrics["accuracy"] == pytest.approx(100 / 3)
    assert scores.metrics["accuracy with guesses"] == pytest.approx(100 / 3 + 100 * (1 / 4 + 1 / 4) / 3)
    assert scores.notes == ("2 of 3 answers name no option, where the script guesses",)


def test_mmmu_and_mmmu_pro_read_letters_in_other_ways():
    options = ("red", "green")
    assert (mmmu.mmmu_letter("A.", options), mmmu.mmmu_letter("B. green", options)) == ("A", None)
    assert (mmmu.pro_letter("B. green", options), mmmu.pro_letter("So Answer: B", options)) == ("B", "B")


@pytest.mark.parametrize(
    ("reference", "prediction", "right"),
    [("3.14159", "so x = 3.14", True), ("1200", "The answer is 1,200.", True), ("nile", "It is the Nile river", True)],
)
def test_open_answers_of_mmmu(reference, prediction, right):
    assert one("mmmu", (reference,), prediction)["accuracy"] == 100 * right


def test_the_share_of_yes_is_of_what_the_model_says():
    rows = [row(str(n), ("yes" if n % 2 else "no",), "Yes, there is." if n < 9 else "no") for n in range(10)]
    scores = score("pope", rows)
    assert scores.metrics["share of yes"] == pytest.approx(90)
    assert scores.metrics["recall"] == pytest.approx(80)
    assert scores.metrics["precision"] == pytest.approx(100 * 4 / 9)


@pytest.mark.parametrize("prediction", ["", "NO", "No\nthere is none", "I see one"])
def test_all_that_has_no_word_of_no_is_yes(prediction):
    assert pope.says_yes(prediction)


def test_yes_and_no_of_vlmevalkit_begin_with_a_capital():
    assert not pope.is_yes(row("1", ("No",), "")[0])
    assert score("pope", [row("1", ("No",), "No"), row("2", ("Yes",), "Yes")]).metrics["accuracy"] == 100


def test_confidence_intervals_of_f1_are_over_images():
    rows = [row(str(n), ("yes" if n % 3 else "no",), "yes" if n % 2 else "no") for n in range(60)]
    each = pope.share_confidence_intervals(rows, [example.id for example, _ in rows])
    pairs = pope.share_confidence_intervals(rows, [str(int(example.id) // 6) for example, _ in rows])
    assert each["F1"].mean == pytest.approx(score("pope", rows).metrics["F1"] / 100)
    assert each["F1"].low < each["F1"].mean < each["F1"].high
    assert pairs["F1"].low != each["F1"].low


def test_a_share_of_all_is_not_certain():
    rows = [row(str(n), ("yes",), "yes") for n in range(40)]
    found = pope.share_confidence_intervals(rows, [example.id for example, _ in rows])
    assert found["recall"].mean == 1.0
    assert found["recall"].low == pytest.approx(0.9119, abs=1e-3)  # Clopper and Pearson
    assert not found["F1"].has_ends
    assert "precision" not in pope.share_confidence_intervals([row("1", ("yes",), "no")], ["1"])


def test_formulas_of_ocrbench_have_no_spaces_and_keep_their_case():
    assert one("ocrbench", ("x ^ { 2 }",), "so x^{2}", kinds=("Formula", "HME100k"))["accuracy"] == 100
    assert one("ocrbench", ("x ^ { 2 }",), "so X^{2}", kinds=("Formula", "HME100k"))["accuracy"] == 0
    vlmevalkit = ("Handwritten Mathematical Expression Recognition",)
    assert one("ocrbench", ("x ^ { 2 }",), "so x^{2}", kinds=vlmevalkit)["accuracy"] == 100
    found = one("ocrbench", ("ABC",), "\uff41\uff42\uff43", kinds=("Regular Text Recognition", "IIIT5K"))
    assert (found["accuracy"], found["accuracy (full width folded)"]) == (0, 100)


def test_a_question_of_mmbench_counts_where_it_is_right_in_every_order():
    options = ("a cat", "a dog")
    rows = [row("7", ("A",), "A", options=options), row("1000007", ("B",), "B. a cat", options=options[::-1])]
    rows += [row("8", ("A",), "A", options=options), row("1000008", ("B",), "A", options=options[::-1])]
    scores = score("mmbench", rows)
    assert scores.metrics == {"circular": 50.0, "accuracy": 75.0}
    found = answer_scores("mmbench", [rows])
    assert found is not None
    assert (found.values_QS.shape, found.values_QS.mean()) == ((2, 1), 0.5)
    assert confidence_intervals({"mmbench": found})["mmbench"].mean == 0.5
    with pytest.raises(ValueError, match="question 9 has other orders of its options, but not the first"):
        score("mmbench", [row("1000009", ("A",), "A", options=options)])


def test_letters_without_a_classifier():
    options = ("a cat", "a dog")
    assert letters.letter_of("I see a cat and a dog", options) is None
    assert letters.letter_of("It is a dog", options) == "B"
    assert letters.letter_of("Sorry, I can't help with images of people yet.", options) == letters.NONE


@pytest.mark.parametrize(
    "answer",
    [
        "<box>(100,200),(500,600)</box>",
        "<|box_start|>(100,200),(500,600)<|box_end|>",
        "<box>[[100, 200, 500, 600]]</box>",
        "[0.1, 0.2, 0.5, 0.6]",
        "[64, 96, 320, 288]",
        "<loc0205><loc0102><loc0614><loc0512> cat",
        "<loc_100><loc_200><loc_500><loc_600>",
        '[{"box_2d": [200, 100, 600, 500], "label": "cat"}]',
    ],
)
def test_boxes_in_every_notation(answer):
    assert boxes.box_of(answer, boxes.BoxScale((640, 480))) == pytest.approx((0.1, 0.2, 0.5, 0.6), abs=1e-3)


@pytest.mark.parametrize(
    "answer",
    [
        '```json\n[{"bbox_2d": [128, 84, 640, 252], "label": "cat"}]\n```',
        "<|box_start|>(128,84),(640,252)<|box_end|>",
        "[0.1, 0.2, 0.5, 0.6]",
    ],
)
def test_numbers_are_of_what_the_class_counts_in(answer):
    frame = boxes.BoxScale((640, 480), (1280, 420))
    assert boxes.box_of(answer, frame) == pytest.approx((0.1, 0.2, 0.5, 0.6), abs=1e-3)


def test_tokens_of_boxes_are_read_as_by_their_own_processors():
    from transformers.models.florence2.processing_florence2 import Florence2PostProcessor
    from transformers.models.kosmos2.processing_kosmos2 import patch_index_to_coordinate

    frame, stream = boxes.BoxScale((640, 480)), random.Random(0)
    florence = SimpleNamespace(quantize_bins=(1000, 1000))
    for _ in range(200):
        first, last = (stream.randrange(1024) for _ in range(2))
        answer = f"<phrase>it</phrase><object><patch_index_{first:04}><patch_index_{last:04}></object>"
        assert boxes.box_of(answer, frame) == pytest.approx(patch_index_to_coordinate(first, last, 32))
        bins = [stream.randrange(1000) for _ in range(4)]
        answer = f"it{''.join(f'<loc_{number}>' for number in bins)}"
        pixels = Florence2PostProcessor.dequantize(florence, torch.tensor([bins]), frame.size)[0].tolist()  # pyright: ignore[reportArgumentType]
        found = boxes.box_of(answer, frame)
        assert found is not None
        assert [int(share * frame.size[n % 2] + 1e-6) for n, share in enumerate(found)] == pixels  # which it cuts off


def test_answers_whose_numbers_may_be_of_another_image_are_counted():
    about = {"bbox": [[64, 96, 320, 288]], "norm1": False, "size": [640, 480]}
    row = Example("1", ("a.jpg",), "it", ("[0.1, 0.2, 0.5, 0.6]",), boxes=json.dumps(about))
    answers = ["[64, 96, 320, 288]", "[0.1, 0.2, 0.5, 0.6]", "none"]
    scores = boxes.SCORER.score([(row, answer) for answer in answers], meteor=False)
    assert scores.value == pytest.approx(200 / 3)
    assert [note.partition(" are ")[0] for note in scores.notes][1] == "1 of 3 answers"
    resized = boxes.with_grids([(row, "[128, 84, 640, 252]")], {(640, 480): (1280, 420)}.get)
    scores = boxes.SCORER.score(resized, meteor=False)
    assert (scores.value, scores.notes) == (100, ())


def test_half_an_overlap_is_enough():
    assert boxes.overlap((0, 0, 1, 1), (0, 0, 1, 0.5)) == 0.5
    assert boxes.overlap((0, 0, 0, 0), (0, 0, 0, 0)) == 0.0


def test_a_question_of_aokvqa_is_answered_by_its_choice_or_its_letter():
    options = ("B", "cat")
    assert one("aokvqa", ("A",), "B", options=options)["accuracy"] == 100  # the text of the first choice
    assert one("aokvqa", ("B",), "(B)", options=options)["accuracy"] == 100
    assert one("aokvqa_direct", ("a",), "cat", raw_answers=("cat",) * 2 + ("Cat",) * 8)["accuracy"] == pytest.approx(
        200 / 3
    )


@pytest.mark.parametrize("name", sorted(set(SCORERS) - {"captions", "clip_captions", "preferences"}))
def test_a_missing_answer_is_wrong_by_every_rule(name):
    scorer = SCORERS[name]
    example = Example(
        **{"id": "1", "images": (), "text": "?", "answers": ("yes",), "scores": (1.0,), **MADE_UP.get(name, {})}
    )
    for text in ("", " \n"):
        assert scorer.row(example, text) == 0
        found = scorer.score([(example, text)], meteor=False)
        assert found.metrics[found.main] == 0
        assert scorer.values([(example, text)]).tolist() == [0]


def test_a_missing_answer_is_wrong_where_a_script_takes_it_for_one():
    for label in ("yes", "no"):
        found = one("pope", [label], "")
        assert (found["accuracy"], found["precision"], found["recall"]) == (0, 0, 0)
    assert one("textvqa", ["a"], "", raw_answers=("a",) * 10)["accuracy"] == 0  # an article, which the rule drops


def test_short_answers_with_and_without_folding():
    assert one("short_answers", ("Paris",), "paris.") == {"exact match": 0.0, "exact match (folded)": 100.0}


def test_metrics_of_some_answers_say_of_how_many():
    asked = [row(str(number), ("yes" if number else "no",), "yes" if number < 2 else "no") for number in range(4)]
    assert score("pope", asked).counts == {"precision": 2, "recall": 3}
    typed = [row(str(number), ("yes",), "yes", kinds=("query" if number else "verify", "rel")) for number in range(4)]
    scores = score("gqa", typed)
    assert (scores.num, scores.counts) == (4, {"open": 3, "binary": 1})
    pairs = [
        (replace(row("1", ("True",), "True")[0], id=f"dev-1-{number}-{number // 2}"), "True") for number in range(4)
    ]
    assert score("nlvr2", pairs).counts == {"consistency": 2}
