"""dora-mm tune: finds a learning rate, and a rank on request, for a diffusion or vision-language training.

Candidates are trained by successive halving, each length a whole schedule, and scored as `eval` scores a custom style,
or by the score of the answers to the valid splits. The same command goes on after a stop, with other rates, too.
"""

from collections.abc import Sequence
from typing import Any

from pydantic import ValidationError

from dora_mm.config import load_config
from dora_mm.config.images import TrainDiffusionConfig
from dora_mm.config.paths import check_paths
from dora_mm.config.report import describe
from dora_mm.config.vl import TrainVLConfig
from dora_mm.registries.optimizers import OPTIMIZERS
from dora_mm.studies.campaigns.selection_metrics import (
    AnswerScoreMetric,
    HeldOutLossMetric,
    SelectionMetric,
    StyleSimilarityMetric,
)
from dora_mm.studies.campaigns.tuned import RANKED, TunedImages, TunedVL
from dora_mm.studies.campaigns.tuning import Tuning, describe_plan
from dora_mm.studies.config import TuneConfig
from dora_mm.train.optim import check_optimizer
from dora_mm.utils.devices import default_device
from dora_mm.utils.lock import only_writer

EXPONENTS = (-1.0, -0.5, 0.0, 0.5, 1.0)  # of ten, around the rate of the config: half decades
EXTRA_RATES = 2


def main(
    config: str,
    *,
    overrides: Sequence[str] = (),
    rates: Sequence[float] | None = None,
    ranks: Sequence[int] | None = None,
    selection_metric: str = "score",
    clip_model: str | None = None,
    output: str | None = None,
    dry_run: bool = False,
) -> None:
    """Runs what is missing of the search, and prints its table, what was chosen, and the next command.

    Writes to the folder: table.md, curves.csv with figures, tuned.yaml, of images sheet.png; the rows of all
    trainings in trainings.csv, the trainings in runs/, their output in logs/, and what was generated or answered.

    Args:
        config: The config of the training, or that of an earlier search.
        overrides: Of the training's config, as `--set` takes them.
        rates: The learning rates; None: half decades around that of the config, and more where the ends are as good.
        ranks: The ranks; None: that of the config.
        selection_metric: score or held_out.
        clip_model: An open_clip model that looks at images; None: the embedded encoder.
        output: The folder; None: runs/NAME_tune, of the held-out loss runs/NAME_tune_held_out.
        dry_run: Only prints what would be trained.

    Raises:
        ValueError: A file or setting of the config cannot be used or scored, or the folder belongs to another search.
            The folder is created only after these checks. Or a training reported a user's mistake, all have diverged,
            or another process writes to the folder.
        RuntimeError: A training failed in any other way.
    """
    given = load_config(config, overrides)
    if isinstance(given, TuneConfig):
        if any((rates, ranks, clip_model, output, selection_metric != "score")):
            raise ValueError(f"{config} is a search with its own settings: --set changes them")
        settings, base = given, load_config(given.base, given.overrides)
    else:
        settings, base = search_of(given, config, overrides, rates, ranks, selection_metric, clip_model, output), given
    check_paths(settings, new_run=True)
    check_paths(base, new_run=False)
    selection = build_selection_metric(settings, base)
    if dry_run:
        print(describe_plan(settings, selection.trained))
        return
    tuning = Tuning(settings, selection)
    with only_writer(tuning.folder):
        tuning.report(tuning.search())


def search_of(
    base: Any,
    path: str,
    overrides: Sequence[str],
    rates: Sequence[float] | None,
    ranks: Sequence[int] | None,
    selection_metric: str,
    clip_model: str | None,
    output: str | None,
) -> TuneConfig:
    """The config of a search; see `main` for the arguments."""
    if not isinstance(base, TrainDiffusionConfig | TrainVLConfig):
        raise ValueError(f"{path} is a config of {base.pipeline}, and tune takes one of dora-mm train")
    if ranks and base.adapter.method not in RANKED:
        raise ValueError(f"--ranks: adapter.method {base.adapter.method} has no rank")
    values = {
        "pipeline": "tune",
        "name": f"{base.name}_tune",
        "output": output or f"runs/{base.name}_tune{'_held_out' * (selection_metric == 'held_out')}",
        "base": path,
        "overrides": list(overrides),
        "rates": list(rates or default_rates(base, path, ranks)),
        "ranks": list(ranks or ()),
        "extra_rates": 0 if rates or base.optimizer.name == "prodigy" else EXTRA_RATES,
        "selection_metric": selection_metric,
        "clip_model": clip_model,
    }
    try:
        return TuneConfig.model_validate(values)
    except ValidationError as error:
        raise ValueError("; ".join(map(str, describe(error, TuneConfig, {})))) from None


def default_rates(base: TrainDiffusionConfig | TrainVLConfig, path: str, ranks: Sequence[int] | None) -> list[float]:
    """Half decades around the rate of the config, as far as its optimizer takes them.

    Raises:
        ValueError: The optimizer finds the rate itself, and there are no ranks to choose from.
    """
    optimizer = base.optimizer
    if optimizer.name == "prodigy":
        if not ranks:
            raise ValueError(f"{path}: optimizer.name prodigy finds its rate itself: give --ranks, or --rates")
        return [optimizer.lr]
    record = OPTIMIZERS[optimizer.name]
    found = [float(f"{optimizer.lr * 10**exponent:.2g}") for exponent in EXPONENTS]
    return [rate for rate in found if record.least_lr <= rate < record.most_lr]


def build_selection_metric(config: TuneConfig, base: Any) -> SelectionMetric:
    """Builds what is trained and how it is scored, and checks all that the configs name."""
    check_optimizer(base.optimizer, default_device())
    is_image = isinstance(base, TrainDiffusionConfig)
    if config.clip_model and not is_image:
        raise ValueError("--clip-model judges images, and this training has none")
    if is_image:
        trained = TunedImages(config, base)
        return (
            HeldOutLossMetric(trained)
            if config.selection_metric == "held_out"
            else StyleSimilarityMetric(trained, config.clip_model)
        )
    vl = TunedVL(config, base)
    return HeldOutLossMetric(vl) if config.selection_metric == "held_out" else AnswerScoreMetric(vl)
