"""Validation during and after training. The caller decides what is scored and how."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dora_mm.train.metrics import MetricsLog, read_metrics
from dora_mm.utils.run_directory import RunDirectory

OVERALL = "overall"


class MetricScores(Protocol):
    """The scores of one task."""

    @property
    def main(self) -> str:
        """The name of the main metric."""
        ...

    @property
    def metrics(self) -> Mapping[str, float]:
        """All metrics by name, without those that could not be computed."""
        ...

    @property
    def value(self) -> float | None:
        """The main metric, higher is better; None if it could not be computed."""
        ...


ScoresT = TypeVar("ScoresT", bound=MetricScores)


class Validation(Generic[ScoresT]):
    """Scores every task, logs all metrics, and saves the best adapter so far by the main one, per task and overall.

    The best values so far are read from the log, whose rows after the resumed step are dropped, so that a resumed run
    makes the same decisions as an uninterrupted one.

    Args:
        run: The run directory; the log is `validation/metrics.jsonl` in it.
        evaluate: Scores the model in its current state, by task name.
        save: Writes the adapter into a folder; the best ones go to `best/<task>` and `best/overall`.
        resumed_step: The number of finished steps that the run resumes from; 0 for a new run.
    """

    def __init__(
        self,
        run: RunDirectory,
        evaluate: Callable[[], Mapping[str, ScoresT]],
        save: Callable[[Path], None],
        resumed_step: int,
    ):
        self.run, self.evaluate, self.save = run, evaluate, save
        self.log = MetricsLog(run.stage("validation"), resumed_step)

    def __call__(self, step: int) -> Mapping[str, ScoresT]:
        """Validates after `step` finished steps and returns the scores by task name."""
        scores = self.evaluate()
        values = main_values(scores)
        before = [row for row in read_metrics(self.log.path) if row["step"] < step]
        for name, value in values.items():
            if all(value > row.get(name, float("-inf")) for row in before):
                self.save(self.run.path / "best" / name)
        # Resuming a finished run validates its last step again, which is logged already.
        if not any(row["step"] == step for row in read_metrics(self.log.path)):
            self.log.write(step, **values, **other_values(scores))
            self.log.sync()
        return scores

    def close(self) -> None:
        self.log.close()


def overall(values: Mapping[str, float]) -> float:
    """One score for all tasks: the geometric mean of their main metrics.

    Captions would dominate the arithmetic mean: on the composed scenes CIDEr exceeds 200 and changes by 20 from one
    learning rate to the next, while accuracies change by 5.
    """
    return math.prod(values.values()) ** (1 / len(values))


def main_values(scores: Mapping[str, MetricScores]) -> dict[str, float]:
    """The main metric of each task that has one, and `overall`; empty if no task has one."""
    values = {name: found.value for name, found in scores.items() if found.value is not None}
    return {**values, OVERALL: overall(values)} if values else {}


def other_values(scores: Mapping[str, MetricScores]) -> dict[str, float]:
    """The metrics beside the main one of each task, as "vqa/accuracy (lavis)"."""
    return {
        f"{name}/{metric}": value
        for name, found in scores.items()
        for metric, value in found.metrics.items()
        if metric != found.main
    }
