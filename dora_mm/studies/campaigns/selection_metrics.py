"""Selection metrics of a learning rate search: likeness to the training images, answers, held-out losses."""

import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from dora_mm import backend as backends
from dora_mm.config.generation import EvalStyleConfig, ImageSamplingConfig
from dora_mm.data.images.pixels import load_rgb
from dora_mm.eval.images.own_style import LIKENESS, scores_of
from dora_mm.eval.statistics import ConfidenceInterval, mean_ci
from dora_mm.models.images.families import load_image_model
from dora_mm.models.images.new_tokens import load_adapter
from dora_mm.sampling.before_after import sample_merged
from dora_mm.sampling.contact_sheets import save_atomically, thumbnail
from dora_mm.sampling.grids import image_grid
from dora_mm.sampling.own_style import images_of_training, prompts_in_style, vectors_by
from dora_mm.studies.campaigns.evaluation import Scoring
from dora_mm.studies.campaigns.kept import SCORES, keep_circumstances
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.campaigns.tuned import TunedImages, TunedTrainings, TunedVL
from dora_mm.train.validation import LOSS
from dora_mm.utils.atomic import write_text
from dora_mm.utils.devices import default_device

MOST_COLUMNS = 6  # of a contact sheet
BARE = "bare model"
KEPT = 0.75  # of the gain in likeness, see `StyleSimilarityMetric`
SAMPLING_KEYS = (
    "steps",
    "guidance",
    "negative_prompt",
    "batch_size",
)  # of contact sheets, with which images are generated to be judged


class SelectionMetric(Scoring[Any], Protocol):
    """Scores the trainings of a search.

    Attributes:
        groups: What the intervals are over; empty: there are none.
    """

    groups: str

    @property
    def trained(self) -> TunedTrainings:
        """The trainings."""
        ...

    def slack(self, folder: Path, highest: float) -> float:
        """The margin below the highest score within which candidates count as equal; the lowest rate of these is taken.

        Args:
            folder: The campaign's folder.
            highest: The highest score of a length.
        """
        ...

    def has_learned(self, folder: Path, highest: float) -> bool:
        """Whether a candidate with this score, the highest of a length, has learned something."""
        ...

    def gain(self, trainings: Trainings, training: Training) -> ConfidenceInterval | None:
        """How much higher a training's score is than that of the bare model; None: that has none."""
        ...

    def remark(self, folder: Path) -> str:
        """A sentence on its scores."""
        ...

    def contact_sheet(self, folder: Path, trained: Sequence[Training]) -> Image.Image | None:
        """A contact sheet of images by some trainings; None if the metric generates none."""
        ...


