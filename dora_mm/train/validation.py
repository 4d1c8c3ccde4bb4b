"""Validation during and after training. The caller decides what is measured and how."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from dora_mm.config.training import ValidationConfig
from dora_mm.train.checkpoint import last_step
from dora_mm.train.metrics import MetricsLog
from dora_mm.train.weights import WeightAverage
from dora_mm.utils.metric_rows import rows_until
from dora_mm.utils.run_directory import RunDirectory

log = logging.getLogger(__name__)
OVERALL = "overall"
LOSS = "loss"  # of a task, in rows as "vqa/loss"
STAGE = "validation"
FEW = 20  # rows: the score of fewer says nothing of a step


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


class Validation:
    """Measures the model, logs the values, saves the best adapter so far, and says when a training should stop.

    All it decides by is in the log, whose rows after the resumed step are dropped, so that a resumed run makes the same
    decisions as an uninterrupted one. Of several processes each has one of these and decides the same; one writes.

    Args:
        run: The run directory; the log is `validation/metrics.jsonl` in it.
        config: The `evaluate` section.
        measure: Measures the model in its current state: values by name, equal in all processes.
        qualities: Maps the values of a row to what the best adapters are chosen by, higher is better, by the names of
            their folders in `best`; `overall` also decides when to stop.
        save: Writes the adapter into a folder; None in a process that does not take part in that.
        resumed_step: The number of finished steps that the run resumes from; 0 for a new run.
        writes: Whether this process writes.
    """

    def __init__(
        self,
        run: RunDirectory,
        config: ValidationConfig,
        measure: Callable[[], Mapping[str, float]],
        qualities: Callable[[Mapping[str, float]], Mapping[str, float]],
        save: Callable[[Path], None] | None,
        resumed_step: int,
        *,
        writes: bool = True,
    ):
        self.run, self.config, self.measure, self.qualities, self.save = run, config, measure, qualities, save
        self.log = MetricsLog(run.stage(STAGE), resumed_step) if writes else None
        self.rows = rows_until(run.path / STAGE / "metrics.jsonl", resumed_step)

    def is_due(self, step: int, steps: int) -> bool:
        """Whether to validate after `step` finished steps of a training of `steps`, in which the last has its own."""
        return bool(self.config.every) and step % self.config.every == 0 and 0 < step < steps

    def __call__(self, step: int) -> Mapping[str, float]:
        """Validates after `step` finished steps and returns the values."""
        values = self.measure()
        earlier = [self.qualities(row) for row in self.rows if row["step"] < step]
        for name, value in self.qualities(values).items():
            if self.save is not None and all(value > row.get(name, -math.inf) for row in earlier):
                self.save(self.run.path / "best" / name)
        self.note(step, values)
        return values

    def note(self, step: int, values: Mapping[str, float]) -> None:
        """Logs values, unless the step has some: resuming a finished run validates its last step again."""
        if all(row["step"] != step for row in self.rows):
            self.rows.append({"step": step, **values})
            if self.log is not None:
                self.log.write(step, **values)
                self.log.sync()

    @property
    def best_step(self) -> int | None:
        """The step with the highest overall quality, the first of several; None: there is none."""
        return max(found, key=found.__getitem__) if (found := self._overall()) else None

    def should_stop(self) -> bool:
        """Whether the last validations, as many as `evaluate.patience`, were all not better than one before them."""
        best, patience = self.best_step, self.config.patience
        return best is not None and patience is not None and sum(step > best for step in self._overall()) >= patience

    def _overall(self) -> dict[int, float]:
        found = {row["step"]: self.qualities(row).get(OVERALL) for row in self.rows}
        return {step: value for step, value in found.items() if value is not None}

    def close(self) -> None:
        if self.log is not None:
            self.log.close()


class SplitScores:
    """Measures the model on validation splits: all processes share the answers, and the main one scores them.

    Args:
        accelerator: Knows the processes.
        answer: Answers the rows of the splits.
        score: The scores of such answers, by split.
        losses: Computes the losses of the splits.
        save_answers: Saves the answers to some of the rows to a file; None: only takes part in answering.

    Attributes:
        scores: Those of the last call, in the main process.
        answered: The rows that the last call answered, with their answers, by split.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        answer: Callable[[], Any],
        score: Callable[[Any], dict[str, Any]],
        losses: Callable[[], Mapping[str, float]],
        save_answers: Callable[[Path | None], None],
    ):
        self.accelerator, self.answer, self.score, self.losses = accelerator, answer, score, losses
        self.save_answers = save_answers
        self.scores: dict[str, Any] = {}
        self.answered: Mapping[str, Any] = {}

    def __call__(self) -> dict[str, float]:
        """The values of all metrics, and the loss of each split."""
        self.answered, losses = self.answer(), self.losses()
        values: list[Any] = [None]
        if self.accelerator.is_main_process:
            self.scores = self.score(self.answered)
            named = {f"{name}/{LOSS}": value for name, value in losses.items()}
            values = [main_values(self.scores) | other_values(self.scores) | named]
        return broadcast_object_list(values)[0]

    @property
    def num_rows(self) -> int:
        """How many rows the last call answered."""
        return sum(map(len, self.answered.values()))


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
    """The metrics of each task other than the main one, as "vqa/accuracy (lavis)"."""
    return {
        f"{name}/{metric}": value
        for name, found in scores.items()
        for metric, value in found.metrics.items()
        if metric != found.main
    }


