"""Accuracy on the questions made from WordNet, with intervals over groups of rows that share nouns, as CSV.

    python -m tests.benchmarks.wordnet_scores bare=runs/eval_wordnet/002 trained=runs/eval_wordnet/001

Reads the answers of runs of configs/llm/eval_wordnet.yaml, and the rows that their configs name; then the paired
difference of each later run to the first one.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dora_mm.config import load_config
from dora_mm.config.vl import EvalVLConfig
from dora_mm.data.vl.example import Example
from dora_mm.eval.vl.confidence_intervals import AnswerScores, confidence_intervals, minus
from dora_mm.eval.vl.options import row_accuracy
from dora_mm.utils.tables import csv_records

ROWS = {"boolq": 4, "hellaswag": 2, "arc_easy": 4}  # of a group: samples/build/wordnet/questions.py


def main(arguments: Sequence[str]) -> None:
    """Prints a record per run and task, and per difference.

    Args:
        arguments: Runs by name, NAME=RUN.
    """
    runs = {name: scores_of(Path(run)) for name, _, run in (argument.partition("=") for argument in arguments)}
    tasks = [*ROWS, "mean"]
    (first, base), *others = runs.items()
    records = [record(name, task, scores) for name, scores in runs.items() for task in tasks]
    for name, scores in others:
        gained = minus(scores, base)
        records += [record(f"{name} - {first}", task, gained, differences=True) for task in tasks]
    print(csv_records(records), end="")


def scores_of(run: Path) -> dict[str, AnswerScores]:
    """The accuracy of each answer of a run, by task."""
    config = load_config(str(run / "config.yaml"))
    assert isinstance(config, EvalVLConfig)
    found = {}
    for task in config.data.all_tasks:
        assert task.valid is not None
        answers = [json.loads(line) for line in (run / f"predictions_{task.task}.jsonl").read_text().splitlines()]
        rows = json.loads(Path(task.valid.file).read_text())[: len(answers)]
        values = [accuracy(row, answer["answer"]) for row, answer in zip(rows, answers, strict=True)]
        groups = tuple(f"{task.task} {index // ROWS[task.task]}" for index in range(len(values)))
        found[task.task] = AnswerScores(np.array(values)[:, None], groups)
    return found


def accuracy(row: dict[str, str], answer: str) -> float:
    options = tuple(row["instruction"].rpartition(": ")[2].split("/"))
    return row_accuracy(Example("", (), "", (row["output"],), (1.0,), options=options), answer)


def record(name: str, task: str, scores: dict[str, AnswerScores], *, differences: bool = False) -> dict[str, str]:
    found = confidence_intervals(scores, differences=differences)[task]
    ends = {end: f"{100 * value:.2f}" for end, value in found.as_dict().items()}
    num_rows = sum(len(scores[each].groups) for each in (ROWS if task == "mean" else [task]))
    return {"run": name, "task": task, "rows": str(num_rows)} | ends


if __name__ == "__main__":
    main(sys.argv[1:])
