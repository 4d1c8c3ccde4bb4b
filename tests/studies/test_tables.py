"""Tables that compare methods, on images and on vision-language tasks."""

import csv
import io
from pathlib import Path

import numpy as np
import pytest

from dora_mm.eval.images.scores import MEANS
from dora_mm.eval.statistics import ConfidenceInterval, mean_ci
from dora_mm.eval.vl.confidence_intervals import AnswerScores, confidence_intervals, points
from dora_mm.studies.tables import (
    Result,
    contrasts_table,
    describe_sizes,
    image_results_csv,
    image_results_table,
    vl_contrasts_table,
    vl_results_csv,
    vl_results_table,
)
from dora_mm.studies.variants import FULL, Variant
from tests.shared.answers import random_scores

LORA, DORA, HALF = Variant("lora", 4), Variant("dora", 4), Variant("dora", 2)


def better(scores: AnswerScores, gain: float) -> AnswerScores:
    return AnswerScores(scores.values_QS + gain, scores.groups)


def test_differences_are_paired_and_marked():
    vqa, gqa = random_scores(50), random_scores(50, seed=1, prefix="g")
    noisy = {"vqa": vqa, "gqa": gqa}
    scores = {
        FULL: {"vqa": random_scores(50, seed=0), "gqa": gqa},
        LORA: noisy,
        DORA: {"vqa": better(vqa, 0.02), "gqa": gqa},
        HALF: noisy,
    }
    table = vl_contrasts_table([4], scores)
    lines = table.splitlines()
    assert lines[0] == "| difference | VQA | GQA | mean |"
    assert lines[2] == "| DoRA, rank 4 - LoRA, rank 4 | 2.0 (2.0 to 2.0) !! | 0.0 (-7.1 to 7.1) | 1.0 (1.0 to 1.0) !! |"
    assert [line.split(" | ")[0].strip("| ") for line in lines[3:6]] == [
        "DoRA, rank 2 - LoRA, rank 4",
        "DoRA, rank 4 - full fine-tuning",
        "LoRA, rank 4 - full fine-tuning",
    ]
    assert "4 of 12 intervals exclude 0 (marked !;" in table
    assert "correction for their number, 4 (marked !!)." in table


def test_what_holm_leaves_has_a_mark_of_its_own():
    """Of eighteen differences one is far from 0, and one would count alone."""
    rng = np.random.default_rng(0)
    noise = rng.normal(size=50)
    noise = 0.02 * 50**0.5 * (noise - noise.mean()) / noise.std(ddof=1)  # the mean has a standard error of 0.02

    def shifted(by):
        return mean_ci((by + noise)[:, None])

    found = {(dora, LORA): by for dora, by in ((DORA, 0.044), (HALF, 0.2))}
    table = contrasts_table(
        [4],
        {LORA: LORA, DORA: DORA, HALF: HALF},
        lambda first, second: {"a": shifted(found[first, second])} | {f"k{i}": shifted(0.0) for i in range(8)},
        {"a": "A"} | {f"k{i}": f"K{i}" for i in range(8)},
        lambda _, ci: ci.text("{:.2f}"),
    )
    one, other = table.splitlines()[2:4]
    assert one.startswith("| DoRA, rank 4 - LoRA, rank 4 | 0.04 (0.00 to 0.08) ! |")
    assert other.startswith("| DoRA, rank 2 - LoRA, rank 4 | 0.20 (0.16 to 0.24) !! |")
    assert "2 of 18 intervals exclude 0" in table
    assert "their number, 1 (marked !!)" in table


def results() -> list[Result]:
    scores = {"gqa": random_scores(30, seed=1, prefix="g"), "vqa": random_scores(30)}
    single = {"vqa": AnswerScores(scores["vqa"].values_QS[:, :1], scores["vqa"].groups)}
    summary = {"parameters": 1234567, "trainable_share": 5.9617, "seconds_per_step": 0.1234, "peak_memory_mb": 2048.4}
    return [
        Result("untrained base", confidence_intervals(single)),
        Result("DoRA, rank 4", confidence_intervals(scores), "0.001*", summary),
    ]


def test_the_table_has_a_column_for_each_task_and_blanks_for_missing_values():
    lines = vl_results_table(results()).splitlines()
    assert lines[0] == "|  | trainable | learning rate | VQA | GQA | mean | seconds a step | memory, MB |"
    bare, dora = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:])
    assert bare[:3] == ["untrained base", "", ""]
    assert bare[4:] == ["", "", "", ""]
    assert dora[:3] == ["DoRA, rank 4", "5.96 %", "0.001*"]
    assert dora[3] == points(results()[1].scores["vqa"])
    assert dora[-2:] == ["0.123", "2,048"]


def test_the_csv_holds_the_same_numbers():
    bare, dora = csv.DictReader(io.StringIO(vl_results_csv(results())))
    scores = results()[1].scores
    for key in ("vqa", "gqa", "mean"):
        for end in ("mean", "low", "high"):
            assert float(dora[f"{key}_{end}"]) == pytest.approx(100 * getattr(scores[key], end), abs=1e-3)
    assert (dora["parameters"], dora["trainable_share"], dora["learning_rate"]) == ("1234567", "5.9617", "0.001*")
    assert (dora["seconds_per_step"], dora["peak_memory_mb"]) == ("0.1234", "2048")
    assert bare["gqa_mean"] == bare["mean_low"] == bare["parameters"] == bare["peak_memory_mb"] == ""


def test_sizes():
    scores = {"vqa": random_scores(40, share=0.7), "caption": random_scores(40, prefix="c")}
    assert describe_sizes(scores).startswith(f"VQA {len(scores['vqa'].groups)} answers in 40 groups; CIDEr ")


def test_the_committed_tables_of_images_are_as_they_are_written_now():
    folder = Path("samples/comparison_3d")
    text = (folder / "results.csv").read_text()
    results = []
    for row in csv.DictReader(io.StringIO(text)):
        scores = {
            key: ConfidenceInterval(*(float(row[f"{key}_{end}"]) for end in ("mean", "low", "high"))) for key in MEANS
        }
        summary = {"parameters": int(row["parameters"])} if row["parameters"] else {}
        results.append(Result(row["name"], scores, row["learning_rate"], summary))
    assert image_results_csv(results) == text
    assert image_results_table(results) in (folder / "table.md").read_text()
