"""Answers and scores on validation splits, while a model trains and after it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from dora_mm.config.vl import DecodeConfig
from dora_mm.core import fixed_parameters
from dora_mm.eval.vl import Rows, VLScores, score
from dora_mm.sampling.answers import Answerer, predict
from dora_mm.tasks.vl_bart import VLBartTask
from dora_mm.tasks.vl_sets import ValidationSet
from dora_mm.train.metrics import MetricsLog, read_metrics
from dora_mm.train.run import RunDirectory

OVERALL = "overall"


def answerers(task: VLBartTask, sets: Mapping[str, ValidationSet], config: DecodeConfig) -> dict[str, Answerer]:
    """One for each split; ValueError where one cannot be made."""
    task.check(sets)
    return {name: Answerer(task.model, task.tokenizer, name, config, split.candidates) for name, split in sets.items()}


def answer_all(
    task: VLBartTask,
    sets: Mapping[str, ValidationSet],
    config: DecodeConfig,
    limit: int | None = None,
) -> dict[str, Rows]:
    """Task name -> its examples with the model's answers, in eval mode and with all that is adapted computed once."""
    found: dict[str, Rows] = {}
    made = answerers(task, sets, config)
    networks = (task.model, task.eyes)
    before = [network.training for network in networks]
    try:
        for network in networks:
            network.eval()
        with fixed_parameters(task.model), fixed_parameters(task.eyes):
            for name, split in sets.items():
                inputs_of = partial(task.inputs, name, images=split.images)
                found[name] = predict(made[name], split.table, inputs_of, limit)
    finally:
        for network, training in zip(networks, before, strict=True):
            network.train(training)
    return found


class Validation:
    """Called after steps: scores every task, logs it, and saves what is the best so far, per task and overall.

    The best so far is read from the log, whose rows after the resumed step are dropped: a resumed run decides as an
    uninterrupted one does.

    Args:
        answers: task name -> examples with answers, of the model as it is now.
        save: writes the adapter into a folder; those of the best are `best/<task>` and `best/overall`.
    """

    def __init__(
        self,
        run: RunDirectory,
        answers: Callable[[], Mapping[str, Rows]],
        save: Callable[[Path], None],
        resumed_step: int,
    ):
        self.run, self.answers, self.save = run, answers, save
        self.log = MetricsLog(run.stage("validation").path, resumed_step)

    def __call__(self, step: int) -> dict[str, VLScores]:
        scores = {name: score(name, rows, meteor=False) for name, rows in self.answers().items()}
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


def main_values(scores: Mapping[str, VLScores]) -> dict[str, float]:
    """The main metric of each task that has one, and `overall`."""
    values = {name: found.value for name, found in scores.items() if found.value is not None}
    return {**values, OVERALL: overall(values)} if values else {}
