"""A campaign: methods of training, each at its best learning rate and with several seeds, in one table.

Every finished training is a run directory in the campaign's folder, and what it drew or answered is kept there, too. So
an interrupted campaign resumes where it stopped.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

from PIL import Image

from dora_mm.config.adapter import PartConfig
from dora_mm.config.comparing import CompareConfig
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.loader import load_config
from dora_mm.config.vl import TrainVLConfig
from dora_mm.eval.comparison import Result, Variant, table_rows, variants
from dora_mm.eval.statistics import Interval
from dora_mm.train.campaigns.trainings import RateChoice, Training, Trainings
from dora_mm.train.run import open_run, reopen_run
from dora_mm.utils.atomic import write_text

FREE_KEYS = ("workers", "name", "pictures.columns")  # config keys that change no result
COSTS = ("seconds_per_step", "peak_memory_mb")  # entries of summaries whose median over the seeds is reported

ScoresT = TypeVar("ScoresT")
ConfigT = TypeVar("ConfigT", TrainDiffusionConfig, TrainVLConfig)


class Report(NamedTuple):
    """The report of a campaign: the paragraphs of table.md, the text of results.csv and, of pictures, sheet.png."""

    paragraphs: Sequence[str]
    csv: str
    sheet: Image.Image | None = None


class Evaluation(Protocol[ScoresT]):
    """One kind of campaign: what its trainings have in common, and how they are scored.

    Building it checks all that the config names, before the campaign has a folder. What it draws or answers is kept in
    that folder, and read from there if the campaign is resumed.
    """

    @property
    def inputs(self) -> Mapping[str, str]:
        """Digests of the data and models that the config refers to, by a description of each."""
        ...

    def overrides(self, training: Training) -> list[str]:
        """The `key=value` overrides of the base config for one training."""
        ...

    def baselines(self, folder: Path) -> list[Result]:
        """The rows of what is not trained, such as the bare model."""
        ...

    def value(self, trainings: Trainings, training: Training) -> float:
        """Scores the learning rate of a finished training; higher is better.

        Raises:
            ValueError: The training has no score to choose by.
        """
        ...

    def scores(self, trainings: Trainings, repeated: Sequence[Training]) -> ScoresT:
        """The reported scores of finished trainings that differ in nothing but the seed."""
        ...

    def intervals(self, scores: ScoresT) -> Mapping[str, Interval]:
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


class Campaign(Generic[ScoresT]):
    """A campaign and its folder, which is new or goes on.

    Args:
        config: The config.
        evaluation: What is trained, and how it is scored.

    Raises:
        ValueError: The folder belongs to another campaign.
    """

    def __init__(self, config: CompareConfig, evaluation: Evaluation[ScoresT]):
        self.config, self.evaluation = config, evaluation
        run = reopen_run(config, evaluation.inputs, FREE_KEYS) or open_run(config, evaluation.inputs)
        self.folder = run.path
        self.trainings = Trainings(self.folder, config.base, config.workers, evaluation.overrides)

    def report(
        self,
        baselines: Sequence[Result],
        chosen: Mapping[Variant, RateChoice],
        trained: Mapping[Variant, list[Training]],
    ) -> None:
        """Scores the trainings, writes table.md, results.csv and sheet.png, and prints the table."""
        evaluation, results = self.evaluation, [*baselines]
        scores = {variant: evaluation.scores(self.trainings, repeated) for variant, repeated in trained.items()}
        rows = table_rows(self.config.ranks, trained)
        for name, variant in rows:
            summary = self.summary(trained[variant])
            results.append(Result(name, evaluation.intervals(scores[variant]), str(chosen[variant]), summary))
        report = evaluation.report(self.folder, results, scores, {name: trained[variant] for name, variant in rows})
        text = "\n\n".join(report.paragraphs)
        write_text(self.folder / "table.md", text + "\n")
        write_text(self.folder / "results.csv", report.csv)
        print(f"{text}\n\ntable    {self.folder / 'table.md'}")
        if report.sheet:
            report.sheet.save(self.folder / "sheet.png")
            print(f"sheet    {self.folder / 'sheet.png'}")

    def summary(self, repeated: Sequence[Training]) -> dict[str, Any]:
        """The summary of trainings that differ in nothing but the seed: the first one's, with the median of COSTS."""
        found = [self.trainings.summary(training) for training in repeated]
        return found[0] | {key: median(each[key] for each in found) for key in COSTS if key in found[0]}


def compared(config: CompareConfig) -> list[Variant]:
    """What is trained: full fine-tuning only where it has learning rates."""
    return variants(config.ranks, full=config.learning_rates.full is not None, half=config.half_ranks)


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
    ]


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
