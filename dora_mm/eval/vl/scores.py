"""The result of a vision-language metric: named numbers, tables by kind, and notes that must be printed with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import fsum
from typing import TYPE_CHECKING

import numpy as np

from dora_mm.data.vl.example import Example, Predictions

if TYPE_CHECKING:
    from dora_mm.eval.statistics import ConfidenceInterval  # which needs scipy

Table = dict[str, tuple[float, int]]  # kind -> mean (x 100) and number of rows
NO_ANSWER = "\ufffd"  # a text that no rule reads as an answer, in place of one that is missing


@dataclass(frozen=True)
class VLScores:
    """The scores of one task on one split, all x 100, as papers print them.

    Attributes:
        main: The metric by which settings and checkpoints are chosen.
        metrics: By name. Metrics that could not be computed are missing, and a note gives the reason.
        tables: By heading, for instance `tables["answer_type"]["yes/no"]`.
        notes: Sentences to be printed with the scores.
        rules: By what rule answers are right, by metric: whose script, and how answers are read.
        num: How many answers were scored; 0: not known.
        counts: Of how many answers, questions or sentences a metric is a mean, where that is another number.
    """

    main: str
    metrics: dict[str, float]
    tables: dict[str, Table] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    rules: Mapping[str, str] = field(default_factory=dict)
    num: int = 0
    counts: Mapping[str, int] = field(default_factory=dict)

    @property
    def value(self) -> float | None:
        """The main metric; None where it could not be computed."""
        return self.metrics.get(self.main)


def exact_match(example: Example, prediction: str) -> float:
    """Returns 1 where the prediction is the answer, else 0."""
    return float(prediction.strip() == example.answers[0])


def is_answered(example: Example) -> bool:
    """Returns whether the example has reference answers."""
    return bool(example.answers or example.raw_answers)


@dataclass(frozen=True)
class AnswerScorer:
    """Scores answers by their mean accuracy.

    Attributes:
        compute: All metrics of a split.
        accuracy: That of one prediction, 0 to 1.
        group: What rows have in common that are not independent, beside their images; None: nothing.
        grouping: What `group` joins, for notes.
        unit: The id of the question that a row asks: one that several rows ask is right where all of them are.
        scores_answers_only: Whether it needs nothing of a row but its answers, so that references are enough.
        confidence_intervals: 95 % confidence intervals of metrics that are no means of answers, from predictions and
            the group of each.
        wrong: An answer that the rule counts as wrong. It stands for one that is missing, which scores 0 also where an
            official script takes an empty text for an answer.
    """

    compute: Callable[[Predictions], VLScores]
    accuracy: Callable[[Example, str], float]
    group: Callable[[Example], str | None] = lambda _: None
    grouping: str = ""
    unit: Callable[[Example], str] = lambda example: example.id
    scores_answers_only: bool = False
    confidence_intervals: Callable[[Predictions, Sequence[str]], dict[str, ConfidenceInterval]] = lambda *_: {}
    wrong: Callable[[Example], str] = lambda _: NO_ANSWER

    def score(self, predictions: Predictions, *, meteor: bool) -> VLScores:
        """All metrics of a split, see `score` in metrics.py."""
        return self.compute(self.filled(predictions))

    def row(self, example: Example, prediction: str) -> float | None:
        """The score of one prediction, see `score_row` in metrics.py."""
        ((_, text),) = self.filled([(example, prediction)])
        return self.accuracy(example, text) if is_answered(example) else None

    def filled(self, predictions: Predictions) -> Predictions:
        """The predictions with a wrong answer in place of each that is missing."""
        return [(example, text if text.strip() else self.wrong(example)) for example, text in predictions]

    def values(self, predictions: Predictions) -> np.ndarray:
        """Values (Q,) whose mean is the main metric / 100, one per `unit`; empty where it could not be computed."""
        found: dict[str, float] = {}
        for example, prediction in predictions:
            unit, value = self.unit(example), self.row(example, prediction) or 0.0
            found[unit] = min(found.get(unit, value), value)
        return np.array(list(found.values()))


Accuracy = Callable[[Example, str], float]  # of one prediction, 0 to 1


def mean_scorer(
    rules: Mapping[str, tuple[Accuracy, str]],
    *,
    headings: Sequence[str] = (),
    scores_answers_only: bool = False,
    notes: Callable[[Predictions, Sequence[float]], Sequence[str]] = lambda *_: (),
) -> AnswerScorer:
    """A scorer whose metrics are means over answers.

    Args:
        rules: By the name of a metric, how it scores an answer, and a sentence that says so. The first is the main one.
        headings: What the kinds of an example are, in their order; none: types, of which it may have several.
        scores_answers_only: As in `AnswerScorer`.
        notes: What else is to be said of predictions and the values of the main metric.
    """
    main, (accuracy, _) = next(iter(rules.items()))

    def compute(predictions: Predictions) -> VLScores:
        check_answered(predictions)
        values = {name: [one(*row) for row in predictions] for name, (one, _) in rules.items()}
        return VLScores(
            main,
            {name: percent(found) for name, found in values.items()},
            by_kind(headings, predictions, values[main]) if headings else by_type(predictions, values[main]),
            tuple(notes(predictions, values[main])),
            {name: rule for name, (_, rule) in rules.items()},
        )

    return AnswerScorer(compute, accuracy, scores_answers_only=scores_answers_only)


def check_answered(predictions: Predictions, *, every: bool = True) -> None:
    """Checks that there are reference answers, which test splits do not have.

    Args:
        predictions: Examples with predictions.
        every: Whether every example needs answers; False requires only one that has some.

    Raises:
        ValueError: There are no predictions, or examples without answers.
    """
    if not predictions:
        raise ValueError("there is nothing to score: the split has no rows")
    missing = [example.id for example, _ in predictions if not is_answered(example)]
    if missing and (every or len(missing) == len(predictions)):
        raise ValueError(f"{missing[0]} has no answers to compare with: for a test split, only write the predictions")


def percent(values: Sequence[float]) -> float:
    """Returns the mean x 100."""
    return 100 * fsum(values) / len(values)


def by_kind(headings: Sequence[str], predictions: Predictions, values: Sequence[float]) -> dict[str, Table]:
    """Returns a table per heading.

    Args:
        headings: What the kinds of an example are, in the order of `Example.kinds`.
        predictions: Examples with predictions. Those without kinds are in no table.
        values: The value of each prediction, 0 to 1.
    """
    grouped: dict[str, dict[str, list[float]]] = {heading: defaultdict(list) for heading in headings}
    for (example, _), value in zip(predictions, values, strict=True):
        for heading, kind in zip(headings, example.kinds, strict=False):
            grouped[heading][kind].append(value)
    return {heading: table(groups) for heading, groups in grouped.items() if groups}


def by_type(predictions: Predictions, values: Sequence[float]) -> dict[str, Table]:
    """Returns a table by `type`, in which a row is of each of its kinds; no table where no row has one."""
    groups: dict[str, list[float]] = defaultdict(list)
    for (example, _), value in zip(predictions, values, strict=True):
        for kind in example.kinds:
            groups[kind].append(value)
    return {"type": table(groups)} if groups else {}


def by_answer(predictions: Predictions, values: Sequence[float]) -> Table:
    """Returns a table by the right answer, which shows whether a model prefers one of the choices.

    Args:
        predictions: Examples with predictions; each has one right answer.
        values: The value of each prediction, 0 to 1.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for (example, _), value in zip(predictions, values, strict=True):
        groups[example.answers[0]].append(value)
    return table(groups)


def table(groups: dict[str, list[float]]) -> Table:
    """Returns the mean x 100 and the number of values of each group, sorted by name."""
    return {name: (percent(values), len(values)) for name, values in sorted(groups.items())}
