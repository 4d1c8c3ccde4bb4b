"""Compares the bare model, full fine-tuning, LoRA and DoRA (also at half the rank) on vision-language tasks, jointly.

Every method gets its own learning rate: all candidates are trained once and judged on the base config's validation
splits, by the geometric mean of the tasks' metrics; the best one is trained once per seed and scored on the reported
splits, none of whose images was used for training or tuning. The training that won the tuning counts as the first of
these, which may favour lucky ones. Every finished training and its answers are files in `output`, so an interrupted
comparison resumes when it is started again.
"""

import json
import logging
from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from statistics import median

from dora_mm.adapting.files import load_trained
from dora_mm.config.loader import dump_config, load_config, resolve_path
from dora_mm.config.vl import CompareVLConfig, TrainVLConfig
from dora_mm.config.vl_data import VLDataConfig
from dora_mm.data.vl.example import Example, Predictions, stem
from dora_mm.data.vl.splits import ValidationSet, open_texts, open_validation
from dora_mm.data.vl.tables import open_table
from dora_mm.eval.comparison import Variant, table_rows, variants
from dora_mm.eval.vl.comparison import (
    HEADINGS,
    AnswerScores,
    VLResult,
    answer_scores,
    describe_sizes,
    gain_over_question_only,
    group_of,
    intervals,
    vl_contrasts_table,
    vl_results_csv,
    vl_results_table,
)
from dora_mm.eval.vl.metrics import CAPTION_TASKS, QUESTION_TASKS
from dora_mm.eval.vl.question_only import question_only_answers
from dora_mm.models.families import load_family, structure_of
from dora_mm.models.vl import VLModel
from dora_mm.sampling.answers import answer_all
from dora_mm.tasks.vl import answerers
from dora_mm.train.campaign import Chosen, Training, Trainings, candidate_rates, open_campaign
from dora_mm.train.validation import overall
from dora_mm.utils.atomic import write_text
from dora_mm.utils.devices import default_device

log = logging.getLogger(__name__)
BARE, QUESTION_ONLY = "untrained base", "questions alone"
FREE_KEYS = ("workers", "name")  # config keys that change no result


def main(config: CompareVLConfig, *, resume: Path | None = None) -> None:
    """Runs what is missing of the comparison, and prints the table.

    Writes to the folder `output`: table.md and results.csv, the trainings in runs/, their output in logs/, the answers
    in answers/ and the values of all learning rates in rates/.

    Args:
        config: The config.
        resume: Unused: the same command resumes an interrupted comparison.

    Raises:
        ValueError: The base config, the reported splits, the model or the vision tower cannot be used, or `output` was
            started with a different config or inputs; the folder is created only after these checks. Or a training
            reported a user's mistake.
        RuntimeError: A training failed in any other way.
    """
    campaign = Campaign(config)
    bare = campaign.scores([campaign.answers("bare")])
    chosen = campaign.trainings.choose_rates(
        candidate_rates(config.learning_rates, compared(config)),
        campaign.tuned,
        seed=config.seeds[0],
        extra_rates=config.extra_rates,
    )
    reported = campaign.trainings.train_chosen(chosen, config.seeds)
    scores = {
        variant: campaign.scores([campaign.answers(training.name, training) for training in trainings])
        for variant, trainings in reported.items()
    }
    write_report(campaign, bare, scores, chosen)


def compared(config: CompareVLConfig) -> list[Variant]:
    """What is trained: full fine-tuning only where it has learning rates."""
    return variants([config.rank], full=config.learning_rates.full is not None, half=config.half_rank)


