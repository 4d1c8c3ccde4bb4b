"""Compares the bare model, full fine-tuning, LoRA and DoRA (also at half the rank), on images or on questions.

Every method at every rank gets its own learning rate: all candidates are trained once and scored on data for tuning;
the best one is trained once per seed and scored on data that neither training nor tuning used. The training that won
the tuning counts as the first of these, which may favour lucky ones; with `rate_seeds` the mean over several trainings
of each candidate decides. Every finished training is a row of a CSV file, and what it drew or answered are files in
`output`, so an interrupted comparison resumes when it is started again.
"""

from pathlib import Path

from dora_mm.config.paths import check_paths
from dora_mm.studies.campaigns.comparison import MethodComparison, describe_plan
from dora_mm.studies.campaigns.evaluation import Evaluation
from dora_mm.studies.campaigns.images import ImageEvaluation
from dora_mm.studies.campaigns.vl import VLEvaluation
from dora_mm.studies.config import CompareConfig
from dora_mm.utils.lock import only_writer


def main(config: CompareConfig, *, resume: Path | None = None, report: bool = False, dry_run: bool = False) -> None:
    """Runs what is missing of the comparison, and prints the table.

    Writes to the folder `output`: table.md, results.csv and (images) sheet.png, with `curves` curves.csv and figures,
    the rows of all trainings in trainings.csv, or in `rows`; the trainings in runs/, their output in logs/,
    and what was generated or answered in pictures/ and scores/ or in answers/.

    Args:
        config: The config.
        resume: Unused: the same command resumes an interrupted comparison.
        report: Trains nothing: reports the rows that are there.
        dry_run: Only prints what would be trained.

    Raises:
        ValueError: What the config names cannot be used, does not fit together, or cannot be scored fairly; or `output`
            was started with a different config or inputs. The folder is created only after these checks. Or a training
            reported a user's mistake, or another process writes to the folder, or there is nothing to report.
        RuntimeError: A training failed in any other way.
    """
    evaluation = build_evaluation(config)
    if dry_run:
        check_paths(config, new_run=True)
        print(describe_plan(config))
        return
    comparison = MethodComparison(config, evaluation)
    with only_writer(comparison.folder):
        if report:
            tried = comparison.tried()
        else:
            tried = comparison.search()
            comparison.train_chosen(tried)
        comparison.report(tried)


def build_evaluation(config: CompareConfig) -> Evaluation:
    """Builds what the trainings have in common and how they are scored, and checks all that the config names."""
    if config.images is not None:
        return ImageEvaluation(config, config.images)
    assert config.vl is not None
    return VLEvaluation(config, config.vl)