def task_qualities(loss_decides: Mapping[str, bool], row: Mapping[str, Any]) -> dict[str, float]:
    """The selection score of each task, by which its best adapter is chosen, and their geometric mean as `overall`.

    Args:
        loss_decides: Of each task whether it is the held-out loss, and not the main metric.
        row: The values of a validation.

    Returns:
        The main metric; or, of a loss, the likelihood of a token of the answers in percent, exp(-loss). Without a task
        whose metric could not be computed.
    """
    found = {}
    for name, loss in loss_decides.items():
        value = 100 * math.exp(-row[f"{name}/{LOSS}"]) if loss else row.get(name)
        if value is not None:
            found[name] = value
    return {**found, OVERALL: overall(found)} if found else {}


def log_scores(step: int, values: Mapping[str, float], counts: Mapping[str, int]) -> None:
    """Logs main metrics and losses of tasks, from the row of a validation.

    Args:
        step: The number of finished steps.
        values: The row.
        counts: How many rows of each task were answered.
    """
    few = {name: f" (n = {count}: too few to judge by)" for name, count in counts.items() if count < FEW}
    shown = {name: f"{value:.2f}{few.get(name, '')}" for name, value in values.items() if "/" not in name}
    shown |= {name: f"{value:.4f}" for name, value in values.items() if name.endswith(f"/{LOSS}")}
    log.info("step %d: %s", step, ", ".join(f"{name} {value}" for name, value in shown.items()))


def held_out_loss(
    run: RunDirectory,
    config: ValidationConfig,
    measure: Callable[[], dict[str, float]],
    as_base: Callable[[], AbstractContextManager[None]],
    saves: Callable[[Path], None] | None,
    average: WeightAverage | None,
    *,
    writes: bool,
) -> Validation:
    """Validates by held-out losses; step 0 of the log has the base model's, later steps also the difference to them.

    Args:
        run: The run directory.
        config: The `evaluate` section.
        measure: Computes the losses, by name.
        as_base: Opens a context in which the model is the base model; of method full, nothing is trained yet.
        saves: As in `Validation`.
        average: The moving average, which is measured, too; None: there is none.
        writes: As in `Validation`.
    """

    def relative_to_base() -> dict[str, float]:
        base, found = validation.rows[0], measure()
        return found | {f"{name}_minus_base": value - base[name] for name, value in found.items()}

    done, values = last_step(run.checkpoints), average.measured(relative_to_base) if average else relative_to_base
    validation = Validation(run, config, values, by_held_out_loss, saves, done, writes=writes)
    if not validation.rows:
        with as_base():
            validation.note(0, measure())
    return validation


def by_held_out_loss(row: Mapping[str, float]) -> dict[str, float]:
    """The selection score of an adapter, the negative held-out loss; empty for the base model."""
    return {OVERALL: -row["held_out_loss"]} if row.get("step") != 0 else {}