class StyleSimilarityMetric:
    """The likeness to the training images that `dora-mm eval` measures, of the same prompts and seeds.

    It sees the style, and not whether an image still shows what its prompt asks for, so that it is highest at rates
    that are too high. Of the embedded model's trainings on bricks (rank 4, 60 steps, 10 prompts; bare 0.770) that
    is 0.018 (0.865), where the embedded classifier, which knows things, has 0.41; that has its best, 0.59, at 0.01
    (0.850), and 0.41 again at 0.0056 (0.824). So the lowest rate is taken that keeps most of the gain over the bare
    model: any share from 57 to 84 % chooses the classifier's best there, and in half the steps, from 26 to 88 %.

    Args:
        trained: The trainings.
        clip_model: The encoder; None: the embedded one.

    Raises:
        ValueError: The images or the encoder cannot be used.
    """

    score_title, groups = "likeness to the training images", "prompts"

    def __init__(self, trained: TunedImages, clip_model: str | None):
        self.trained, base = trained, trained.base
        self.inputs, self.overrides, self.day = trained.inputs, trained.overrides, trained.day
        self.images = images_of_training(base.data)
        self.prompts = prompts_in_style(base, self.images)
        self.seeds: tuple[int, ...] = EvalStyleConfig.model_fields["seeds"].default
        self.sampling = ImageSamplingConfig(**base.sample.model_dump(include=set(SAMPLING_KEYS)))
        self.vectors = vectors_by(default_device(), clip_model)

    @cached_property
    def training_MD(self) -> np.ndarray:
        """The vectors of the training images."""
        return self.vectors.of_images([load_rgb(image.path, "white") for image in self.images])

    def value(self, trainings: Trainings, training: Training) -> float:
        """The mean over prompts."""
        return float(np.mean(json.loads(self.scored(trainings, training))))

    def scored(self, trainings: Trainings, training: Training) -> str:
        """The mean likeness of each prompt's images, in the order of the prompts."""
        return self.score_of(trainings.folder, training.name, trainings.adapter(training))

    def score_of(self, folder: Path, name: str, adapter: Path | None) -> str:
        """Generates into pictures/ and scores, unless the folder has the scores.

        Args:
            folder: The campaign's folder.
            name: The name of the training or of the bare model, for file names.
            adapter: The adapter folder to generate with; None generates with the bare model.
        """
        file = folder / SCORES / f"{name}.json"
        if not file.is_file():
            images = self.generated(adapter, name)
            for number, image in enumerate(images):
                prompt, seed = divmod(number, len(self.seeds))
                save_atomically(self.image(folder, name, prompt, self.seeds[seed]), image)
            found = scores_of(self.vectors.of_images(images), self.training_MD, len(self.seeds)).cells[LIKENESS]
            keep_circumstances(file)
            write_text(file, json.dumps(found.reshape(-1, len(self.seeds)).mean(axis=1).round(6).tolist()) + "\n")
        return file.read_text(encoding="utf-8").strip()

    def generated(self, adapter: Path | None, name: str) -> list[Image.Image]:
        """An image of every prompt with every seed, as the contact sheets of the training would be generated."""
        model = load_image_model(self.trained.base.model).to(default_device())
        if adapter is not None:
            load_adapter(model, adapter, forward=backends.select(self.trained.base.backend))
        pairs = [(prompt, seed) for prompt in self.prompts for seed in self.seeds]
        return sample_merged(model, [prompt for prompt, _ in pairs], [seed for _, seed in pairs], self.sampling, name)

    @staticmethod
    def image(folder: Path, name: str, prompt: int, seed: int) -> Path:
        """The file of the image of a prompt, by its number."""
        return folder / "pictures" / name / f"{prompt + 1:04d}-seed{seed}.png"

    def bare(self, folder: Path) -> ConfidenceInterval:
        """The likeness of the bare model's images."""
        return mean_ci(np.array(json.loads(self.score_of(folder, BARE, None)))[:, None], over_runs=False)

    def gain(self, trainings: Trainings, training: Training) -> ConfidenceInterval:
        """The mean over prompts of the difference."""
        bare, ours = self.score_of(trainings.folder, BARE, None), self.scored(trainings, training)
        return mean_ci(np.array(json.loads(ours))[:, None] - np.array(json.loads(bare))[:, None])

    def slack(self, folder: Path, highest: float) -> float:
        """A quarter of the gain over the bare model."""
        return max(0.0, (highest - self.bare(folder).mean) * (1 - KEPT))

    def has_learned(self, folder: Path, highest: float) -> bool:
        """Whether it lies above the interval of the bare model."""
        return highest > self.bare(folder).high

    def remark(self, folder: Path) -> str:
        """A remark with the bare model's score, and the rule by which a rate is chosen."""
        bare = self.bare(folder).text("{:.3f}")
        return (
            f"The bare model has a likeness of {bare}. The lowest rank and rate win that gain at least "
            f"{100 * KEPT:.0f} % of what the best one gains over it. "
            "Higher rates can lose the things that prompts ask for, which likeness "
            "does not measure: look at sheet.png. For a subject or an edit, choose by the held-out loss instead: "
            "--selection-metric held_out."
        )

    def contact_sheet(self, folder: Path, trained: Sequence[Training]) -> Image.Image | None:
        """A row per training, a column per prompt, with the first seed; of trainings with rows alone there are none."""
        columns = range(min(MOST_COLUMNS, len(self.prompts)))
        names = {BARE: BARE} | {each.name: f"{each.variant}, rate {each.rate:g}" for each in trained}
        files = {name: [self.image(folder, name, prompt, self.seeds[0]) for prompt in columns] for name in names}
        rows = {name: own for name, own in files.items() if all(file.is_file() for file in own)}
        images = [[thumbnail(file) for file in own] for own in rows.values()]
        labels = [names[name] for name in rows]
        return image_grid(images, labels, [self.prompts[prompt] for prompt in columns]) if rows else None

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """One value per prompt and training, (K, S)."""
        return np.array([json.loads(text) for text in texts]).T

    def cells(self, scores: np.ndarray) -> np.ndarray:
        """The same."""
        return scores


