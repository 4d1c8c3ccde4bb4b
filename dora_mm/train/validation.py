"""Answers and scores on validation splits, while a model trains and after it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dora_mm.config.vl import DecodeConfig, SourceConfig, VLDataConfig
from dora_mm.data.tables import ExampleTable, open_table
from dora_mm.data.vl import Example
from dora_mm.eval.vl import Rows, VLScores, score
from dora_mm.sampling.answers import Answerer, predict
from dora_mm.tasks.eyes import Eyes
from dora_mm.tasks.vl_bart import VLBartTask
from dora_mm.train.metrics import MetricsLog, read_metrics
from dora_mm.train.run import RunDirectory

OVERALL = "overall"


@dataclass(frozen=True)
class ValidationSet:
    """candidates: the answers that `decode.answers` trie and rank choose from."""

    table: ExampleTable
    images: str | None
    candidates: tuple[str, ...] = ()


def open_source(source: SourceConfig, data: VLDataConfig, eyes: Eyes) -> ExampleTable:
    """The rows of a split, with all that they need to be seen."""
    return eyes.check(open_table(source, Path(data.tables), on_bad_data=data.on_bad_data))


def open_texts(source: SourceConfig, data: VLDataConfig) -> ExampleTable:
    """The rows of a split whose pictures nobody looks at."""
    unseen = source.model_copy(update={"images": None})
    return open_table(unseen, Path(data.tables), on_bad_data=data.on_bad_data)


def open_validation(data: VLDataConfig, decode: DecodeConfig, eyes: Eyes) -> dict[str, ValidationSet]:
    """The `valid` split of every task that has one, with the answers of its `train` where candidates are wanted."""
    found = {}
    for task in data.tasks:
        if task.valid is not None:
            candidates: tuple[str, ...] = ()
            if decode.answers != "generate" and task.train is not None:
                candidates = frequent_answers(open_texts(task.train, data), decode.min_answer_count)
            found[task.task] = ValidationSet(open_source(task.valid, data, eyes), task.valid.images, candidates)
    return found


def frequent_answers(examples: Iterable[Example], min_count: int) -> tuple[str, ...]:
    """The distinct answers of these examples that occur in as many of them."""
    counts = Counter(answer for example in examples for answer in example.answers)
    return tuple(answer for answer, count in counts.items() if count >= min_count)


def answer_all(
    task: VLBartTask, sets: Mapping[str, ValidationSet], config: DecodeConfig, limit: int | None = None
) -> dict[str, Rows]:
    """Task name -> its examples with the model's answers."""
    found: dict[str, Rows] = {}
    for name, split in sets.items():
        answerer = Answerer(task.model, task.tokenizer, name, config, split.candidates)
        inputs_of = partial(task.inputs, name, images=split.images)
        found[name] = predict(answerer, split.table, inputs_of, limit)
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
        before = read_metrics(self.log.path)
        self.log.write(step, **values)
        for name, value in values.items():
            if all(value > row.get(name, float("-inf")) for row in before):
                self.save(self.run.path / "best" / name)
        return scores

    def close(self) -> None:
        self.log.close()


def main_values(scores: Mapping[str, VLScores]) -> dict[str, float]:
    """The main metric of each task that has one, and their mean as `overall`."""
    values = {name: found.value for name, found in scores.items() if found.value is not None}
    return {**values, OVERALL: sum(values.values()) / len(values)} if values else {}
