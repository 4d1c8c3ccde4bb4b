"""Splits that the trainings of a campaign answer, and the scores of their answers."""

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dora_mm.adapting.files import load_trained
from dora_mm.config.vl import DecodeConfig, TrainVLConfig
from dora_mm.config.vl_data import VLDataConfig
from dora_mm.data.vl.answers import predictions_of
from dora_mm.data.vl.example import Example, Predictions
from dora_mm.data.vl.splits import open_validation
from dora_mm.eval.vl.confidence_intervals import AnswerScores, answer_scores, groups_of
from dora_mm.models.vl.vl_model import VLModel
from dora_mm.sampling.answers import answer_all
from dora_mm.studies.campaigns.kept import ANSWERS, keep_circumstances
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.tasks.vl import answerers
from dora_mm.utils.atomic import write_text

log = logging.getLogger(__name__)
BARE = "bare model"  # in names of files
TaskScores = Mapping[str, AnswerScores]  # by task


class AnsweredSplits:
    """The `valid` splits of some data. Answers are kept in the campaign's folder answers/, and read from there.

    Args:
        base: The config of the trainings.
        model: The bare model, which keeps the visual tokens that all trainings share.
        data: The data.
        decode: How the splits are answered.
        limit: Answers only this many rows of each split; None: all.

    Raises:
        ValueError: The data cannot be used, or the model cannot do a task.
    """

    def __init__(
        self,
        base: TrainVLConfig,
        model: VLModel,
        data: VLDataConfig,
        decode: DecodeConfig,
        limit: int | None = None,
    ):
        self.base, self.model, self.decode, self.limit = base, model, decode, limit
        self.sets = open_validation(data, decode, model, answered=True)
        answerers(model, self.sets, decode)  # reports mistakes before the folder exists
        self.examples: dict[str, list[Example]] = {
            name: [found.table[row] for row in range(min(len(found.table), limit or len(found.table)))]
            for name, found in self.sets.items()
        }

    def scored(self, trainings: Trainings, training: Training) -> str:
        """The scores of a finished training as JSON on one line: one number per answer, by task."""
        adapter = trainings.adapter(training)
        return self._as_json(self.answered(trainings.folder, training.name, training.seed, adapter))

    def bare(self, folder: Path, seed: int) -> str:
        """As `scored`, of the bare model that a training with this seed adapts."""
        return self._as_json(self.answered(folder, BARE, seed))

    @staticmethod
    def _as_json(answered: Mapping[str, Predictions]) -> str:
        found = scored_answers([answered])
        return json.dumps({task: np.round(each.values_QS[:, 0], 4).tolist() for task, each in found.items()})

    def scores(self, texts: Sequence[str]) -> dict[str, AnswerScores]:
        """The scores, as `scored` returned them, of trainings that differ in nothing but the seed, by task."""
        found = [json.loads(text) for text in texts]
        return {
            task: AnswerScores(np.array([values[task] for values in found]).T, groups_of(task, self.examples[task]))
            for task in found[0]
        }

    def answered(self, folder: Path, name: str, seed: int, adapter: Path | None = None) -> dict[str, Predictions]:
        """The answers to the splits by task, which are computed unless the folder has them.

        Args:
            folder: The campaign's folder.
            name: The name of the training or of the bare model, for file names.
            seed: The seed of the training.
            adapter: The adapter folder to answer with; None answers with the bare model.
        """
        path = folder / ANSWERS / f"{name}.json"
        if not path.is_file():
            log.info("Answers of %s:", name)
            found = self.answer(adapter, seed)
            texts = {task: [prediction for _, prediction in rows] for task, rows in found.items()}
            keep_circumstances(path)
            write_text(path, json.dumps(texts) + "\n")
        texts = json.loads(path.read_text(encoding="utf-8"))
        return {task: list(zip(rows, texts[task], strict=True)) for task, rows in self.examples.items()}

    def answer(self, adapter: Path | None, seed: int) -> dict[str, Predictions]:
        """Answers the splits with an adapter, or with the bare model that a training with this seed adapts."""
        model = self.model.fresh(seed)
        if adapter is not None:
            load_trained(model, adapter, backend=self.base.backend)
        answers = answerers(model, self.sets, self.decode)
        found = answer_all(answers, model.networks.values(), self.sets, self.decode.batch_size, self.limit)
        return {task: predictions_of(rows) for task, rows in found.items()}


def scored_answers(answered: Sequence[Mapping[str, Predictions]]) -> dict[str, AnswerScores]:
    """The scores of one method's trainings by task; captions are left out where they cannot be scored."""
    found = {task: answer_scores(task, [rows[task] for rows in answered]) for task in answered[0]}
    return {task: scores for task, scores in found.items() if scores}