class HighestScore:
    """Base class of metrics whose highest score is the best, and that generate no images."""

    def slack(self, folder: Path, highest: float) -> float:
        """Only the highest score counts."""
        return 0.0

    def has_learned(self, folder: Path, highest: float) -> bool:
        """Always true."""
        return True

    def gain(self, trainings: Trainings, training: Training) -> ConfidenceInterval | None:
        """None: the bare model has no score."""
        return None

    def remark(self, folder: Path) -> str:
        """An empty remark."""
        return ""

    def contact_sheet(self, folder: Path, trained: Sequence[Training]) -> None:
        """Nothing is generated."""


class AnswerScoreMetric(HighestScore):
    """The mean score of the answers to the valid splits, as a training scores them.

    Args:
        trained: The trainings.

    Raises:
        ValueError: The answers cannot be scored.
    """

    score_title, groups = "mean score of the tasks", "images"

    def __init__(self, trained: TunedVL):
        from dora_mm.studies.campaigns.answers import AnsweredSplits  # it needs the extra vl

        self.trained, base = trained, trained.base
        self.inputs, self.overrides, self.day = trained.inputs, trained.overrides, trained.day
        self.splits = AnsweredSplits(base, trained.model, base.data, base.evaluate, base.evaluate.limit)
        self.scores = self.splits.scores

    def value(self, trainings: Trainings, training: Training) -> float:
        """The mean over tasks of the mean over answers."""
        return float(self.cells(self.scores([self.scored(trainings, training)])).mean())

    def scored(self, trainings: Trainings, training: Training) -> str:
        """One number per answer, by task."""
        text = self.splits.scored(trainings, training)
        if not json.loads(text):
            raise ValueError(f"{training.name}: no task's answers can be scored: --selection-metric held_out")
        return text

    def gain(self, trainings: Trainings, training: Training) -> ConfidenceInterval:
        """The mean over groups of answers of the difference; the bare model answers once."""
        bare = self.cells(self.scores([self.splits.bare(trainings.folder, training.seed)]))
        return mean_ci(self.cells(self.scores([self.scored(trainings, training)])) - bare)

    def cells(self, scores: Any) -> np.ndarray:
        """One value per group of answers and training, (G, S)."""
        from dora_mm.eval.vl.confidence_intervals import group_cells

        return group_cells(list(scores.values()))


class HeldOutLossMetric(HighestScore):
    """The held-out loss, which trainings measure at their end.

    Args:
        trained: The trainings.
    """

    score_title, groups = "held-out loss with a minus, so that higher is better", ""

    def __init__(self, trained: TunedTrainings):
        self.trained = trained
        self.inputs, self.overrides, self.day = trained.inputs, trained.overrides, trained.day

    def value(self, trainings: Trainings, training: Training) -> float:
        """Higher is better."""
        return -self.trained.held_out_loss(trainings.summary(training))

    def gain(self, trainings: Trainings, training: Training) -> ConfidenceInterval | None:
        """What a training of images has measured, without an interval; those of answers measure no base model."""
        difference = trainings.summary(training).get(f"held_out_{LOSS}_minus_base")
        return None if difference is None else ConfidenceInterval(-difference)

    def scored(self, trainings: Trainings, training: Training) -> str:
        """The same, as JSON."""
        return json.dumps(self.value(trainings, training))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """One value per training, (1, S): it has no interval."""
        return np.array([[json.loads(text) for text in texts]])

    def cells(self, scores: np.ndarray) -> np.ndarray:
        """The same."""
        return scores
