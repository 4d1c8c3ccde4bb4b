"""What judges the trainings of a search for a learning rate: likeness to one's pictures, answers, held-out losses."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dora_mm import backend as backends
from dora_mm.config.pictures import DrawConfig, EvalStyleConfig
from dora_mm.data.images.pixels import load_rgb
from dora_mm.eval.images.own_style import LIKENESS, likeness
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.new_tokens import load_adapter
from dora_mm.sampling.before_after import sample_merged
from dora_mm.sampling.grids import sheet
from dora_mm.sampling.own_style import images_of_training, prompts_in_style, vectors_by
from dora_mm.sampling.sheets import save_atomically, thumbnail
from dora_mm.studies.campaigns.evaluation import Scoring
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.campaigns.tuned import TunedPictures, TunedQuestions, TunedTrainings
from dora_mm.utils.atomic import write_text
from dora_mm.utils.devices import default_device

MOST_COLUMNS = 6  # of a sheet
DRAWN = ("steps", "guidance", "negative_prompt", "batch_size")  # of sheets, with which pictures are drawn to be judged


class Judge(Scoring[Any], Protocol):
    """Scores the trainings of a search, and says whether it leans to high rates.

    Attributes:
        leans_high: Whether rates that are too high can have a higher score than better ones. Then the lowest rate
            is chosen of those that are as good as the highest score by half the width of its interval.
        groups: What the intervals are over; empty: there are none.
    """

    leans_high: bool
    groups: str

    @property
    def trained(self) -> TunedTrainings:
        """The trainings."""
        ...

    def sheet(self, folder: Path, trained: Sequence[Training]) -> Image.Image | None:
        """What some trainings draw; None where nothing is drawn."""
        ...


class LikenessJudge:
    """The likeness to the training pictures that `dora-mm eval` measures, of the same prompts and seeds.

    It sees the style, and not whether a picture still shows what its prompt asks for. Of the embedded SDXL model's
    trainings on bricks (rank 4, 60 steps, 10 prompts) it is highest at 0.018 (0.865), where the embedded judge, which
    knows things, has 0.41, and as good by its interval at 0.01 (0.850), where that is highest, 0.59.

    Args:
        trained: The trainings.
        clip_model: The encoder; None: the embedded one.

    Raises:
        ValueError: The pictures or the encoder cannot be used.
    """

    score_title, groups, leans_high = "likeness to the training pictures", "prompts", True

    def __init__(self, trained: TunedPictures, clip_model: str | None):
        self.trained, base = trained, trained.base
        self.inputs, self.overrides = trained.inputs, trained.overrides
        self.images = images_of_training(base.data)
        self.prompts = prompts_in_style(base, self.images)
        self.seeds: tuple[int, ...] = EvalStyleConfig.model_fields["seeds"].default
        self.draw = DrawConfig(**base.sample.model_dump(include=set(DRAWN)))
        self.vectors = vectors_by(clip_model, default_device())

    @cached_property
    def training_MD(self) -> np.ndarray:
        """The vectors of the training pictures."""
        return self.vectors.of_images([load_rgb(image.path, "white") for image in self.images])

    def value(self, trainings: Trainings, training: Training) -> float:
        """The mean over prompts."""
        return float(np.mean(json.loads(self.scored(trainings, training))))

    def scored(self, trainings: Trainings, training: Training) -> str:
        """The mean likeness of each prompt's pictures, which stay in pictures/, in the order of the prompts."""
        file = trainings.folder / "scores" / f"{training.name}.json"
        if not file.is_file():
            images = self.drawn(trainings.adapter(training), training.name)
            for number, image in enumerate(images):
                prompt, seed = divmod(number, len(self.seeds))
                save_atomically(self.picture(trainings.folder, training, prompt, self.seeds[seed]), image)
            found = likeness(self.vectors.of_images(images), self.training_MD)[LIKENESS]
            write_text(file, json.dumps(found.reshape(-1, len(self.seeds)).mean(axis=1).round(6).tolist()) + "\n")
        return file.read_text(encoding="utf-8").strip()

    def drawn(self, adapter: Path, name: str) -> list[Image.Image]:
        """A picture of every prompt with every seed, as the sheets of the training would be drawn."""
        model = load_image_model(self.trained.base.model).to(default_device())
        load_adapter(model, adapter, forward=backends.select(self.trained.base.backend))
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        return sample_merged(model, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], self.draw, name)

    @staticmethod
    def picture(folder: Path, training: Training, prompt: int, seed: int) -> Path:
        """The file of the picture of a prompt, by its number."""
        return folder / "pictures" / training.name / f"{prompt + 1:04d}-seed{seed}.png"

    def sheet(self, folder: Path, trained: Sequence[Training]) -> Image.Image | None:
        """A row per training, a column per prompt, with the first seed; of trainings with rows alone there are none."""
        columns = range(min(MOST_COLUMNS, len(self.prompts)))
        files = {each: [self.picture(folder, each, prompt, self.seeds[0]) for prompt in columns] for each in trained}
        rows = {each: own for each, own in files.items() if all(file.is_file() for file in own)}
        labels = [f"{each.variant}, rate {each.rate:g}" for each in rows]
        pictures = [[thumbnail(file) for file in own] for own in rows.values()]
        return sheet(pictures, labels, [self.prompts[prompt] for prompt in columns]) if rows else None

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """One value per prompt and training, (K, S)."""
        return np.array([json.loads(text) for text in texts]).T

    def cells(self, scores: np.ndarray) -> np.ndarray:
        """The same."""
        return scores


