"""Campaigns of models that answer questions about images: splits of the tasks are answered, and the answers scored."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dora_mm.config.loader import dump_config
from dora_mm.config.paths import resolve_path
from dora_mm.config.vl import TrainVLConfig
from dora_mm.config.vl_data import VLDataConfig
from dora_mm.data.vl.example import stem
from dora_mm.data.vl.splits import ValidationSet, open_source, open_texts, training_texts
from dora_mm.eval.statistics import ConfidenceInterval
from dora_mm.eval.vl.confidence_intervals import (
    AnswerScores,
    answer_scores,
    confidence_intervals,
    gain_over_question_only,
    group_cells,
    group_of,
)
from dora_mm.eval.vl.metrics import scorer_of
from dora_mm.eval.vl.question_only import question_only_answers
from dora_mm.models.vl.families import load_vl_model, structure_of
from dora_mm.registries.vl_tasks import TASKS
from dora_mm.studies.campaigns.answers import AnsweredSplits, TaskScores, scored_answers
from dora_mm.studies.campaigns.evaluation import Report, check_trainings, common_overrides, load_base, num_trainings
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.config import CompareConfig, CompareVLConfig
from dora_mm.studies.tables import (
    Result,
    caption_notes,
    describe_sizes,
    vl_contrasts_table,
    vl_results_csv,
    vl_results_table,
)
from dora_mm.studies.variants import Variant
from dora_mm.train.day import dated, day_for
from dora_mm.train.validation import overall
from dora_mm.utils.devices import default_device

BARE, QUESTION_ONLY = "untrained base", "questions alone"


class VLEvaluation:
    """The `Evaluation` of answers. A learning rate is chosen on the valid splits of the base config.

    Args:
        config: The config of the campaign.
        settings: Its section `questions`.

    Raises:
        ValueError: The base config, the model, the vision tower or the data cannot be used, or reported images are used
            for training or tuning.
    """

    score_title = "mean score of the tasks"

    def __init__(self, config: CompareConfig, settings: CompareVLConfig):
        self.config, self.settings = config, settings
        self.base = load_base(config, TrainVLConfig, "train_vl")
        check_base(config, self.base, settings)
        check_trainings(config, self.overrides)
        self.data = reported_data(settings, self.base)
        day = day_for(self.base.model, config.output)
        model, vision = dated(self.base, day).model, self.base.vision
        vision = vision.model_copy(update={"features": settings.features}) if settings.features else vision
        tower, device = bool(self.base.adapter.vision_parts), default_device()
        # The model as the first training starts from; it keeps the visual tokens, which all trainings share.
        self.model = load_vl_model(model, vision, seed=config.seeds[0], trained_tower=tower, device=device)
        self.day = self.model.day
        self.day.source = day.source
        self.splits = AnsweredSplits(self.base, self.model, self.data, settings.decode)
        self.scored, self.scores = self.splits.scored, self.splits.scores
        check_reported(config, self.base, settings, self.splits.sets)

    @property
    def inputs(self) -> Mapping[str, Any]:
        """The content of what the config names: the base config, the model, the vision tower and all examples."""
        rows = {
            f"the {split} of {task.task}": open_texts(source, self.base.data).content_identity
            for task in self.base.data.all_tasks
            for split, source in task.sources.items()
        }
        sets = self.splits.sets.items()
        reported = {f"the reported split of {name}": found.table.content_identity for name, found in sets}
        return {"base": dump_config(self.base), **self.model.identity.inputs, **rows, **reported}

    def overrides(self, training: Training) -> list[str]:
        """The overrides of one training; every update has the scaling of the base's."""
        return [
            *common_overrides(self.config, training, alpha=self.base.adapter.alpha_at(training.variant.rank or 1)),
            "evaluate.base=false",
            "train.epochs=null",
            *(self.overrides_of_full if training.variant.method == "full" else ()),
        ]

    @cached_property
    def overrides_of_full(self) -> tuple[str, ...]:
        """The overrides by which full fine-tuning trains other parts than adapters do: all but the vision tower."""
        model, adapter = self.base.model, self.base.adapter
        names = structure_of(model, self.base.vision).target_maps["model"].parts
        parts = [part for part in names if not part.startswith("vision.")]
        extra = adapter.extra_trainable if model.full_extra is None else model.full_extra
        return (
            f"adapter.parts=[{', '.join(parts)}]",
            f"adapter.extra_trainable=[{', '.join(extra)}]",
            "adapter.dropout=0.0",  # it acts on the input of A
        )

    def baselines(self, folder: Path) -> list[Result]:
        """The rows of the bare model and of answers that are guessed without the image."""
        bare = self.splits.answered(folder, "bare", self.config.seeds[0])
        results = [Result(BARE, confidence_intervals(scored_answers([bare])))]
        if guessed := self.question_only:
            found = {task: ci for task, ci in confidence_intervals(guessed).items() if task in guessed}
            results.append(Result(QUESTION_ONLY, found))
        return results

    def value(self, trainings: Trainings, training: Training) -> float:
        """The geometric mean of the tasks' main metrics on the validation splits."""
        summary = trainings.summary(training)
        values = {task.task: summary[task.task] for task in self.base.data.all_tasks if task.task in summary}
        if not values:
            raise ValueError(f"{training.name}: no task can be scored on its valid split, so no rate can be chosen")
        return overall(values)

    def confidence_intervals(self, scores: TaskScores) -> dict[str, ConfidenceInterval]:
        """The intervals over images and trainings, by task."""
        return confidence_intervals(scores)

    def cells(self, scores: TaskScores) -> np.ndarray:
        """One value per group of answers and training, (G, S), whose mean is the mean score of the tasks."""
        return group_cells(list(scores.values()))

    @cached_property
    def question_only(self) -> dict[str, AnswerScores]:
        """The scores, by task, of answers guessed from the question without the image; not for captions."""
        found = {}
        for task in self.base.data.all_tasks:
            if TASKS[task.task].kind != "captions":
                rows = self.splits.examples[task.task]
                answers = question_only_answers(training_texts(task, self.base.data), rows)
                found[task.task] = [list(zip(rows, answers, strict=True))]
        return {name: scores for name, rows in found.items() if (scores := answer_scores(name, rows))}

    def report(
        self,
        folder: Path,
        results: Sequence[Result],
        scores: Mapping[Variant, TaskScores],
        trained: Mapping[str, Sequence[Training]],
    ) -> Report:
        """The table, notes on it, what images add to the questions, and the paired differences."""
        dora = [Variant("dora", rank) for rank in sorted(self.config.ranks)] if self.question_only else []
        dora = [variant for variant in dora if variant in scores]
        paragraphs = [
            vl_results_table(results),
            *self.notes(next(iter(scores.values())), num_trainings(trained)),
            *(gain_over_question_only(str(variant), scores[variant], self.question_only) for variant in dora),
            vl_contrasts_table(self.config.ranks, scores),
        ]
        return Report(paragraphs, vl_results_csv(results))

    def notes(self, scores: TaskScores, trainings: int) -> list[str]:
        """Notes on the table: what was trained and reported, and what the intervals mean."""
        config = self.config
        groups = ["all questions about one of these count together"]
        groups += [found for task in scores if (found := scorer_of(task).grouping)]
        return [
            f"{trainings} trainings of {config.steps} steps each, {config.workers} at a time. "
            f"Reported: {describe_sizes(scores)}.",
            f"In brackets: 95 % intervals over trainings and over images or videos; {', and '.join(groups)}.",
            "Full fine-tuning trains the language model itself. Learning rates: each method's best on the "
            "validation splits, by the geometric mean of the metrics; *: the lowest or highest tried. Memory: the "
            "peak of a training, in 2^20 bytes.",
            *caption_notes(scores, self.splits.sets),
        ]