class Campaign:
    """A comparison and its folder: trains and answers what the folder does not have yet.

    Raises:
        ValueError: The config or the files that it names cannot be used, or the folder belongs to another comparison.
    """

    def __init__(self, config: CompareVLConfig):
        self.config = config
        self.base = load_base(config)
        self.data = reported_data(config, self.base)
        self.model = load_bare(config, self.base)  # keeps the visual tokens, which all trainings share
        self.sets = open_validation(self.data, config.decode, self.model, answered=True)
        check_reported(config, self.base, self.sets)
        self.folder = open_campaign(config, config.output, self.inputs(), FREE_KEYS)
        self.trainings = Trainings(
            self.folder,
            config.base,
            config.workers,
            partial(overrides, config, self.base, full_parts=all_parts(self.base)),
        )

    def inputs(self) -> dict[str, str]:
        """The identity of what the config names: the base config, the model, the vision tower and all examples."""
        answerers(self.model, self.sets, self.config.decode)  # reports mistakes before the folder exists
        rows = {
            f"the {split} of {task.task}": open_texts(source, self.base.data).identity
            for task in self.base.data.all_tasks
            for split, source in (("train", task.train), ("valid", task.valid))
            if source is not None
        }
        reported = {f"the reported split of {name}": found.table.identity for name, found in self.sets.items()}
        return {"base": dump_config(self.base), **self.model.identity, **rows, **reported}

    def tuned(self, training: Training) -> float:
        """The value of a learning rate: the geometric mean of the tasks' main metrics on the validation splits."""
        summary = self.trainings.summary(training)
        values = {task.task: summary[task.task] for task in self.base.data.all_tasks if task.task in summary}
        if not values:
            raise ValueError(f"{training.name}: no task can be scored on its valid split, so no rate can be chosen")
        return overall(values)

    def answers(self, name: str, training: Training | None = None) -> dict[str, Predictions]:
        """The answers to the reported splits by task, which are computed unless the folder has them.

        Args:
            name: The name of the training or of the bare model, for file names.
            training: Answer with the adapter of this training; None answers with the bare model.
        """
        path = self.folder / "answers" / f"{name}.json"
        if not path.is_file():
            log.info("Answers of %s:", name)
            found = self.answer(training)
            texts = {task: [prediction for _, prediction in rows] for task, rows in found.items()}
            write_text(path, json.dumps(texts) + "\n")
        texts = json.loads(path.read_text(encoding="utf-8"))
        return {task: list(zip(rows, texts[task], strict=True)) for task, rows in self.examples.items()}

    @cached_property
    def examples(self) -> dict[str, list[Example]]:
        return {name: list(found.table) for name, found in self.sets.items()}

    def answer(self, training: Training | None) -> dict[str, Predictions]:
        model = self.model.fresh(training.seed if training else self.config.seeds[0])
        if training:
            load_trained(model, self.trainings.adapter(training), backend=self.base.backend)
        answers = answerers(model, self.sets, self.config.decode)
        return answer_all(answers, model.networks.values(), self.sets, self.config.decode.batch_size)

    def question_only(self) -> dict[str, AnswerScores]:
        """The scores, by task, of answers guessed from the question without the image; not for captions."""
        found = {}
        for task in self.data.all_tasks:
            if task.task in QUESTION_TASKS and task.train is not None:
                rows = self.examples[task.task]
                answers = question_only_answers(open_texts(task.train, self.base.data), rows)
                found[task.task] = [list(zip(rows, answers, strict=True))]
        return {name: scores for name, rows in found.items() if (scores := answer_scores(name, rows))}

    @staticmethod
    def scores(answered: Sequence[Mapping[str, Predictions]]) -> dict[str, AnswerScores]:
        """The scores of one method's trainings by task; captions are left out where they cannot be scored."""
        found = {task: answer_scores(task, [rows[task] for rows in answered]) for task in answered[0]}
        return {task: scores for task, scores in found.items() if scores}


# --- what is trained, and what is reported ---------------------------------------------------------------------------


def load_bare(config: CompareVLConfig, base: TrainVLConfig) -> VLModel:
    """The bare model as the first training starts from, with the features of the reported images."""
    vision = base.vision.model_copy(update={"features": config.features}) if config.features else base.vision
    trained_tower = bool(base.adapter.vision_parts)
    return load_family(base.model, vision, seed=config.seeds[0], trained_tower=trained_tower, device=default_device())


def load_base(config: CompareVLConfig) -> TrainVLConfig:
    """Loads the base config.

    Raises:
        ValueError: The base config, or one of the trainings derived from it, is invalid or does not fit the comparison.
    """
    base = load_config(config.base)
    if not isinstance(base, TrainVLConfig):
        raise ValueError(f"base: {config.base} is a config of {base.pipeline}, not of train_vl")
    if base.adapter.init_from is not None:
        raise ValueError(f"base: {config.base} has adapter.init_from, which other methods cannot load: leave it out")
    if missing := [task.task for task in base.data.all_tasks if task.valid is None]:
        raise ValueError(f"base: {config.base} has no valid for {', '.join(missing)}, which choosing a rate needs")
    trained, reported = ({task.task for task in data.all_tasks} for data in (base.data, config.report))
    if trained != reported:
        key = "report.tasks" if config.report.tasks else "report.task"
        raise ValueError(f"{key}: must be the tasks of {config.base}: {', '.join(sorted(trained))}")
    if config.features and base.adapter.vision_parts:
        raise ValueError(
            f"features: {config.base} adapts the vision tower, which then has to encode the images: leave features out"
        )
    for variant in compared(config):
        load_config(config.base, overrides(config, base, Training(variant, 1e-3, 0), all_parts(base)))
    return base


def all_parts(base: TrainVLConfig) -> list[str]:
    """The parts of the base model that full fine-tuning trains: all but those of the vision tower."""
    maps = structure_of(base.model, base.vision).target_maps
    return [part for part in maps["model"].parts if not part.startswith("vision.")]


def overrides(config: CompareVLConfig, base: TrainVLConfig, training: Training, full_parts: Sequence[str]) -> list[str]:
    """The overrides of the base config for one training; every update has the scaling of the base's."""
    variant, adapter = training.variant, base.adapter
    everything = adapter.extra_trainable if base.model.full_extra is None else base.model.full_extra
    rank = variant.rank or 1  # full fine-tuning ignores it
    full = [
        f"adapter.parts=[{', '.join(full_parts)}]",
        f"adapter.extra_trainable=[{', '.join(everything)}]",
        "adapter.dropout=0.0",  # it acts on the input of A
    ]
    return [
        f"seed={training.seed}",
        f"adapter.method={variant.method}",
        f"adapter.rank={rank}",
        f"adapter.alpha={rank * adapter.alpha / adapter.rank!r}",
        f"optimizer.lr={training.rate!r}",
        "optimizer.magnitude_lr=null",
        f"train.steps={config.steps}",
        "train.epochs=null",
        "train.checkpoint_every=0",
        "evaluate.every=0",
        *(full if variant.method == "full" else []),
    ]


