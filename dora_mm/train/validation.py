"""Scores on validation splits, while a model trains and after it. What a score is of, the caller knows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from dora_mm.train.metrics import MetricsLog, read_metrics
from dora_mm.train.run import RunDirectory

OVERALL = "overall"


class Scored(Protocol):
    """The scores of one task."""

    @property
    def value(self) -> float | None:
        """The main metric, more is better; None where it could not be computed."""
        ...


ScoresT = TypeVar("ScoresT", bound=Scored)


class Validation(Generic[ScoresT]):
    """Called after steps: scores every task, logs the main metrics, and saves the best so far, per task and overall.

    The best so far is read from the log, whose rows after the resumed step are dropped: a resumed run decides as an
    uninterrupted one does.

    Args:
        run: The run directory; the log is `validation/metrics.jsonl` in it.
        evaluate: Scores the model as it is now, by task name.
        save: Writes the adapter into a folder; those of the best are `best/<task>` and `best/overall`.
        resumed_step: The number of finished steps that the run goes on from, 0 for a new one.
    """

    def __init__(
        self,
        run: RunDirectory,
        evaluate: Callable[[], Mapping[str, ScoresT]],
        save: Callable[[Path], None],
        resumed_step: int,
    ):
        self.run, self.evaluate, self.save = run, evaluate, save
        self.log = MetricsLog(run.stage("validation").path, resumed_step)

    def __call__(self, step: int) -> Mapping[str, ScoresT]:
        """The scores after `step` finished steps, by task name."""
        scores = self.evaluate()
        values = main_values(scores)
        before = [row for row in read_metrics(self.log.path) if row["step"] < step]
        for name, value in values.items():
            if all(value > row.get(name, float("-inf")) for row in before):
                self.save(self.run.path / "best" / name)
        if not any(row["step"] == step for row in read_metrics(self.log.path)):  # a finished run, resumed
            self.log.write(step, **values)
        return scores

    def close(self) -> None:
        self.log.close()


def overall(values: Mapping[str, float]) -> float:
    """How good all tasks are together: the geometric mean of their main metrics.

    Captions would decide the arithmetic one. On the composed scenes CIDEr exceeds 200 and moves by 20 from one learning
    rate to the next, where accuracies move by 5.
    """
    return math.prod(values.values()) ** (1 / len(values))


def main_values(scores: Mapping[str, Scored]) -> dict[str, float]:
    """The main metric of each task that has one, and `overall`."""
    values = {name: found.value for name, found in scores.items() if found.value is not None}
    return {**values, OVERALL: overall(values)} if values else {}
