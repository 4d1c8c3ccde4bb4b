"""Scoring and evaluation interfaces for each kind of training, and helpers shared by all comparisons."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np
from PIL import Image

from dora_mm.config.adapter import PartConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import load_config
from dora_mm.config.vl import TrainVLConfig
from dora_mm.eval.statistics import ConfidenceInterval
from dora_mm.studies.campaigns.trainings import Training, Trainings
from dora_mm.studies.config import CompareConfig
from dora_mm.studies.tables import Result
from dora_mm.studies.variants import Variant, variants
from dora_mm.utils.day import Day

ScoresT = TypeVar("ScoresT")
ConfigT = TypeVar("ConfigT", TrainDiffusionConfig, TrainVLConfig)


class Report(NamedTuple):
    """The report of a comparison: the paragraphs of table.md, the text of results.csv and, of images, sheet.png."""

    paragraphs: Sequence[str]
    csv: str
    contact_sheet: Image.Image | None = None


class Scoring(Protocol[ScoresT]):
    """Interface for a campaign: the settings that its trainings share, and their scoring.

    Building it checks all that the config names, before the campaign has a folder. What it generates or answers is kept
    in that folder, and read from there if the campaign is resumed.
    """

    score_title: str  # what `cells` are, for figures and tables
    day: Day  # for chat templates that use it, the same in all trainings and evaluations

    @property
    def inputs(self) -> Mapping[str, Any]:
        """Digests of the data and models that the config refers to, by a description of each."""
        ...

    def overrides(self, training: Training) -> list[str]:
        """The `key=value` overrides of the base config for one training."""
        ...

    def value(self, trainings: Trainings, training: Training) -> float:
        """Scores the learning rate of a finished training; higher is better.

        Raises:
            ValueError: The training has no score to choose by.
        """
        ...

    def scored(self, trainings: Trainings, training: Training) -> str:
        """The reported scores of a finished training as JSON on one line."""
        ...

    def scores(self, texts: Sequence[str]) -> ScoresT:
        """The scores, as `scored` returned them, of trainings that differ in nothing but the seed."""
        ...

    def cells(self, scores: ScoresT) -> np.ndarray:
        """One independent score per thing or image and training, (K, S), by which curves are generated."""
        ...


class Evaluation(Scoring[ScoresT], Protocol[ScoresT]):
    """One kind of comparison: also what it reports of its scores."""

    def baselines(self, folder: Path) -> list[Result]:
        """The rows of what is not trained, such as the bare model."""
        ...

    def confidence_intervals(self, scores: ScoresT) -> Mapping[str, ConfidenceInterval]:
        """The intervals of these scores, by metric."""
        ...

    def report(
        self,
        folder: Path,
        results: Sequence[Result],
        scores: Mapping[Variant, ScoresT],
        trained: Mapping[str, Sequence[Training]],
    ) -> Report:
        """Writes the report.

        Args:
            folder: The campaign's folder.
            results: The rows of the table.
            scores: The scores of each variant.
            trained: The trainings of each variant, by its name in the table.
        """
        ...


def compared(config: CompareConfig) -> list[Variant]:
    """The variants to train, with full fine-tuning only if it has learning rates."""
    unnamed = variants(config.ranks, full=config.learning_rates.full is not None, half=config.half_ranks)
    return [*unnamed, *(Variant(each.method, each.rank, each.name) for each in config.variants)]


def num_trainings(trained: Mapping[str, Sequence[Training]]) -> int:
    """How many trainings each row of the table has; all have the same number."""
    return len(next(iter(trained.values())))


def load_base(config: CompareConfig, schema: type[ConfigT], pipeline: str) -> ConfigT:
    """Loads the config that all trainings share.

    Args:
        config: The config of the campaign.
        schema: What it has to be.
        pipeline: The name of its pipeline, for the message.

    Raises:
        ValueError: It is invalid, a config of another pipeline, or sets for a part what is compared.
    """
    base = load_config(config.base)
    if not isinstance(base, schema):
        raise ValueError(f"base: {config.base} is a config of {base.pipeline}, not of {pipeline}")
    for name, part in base.adapter.parts.items():
        if part.method not in ("full", "frozen") and part != PartConfig():
            raise ValueError(
                f"base: {config.base} gives adapter.parts: {name} settings of its own, which would hide the methods, "
                "ranks and rates that are compared: leave them out"
            )
    return base


def common_overrides(config: CompareConfig, training: Training, alpha: float) -> list[str]:
    """The overrides of the base config that trainings of every kind have; `alpha`: of the adapter."""
    variant = training.variant
    return [
        f"seed={training.seed}",
        f"adapter.method={variant.method}",
        f"adapter.rank={variant.rank or 1}",  # full fine-tuning ignores it
        f"adapter.alpha={alpha!r}",
        f"optimizer.lr={training.rate!r}",
        "optimizer.magnitude_lr=null",
        "optimizer.b_lr_ratio=1.0",
        f"train.steps={config.steps}",
        "train.checkpoint_every=0",
        "evaluate.every=0",
        "evaluate.patience=null",
        *overrides_of_setting(config, training),
    ]


def overrides_of_setting(config: CompareConfig, training: Training) -> list[str]:
    """The overrides of the settings by which a variant differs from the plain method."""
    for variant in config.variants:
        if variant.name == training.variant.setting:
            ratio = variant.magnitude_lr_ratio
            rate = [] if ratio is None else [f"optimizer.magnitude_lr={training.rate * ratio!r}"]
            return [*variant.overrides, *rate]
    return []


def check_trainings(config: CompareConfig, overrides: Callable[[Training], list[str]]) -> None:
    """Checks the configs of all trainings.

    Args:
        config: The config of the campaign.
        overrides: Returns the overrides of its base for one training.

    Raises:
        ValueError: The config of a training is invalid.
    """
    for variant in compared(config):
        load_config(config.base, overrides(Training(variant, 1e-3, 0)))