def reported_data(config: CompareVLConfig, base: TrainVLConfig) -> VLDataConfig:
    """The reported data with each task's train split, from which `decode.answers` and guesses take their answers."""
    train = {task.task: task.train for task in base.data.all_tasks}
    tasks = tuple(task.model_copy(update={"train": train[task.task]}) for task in config.report.all_tasks)
    return config.report.with_tasks(tasks)


def check_reported(config: CompareVLConfig, base: TrainVLConfig, sets: Mapping[str, ValidationSet]) -> None:
    """Checks that the reported splits can be scored fairly.

    Args:
        config: The config.
        base: The base config.
        sets: The reported splits by task.

    Raises:
        ValueError: A reported split has a single image, so that it has no interval; or it has images that are used for
            training or tuning, for any task.
    """
    for name, found in sets.items():
        if len({group_of(name, example) for example in found.table}) < 2:
            place = config.report.place(name, "report")
            raise ValueError(f"{place} has only one image, and intervals need two or more")
    for task in base.data.all_tasks:
        for split, source in (("train", task.train), ("valid", task.valid)):
            assert source is not None
            table = open_table(source, Path(base.data.tables), on_bad_data=base.data.on_bad_data)
            used = ValidationSet(table, source.images)
            for name, found in sets.items():
                if shared := sorted(shared_images(found, used)):
                    raise ValueError(
                        f"report: {len(shared)} images of {name} are also in the {split} of {task.task} in "
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


# --- the report --------------------------------------------------------------------------------------------------


def write_report(
    campaign: Campaign,
    bare: Mapping[str, AnswerScores],
    scores: Mapping[Variant, Mapping[str, AnswerScores]],
    chosen: Mapping[Variant, Chosen],
) -> None:
    """Writes table.md and results.csv, and prints the table."""
    config, question_only = campaign.config, campaign.question_only()
    results = [VLResult(BARE, intervals(bare))]
    if question_only:
        results.append(
            VLResult(
                QUESTION_ONLY,
                {task: found for task, found in intervals(question_only).items() if task in question_only},
            )
        )
    for label, variant in table_rows([config.rank], scores):
        results.append(result(campaign, label, variant, scores[variant], chosen[variant]))
    dora = Variant("dora", config.rank)
    texts = [
        vl_results_table(results),
        about(campaign, scores[dora]),
        *([gain_over_question_only(str(dora), scores[dora], question_only)] if question_only else []),
        vl_contrasts_table(config.rank, scores),
    ]
    write_text(campaign.folder / "table.md", "\n\n".join(texts) + "\n")
    write_text(campaign.folder / "results.csv", vl_results_csv(results))
    print("\n\n".join(texts))
    print(f"\ntable    {campaign.folder / 'table.md'}")


def result(
    campaign: Campaign, label: str, variant: Variant, scores: Mapping[str, AnswerScores], chosen: Chosen
) -> VLResult:
    """A row of the table; time and memory are medians over the trainings."""
    found = [campaign.trainings.summary(Training(variant, chosen.rate, seed)) for seed in campaign.config.seeds]
    return VLResult(
        label,
        intervals(scores),
        found[0]["parameters"],
        found[0]["trainable_share"],
        str(chosen),
        median(summary["seconds_per_step"] for summary in found),
        median(summary["peak_memory_mb"] for summary in found),
    )


def about(campaign: Campaign, scores: Mapping[str, AnswerScores]) -> str:
    """Notes on the table: what was trained and reported, and what the intervals mean."""
    config = campaign.config
    groups = "all questions about one of these count together"
    if "nlvr2" in scores:
        groups += ", and all sentences of a set of NLVR2"
    notes = [
        f"{len(config.seeds)} trainings of {config.steps} steps each, {config.workers} at a time. "
        f"Reported: {describe_sizes(scores)}.",
        f"In brackets: 95 % intervals over trainings and over images or videos; {groups}.",
        "Full fine-tuning trains the language model itself. Learning rates: each method's best on the "
        "validation splits, by the geometric mean of the metrics; *: the lowest or highest tried. Memory: the "
        "peak of a training, in 2^20 bytes.",
    ]
    if set(scores) & set(CAPTION_TASKS):
        notes.append(
            "CIDEr is the mean of the captions' CIDEr-D scores, so its interval is computed in the same way; the word "
            "frequencies come from the references of the split, which are the same for all."
        )
    if missing := [HEADINGS[task] for task in campaign.sets if task not in scores]:
        notes.append(
            f"Not scored: {', '.join(missing)}. The tokenizer of caption metrics, a Java program, cannot run here."
        )
    return "\n\n".join(notes)