class AnswerJudge:
    """The mean score of the answers to the valid splits, as a training scores them.

    Args:
        trained: The trainings.

    Raises:
        ValueError: The answers cannot be scored.
    """

    score_title, groups, leans_high = "mean score of the tasks", "images", False

    def __init__(self, trained: TunedQuestions):
        from dora_mm.studies.campaigns.answers import AnsweredSplits  # it needs the extra vl

        self.trained, base = trained, trained.base
        self.inputs, self.overrides = trained.inputs, trained.overrides
        self.splits = AnsweredSplits(base, trained.model, base.data, base.evaluate, base.evaluate.limit)
        self.scores = self.splits.scores

    def value(self, trainings: Trainings, training: Training) -> float:
        """The mean over tasks of the mean over answers."""
        return float(self.cells(self.scores([self.scored(trainings, training)])).mean())

    def scored(self, trainings: Trainings, training: Training) -> str:
        """One number per answer, by task."""
        text = self.splits.scored(trainings, training)
        if not json.loads(text):
            raise ValueError(f"{training.name}: no task's answers can be scored: --judge held_out")
        return text

    def sheet(self, folder: Path, trained: Sequence[Training]) -> None:
        """Nothing is drawn."""

    def cells(self, scores: Any) -> np.ndarray:
        """One value per group of answers and training, (G, S)."""
        from dora_mm.eval.vl.intervals import group_cells

        return group_cells(list(scores.values()))


class LossJudge:
    """The held-out loss, which trainings measure at their end.

    Args:
        trained: The trainings.
    """

    score_title, groups, leans_high = "minus the held-out loss", "", False

    def __init__(self, trained: TunedTrainings):
        self.trained = trained
        self.inputs, self.overrides = trained.inputs, trained.overrides

    def value(self, trainings: Trainings, training: Training) -> float:
        """Higher is better."""
        return -self.trained.held_out_loss(trainings.summary(training))

    def scored(self, trainings: Trainings, training: Training) -> str:
        """The same, as JSON."""
        return json.dumps(self.value(trainings, training))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """One value per training, (1, S): it has no interval."""
        return np.array([[json.loads(text) for text in texts]])

    def cells(self, scores: np.ndarray) -> np.ndarray:
        """The same."""
        return scores

    def sheet(self, folder: Path, trained: Sequence[Training]) -> None:
        """Nothing is drawn."""
