"""Compares the bare model, full fine-tuning, LoRA and DoRA (also at half the rank), on pictures or on questions.

Every method at every rank gets its own learning rate: all candidates are trained once and scored on data for tuning;
the best one is trained once per seed and scored on data that neither training nor tuning used. The training that won
the tuning counts as the first of these, which may favour lucky ones. Every finished training and what it drew or
answered are files in `output`, so an interrupted comparison resumes when it is started again.
"""

from functools import partial
from pathlib import Path

from dora_mm.config.comparing import CompareConfig
from dora_mm.train.campaigns.campaign import Campaign, Evaluation, compared
from dora_mm.train.campaigns.pictures import PictureEvaluation
from dora_mm.train.campaigns.questions import QuestionEvaluation
from dora_mm.train.campaigns.trainings import candidate_rates
from dora_mm.utils.lock import only_writer


def main(config: CompareConfig, *, resume: Path | None = None) -> None:
    """Runs what is missing of the comparison, and prints the table.

    Writes to the folder `output`: table.md, results.csv and (pictures) sheet.png, the trainings in runs/, their output
    in logs/, the values of all learning rates in rates/, and what was drawn or answered in pictures/ and scores/ or in
    answers/.

    Args:
        config: The config.
        resume: Unused: the same command resumes an interrupted comparison.

    Raises:
        ValueError: What the config names cannot be used, does not fit together, or cannot be scored fairly; or `output`
            was started with a different config or inputs. The folder is created only after these checks. Or a training
            reported a user's mistake, or another process writes to the folder.
        RuntimeError: A training failed in any other way.
    """
    evaluation = build_evaluation(config)
    campaign = Campaign(config, evaluation)
    with only_writer(campaign.folder):
        baselines = evaluation.baselines(campaign.folder)
        chosen = campaign.trainings.choose_rates(
            candidate_rates(config.learning_rates, compared(config)),
            partial(evaluation.value, campaign.trainings),
            seed=config.seeds[0],
            extra_rates=config.extra_rates,
        )
        trained = campaign.trainings.train_chosen(chosen, config.seeds)
        campaign.report(baselines, chosen, trained)


def build_evaluation(config: CompareConfig) -> Evaluation:
    """Builds what the trainings have in common and how they are scored, and checks all that the config names."""
    if config.pictures is not None:
        return PictureEvaluation(config, config.pictures)
    assert config.questions is not None
    return QuestionEvaluation(config, config.questions)