def check_base(config: CompareConfig, base: TrainVLConfig, settings: CompareVLConfig) -> None:
    """Checks that the base config fits the comparison.

    Raises:
        ValueError: It does not.
    """
    if base.adapter.init_from is not None:
        raise ValueError(f"base: {config.base} has adapter.init_from, which other methods cannot load: leave it out")
    if missing := [task.task for task in base.data.all_tasks if task.valid is None]:
        raise ValueError(f"base: {config.base} has no valid for {', '.join(missing)}, which choosing a rate needs")
    if paired := [task.task for task in base.data.all_tasks if TASKS[task.task].pairs]:
        raise ValueError(f"base: {config.base} trains {paired[0]}, whose pairs are not compared: train and eval each")
    trained, reported = ({task.task for task in data.all_tasks} for data in (base.data, settings.report))
    if trained != reported:
        key = "vl.report.tasks" if settings.report.tasks else "vl.report.task"
        raise ValueError(f"{key}: must be the tasks of {config.base}: {', '.join(sorted(trained))}")
    if settings.features and base.adapter.vision_parts:
        raise ValueError(
            f"vl.features: {config.base} adapts the vision tower, which then has to encode the images: leave "
            "features out"
        )


def reported_data(settings: CompareVLConfig, base: TrainVLConfig) -> VLDataConfig:
    """The reported data with each task's train split, from which `decode.answers` and guesses take their answers."""
    train = {task.task: task.train for task in base.data.all_tasks}
    tasks = tuple(task.model_copy(update={"train": train[task.task]}) for task in settings.report.all_tasks)
    return settings.report.with_tasks(tasks)


def check_reported(
    config: CompareConfig, base: TrainVLConfig, settings: CompareVLConfig, sets: Mapping[str, ValidationSet]
) -> None:
    """Checks that the reported splits can be scored fairly.

    Args:
        config: The config of the campaign.
        base: The base config.
        settings: The section `questions`.
        sets: The reported splits by task.

    Raises:
        ValueError: A reported split has a single image, so that it has no interval; or it has images that are used for
            training or tuning, for any task.
    """
    for name, found in sets.items():
        if len({group_of(name, example) for example in found.table}) < 2:
            key = settings.report.key_of(name, "vl.report")
            raise ValueError(f"{key} has only one image, and intervals need two or more")
    for task in base.data.all_tasks:
        for split, source in task.sources.items():
            table = open_source(source, base.data)
            used = ValidationSet(table, source.images)
            for name, found in sets.items():
                if shared := sorted(shared_images(found, used)):
                    raise ValueError(
                        f"vl.report: {len(shared)} images of {name} are also in the {split} of {task.task} in "
                        f"{config.base} (such as {shared[0]}): report on others, for example with skip and limit"
                    )


def shared_images(one: ValidationSet, other: ValidationSet) -> set[str]:
    """The images that two splits share: by path if both have a folder of images, else by the stem of the file name."""
    if one.images is None or other.images is None:
        return {stem(name) for name in one.table.images()} & {stem(name) for name in other.table.images()}
    paths = [
        {str(resolve_path(split.images or "", "images").resolve() / name) for name in split.table.images()}
        for split in (one, other)
    ]
    return paths[0] & paths[1]
